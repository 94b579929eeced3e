"""Checkpoints: durable before they are there, whole or passed over, one writer, and nothing left over.

Kills, at every write of a real run, are in test_kills.py.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saekit import files
from saekit.errors import InvalidInput
from saekit.locks import LOCK
from saekit.training import checkpoint
from saekit.training.checkpoint import MANIFEST, STATE, TENSORS, check_origin, clean, settle


def save(run: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(
        run, step, {"a": torch.full((40,), float(step))}, {"step": step, "more": [*range(30)]}, keep
    )


def step_of(folder: Path | None) -> int:
    """The step that a checkpoint's tensors and state are of."""
    assert folder is not None
    tensors, state = checkpoint.load(folder)
    assert torch.equal(tensors["a"], torch.full((40,), float(state["step"])))
    return state["step"]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


# Writing


def test_it_is_durable_before_it_is_there_and_there_before_others_go(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1, keep=1)
    done: list[tuple[str, str]] = []
    fsync, rename, write = files.fsync, Path.rename, Path.write_text
    monkeypatch.setattr(files, "fsync", lambda path: (done.append(("fsync", path.name)), fsync(path)))
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (done.append(("rename", to.name)), rename(path, to))[1]
    )
    monkeypatch.setattr(
        Path, "write_text", lambda path, *a, **k: (done.append(("write", path.name)), write(path, *a, **k))[1]
    )
    save(tmp_path, 2, keep=1)
    building = f"step-2.tmp-{os.getpid()}"
    assert done == [
        ("write", STATE),
        ("write", MANIFEST),
        *(("fsync", name) for name in (MANIFEST, STATE, TENSORS, building)),
        ("rename", "step-2"),
        ("fsync", tmp_path.name),
        ("rename", f"step-1.tmp-{os.getpid()}"),
    ]
    assert names(tmp_path) == ["step-2"]


@pytest.mark.parametrize("operation", ["mkdir", "save_file", "write_text", "chmod", "fsync", "rename"])
def test_a_full_disk_at_any_write_is_one_error_and_leaves_no_trace(
    tmp_path: Path, monkeypatch, operation: str
) -> None:
    save(tmp_path, 1)
    place = files if operation in ("save_file", "fsync") else Path
    whole, failures = getattr(place, operation), 0
    while True:
        calls = 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failures + 1:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return whole(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(place, operation, full)
            try:
                save(tmp_path, 2)
                break
            except InvalidInput as error:
                message = str(error)
        failures += 1
        assert f"checkpoint {tmp_path}/step-2: could not be written ([Errno 28] No space left" in message
        assert "earlier ones are whole. Make room" in message
        if calls == 5 and operation == "fsync":  # the rename has happened; whether it lasts, nobody knows
            assert names(tmp_path) == ["step-1", "step-2"]
            shutil.rmtree(tmp_path / "step-2")
        assert names(tmp_path) == ["step-1"]
        assert step_of(checkpoint.newest(tmp_path)) == 1
    assert failures == {"mkdir": 2, "write_text": 2, "fsync": 5, "rename": 1}.get(operation, 1)
    assert step_of(checkpoint.newest(tmp_path)) == 2


def test_a_write_that_the_kernel_cuts_short_leaves_no_trace(tmp_path: Path) -> None:
    """The limit on file sizes stands for a full disk: real writes fail midway, in Python and in safetensors."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for tensors, state in (({"a": torch.ones(100_000)}, {}), ({}, {"long": "x" * 100_000})):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
            with pytest.raises(
                InvalidInput, match=r"step-2: could not be written \(\[Errno 27\] File too large"
            ):
                checkpoint.save(tmp_path, 2, tensors, state, keep=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["step-1"]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Two checkpoints of 600 kB fit on a disk of 1 MB but the second's room."""
    code = f"""
import torch, pathlib
from saekit.training import checkpoint
run = pathlib.Path({str(tmp_path)!r}) / "run"
checkpoint.save(run, 1, {{"a": torch.ones(150_000)}}, {{}}, keep=2)
try:
    checkpoint.save(run, 2, {{"a": torch.ones(150_000)}}, {{}}, keep=2)
except ValueError as error:
    print(error)
print([path.name for path in run.iterdir()], checkpoint.newest(run).name)
"""
    mounted = f"mount -t tmpfs -o size=1m none '{tmp_path}'"
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", f'{mounted} && exec "$@"', "sh", sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "step-2: could not be written ([Errno 28] No space left on device" in done.stdout
    assert done.stdout.endswith("['step-1'] step-1\n")


# What is kept


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 30):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-10", "step-30", "step-4"]
    save(tmp_path, 31, keep=1)
    assert names(tmp_path) == ["step-31"]
    save(tmp_path, 32, keep=0)
    assert names(tmp_path) == ["step-32"]


def test_a_damaged_later_one_never_takes_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """A resume passed it over and, with another interval, goes on beside it."""
    for step in (4, 6, 8):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-8" / MANIFEST).unlink()
    save(tmp_path, 7)
    assert names(tmp_path) == ["step-6", "step-7"]


def test_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-1" / MANIFEST).write_text("{}")
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-1"]
    assert step_of(checkpoint.newest(tmp_path)) == 1


def test_what_cannot_be_pruned_ends_no_run(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", lambda path: (path / "nowhere").rename(path))
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-1", "step-2"]
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-3"]


def test_half_a_pruning_is_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)

    def half(path: Path, **_: Any) -> None:
        (path / STATE).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", half)
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == [f"step-1.tmp-{os.getpid()}", "step-2"]
    (tmp_path / "step-2" / MANIFEST).unlink()
    assert checkpoint.newest(tmp_path) is None
    clean(tmp_path)
    assert names(tmp_path) == ["step-2"]


def test_a_checkpoint_on_another_disk_is_read_and_its_link_pruned(tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    save(run, 1).rename(far)
    (run / "step-1").symlink_to(far)
    assert step_of(checkpoint.newest(run)) == 1
    save(run, 2, keep=1)
    assert names(run) == ["step-2"]
    assert names(far) == sorted((TENSORS, STATE, MANIFEST))


# Damage


def damages(content: bytes) -> dict[str, bytes]:
    """Truncations at many lengths, a flipped bit in every region, and more than there was."""
    size = len(content)
    lengths = {0, 1, 7, 8, 9, size - 1, *range(0, size, max(1, size // 23))}
    places = {0, 7, 8, size - 1, *range(0, size, max(1, size // 29))}
    return (
        {f"cut to {n}": content[:n] for n in lengths}
        | {f"bit at {n}": content[:n] + bytes([content[n] ^ 1]) + content[n + 1 :] for n in places}
        | {"zeros": bytes(size), "longer": content + b"x", "twice": content * 2}
    )


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
def test_any_damage_to_any_file_is_seen_said_and_passed_over(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    file = folder / name
    whole = file.read_bytes()
    content = whole.rstrip() if name == MANIFEST else whole  # without its last newline it is as good
    tried = damages(content)
    assert len(tried) > 40
    for what, damaged in tried.items():
        assert damaged != content
        file.write_bytes(damaged)
        said: list[str] = []
        assert step_of(checkpoint.newest(tmp_path, said.append)) == 1, what
        assert len(said) == 1
        assert said[0].startswith(f"passed over a damaged checkpoint, {folder}: ")
        assert name in said[0]
        with pytest.raises(InvalidInput, match="differ from its manifest .* takes the one before it"):
            checkpoint.load(folder)
    file.write_bytes(whole)
    assert step_of(checkpoint.newest(tmp_path)) == 2
    file.unlink()
    assert step_of(checkpoint.newest(tmp_path)) == 1


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "0",
        "null",
        "{}",
        "[" * 100_000,
        '{"state.json": 5, "state.safetensors": null}',
        "\x00",
        "{" * 9,
    ],
)
def test_a_manifest_of_another_kind_is_damage(tmp_path: Path, manifest: str) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).write_text(manifest)
    assert step_of(checkpoint.newest(tmp_path)) == 1


def test_what_is_no_checkpoint_is_none(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoint.newest(tmp_path / "nowhere") is None
    for name in ("step-", "step-x", "step-²", "step-٣", "step-07", "step--3", "step-3.old-9", "step-3.tmp-9"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path, said.append) is None
    assert said == []
    (tmp_path / "step-5").write_text("a file")
    save(tmp_path, 4)  # removes what is later and no checkpoint
    assert step_of(checkpoint.newest(tmp_path, said.append)) == 4
    assert said == []


def test_a_checkpoint_found_whole_is_not_hashed_again_until_it_changes(tmp_path: Path, monkeypatch) -> None:
    hashed: list[str] = []
    whole = checkpoint.sha256_of_file
    monkeypatch.setattr(checkpoint, "sha256_of_file", lambda path: (hashed.append(path.name), whole(path))[1])
    folder = save(tmp_path, 1)
    hashed.clear()
    checkpoint.newest(tmp_path)
    assert hashed == [TENSORS, STATE]
    checkpoint.load(folder)  # too young: a change within one tick of the clock would not show
    assert hashed == [TENSORS, STATE] * 2
    monkeypatch.setattr(checkpoint, "SETTLED", -1.0)
    checkpoint.load(folder)
    hashed.clear()
    checkpoint.newest(tmp_path)
    checkpoint.load(folder)
    assert hashed == []
    time.sleep(0.03)  # some ticks
    damaged = (folder / TENSORS).read_bytes()[:-1] + b"!"
    (folder / TENSORS).write_bytes(damaged)
    assert checkpoint.newest(tmp_path) is None


# One writer


# What kills leave


def test_clean_puts_back_what_was_being_replaced_and_removes_the_rest(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for member in (tmp_path, tmp_path / "wide"):
        for name in ("final.old-11", "final.tmp-11", "step-3.old-5", "step-3.tmp-5/deep"):
            (member / name).mkdir(parents=True)
            (member / name / "cfg.json").write_text(name)
        (member / "metrics.jsonl").write_text("kept")
        (member / "metrics.jsonl.tmp-11").write_text("{")
    (tmp_path / "wide" / "deep").mkdir()
    (tmp_path / "wide" / "deep" / "x.tmp-1").mkdir()  # not ours: two levels down
    clean(tmp_path)
    assert names(tmp_path) == ["final", "metrics.jsonl", "step-3", "wide"]
    assert names(tmp_path / "wide") == ["deep", "final", "metrics.jsonl", "step-3"]
    assert (tmp_path / "final/cfg.json").read_text() == "final.old-11"
    assert step_of(checkpoint.newest(tmp_path)) == 3
    before = names(tmp_path)
    clean(tmp_path)
    assert names(tmp_path) == before


def test_settle_tidies_only_where_something_is_left(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    settle(tmp_path, 2)
    assert names(tmp_path) == ["step-2", "step-3"]
    for leftover in (tmp_path / LOCK, tmp_path / "final.tmp-3", tmp_path / "step-3" / "x.tmp-3"):
        leftover.write_text("")
        settle(tmp_path, 2)
        assert names(tmp_path) == ["step-2", "step-3"]
        assert not leftover.exists()
    monkeypatch.setattr(checkpoint, "exclusive", None)  # a finished run on a disk that cannot be written
    settle(tmp_path, 2)


# Where a run comes from


def test_an_origin_that_differs_is_listed_with_what_to_do() -> None:
    then = {
        "torch": "2.13.0",
        "saekit": "0.1.0",
        "model": "a" * 64,
        "tokenizer": "t1",
        "text": "b" * 64,
        "x": "1",
    }
    check_origin(then, dict(then), "step-4")
    check_origin({}, {}, "step-4")
    now = {
        "torch": "2.14.0",
        "saekit": "0.1.0",
        "model": "c" * 64,
        "tokenizer": "t2",
        "text": "d" * 64,
        "y": "2",
    }
    with pytest.raises(InvalidInput) as caught:
        check_origin(then, now, Path("runs/step-4"))
    assert str(caught.value) == (
        "runs/step-4 cannot be resumed exactly: "
        "model was aaaaaaaaaaaa…, is cccccccccccc…: load the model it was started with; "
        "text was bbbbbbbbbbbb…, is dddddddddddd…: put the text back as it was; "
        "tokenizer was t1, is t2: load the tokenizer it was started with; "
        "torch was 2.13.0, is 2.14.0: install torch 2.13.0; "
        "x was 1, is not recorded: install x 1; "
        "y was not recorded, is 2: go on with what it was started with; "
        "or start a run with another name"
    )


# Signals


def test_signals_only_set_a_flag_however_many_there_are(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.stop_on_signals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        save(tmp_path, 1)
    assert step_of(checkpoint.newest(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) is before
