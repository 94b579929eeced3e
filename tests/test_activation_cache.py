from __future__ import annotations

import errno
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences

import saekit
from saekit import activation_cache, activations
from saekit.activations import Activations, StreamPosition
from saekit.errors import InvalidInput
from saekit.tokens import tokenize

SITE, OTHER = "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"
TEXTS = sentences(40)
ROW = 2 * 256  # bytes at one site


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_cache, "SHARD_BYTES", 250 * ROW)


def stream(model, folder, site: Any = SITE, tokens: Any = None, **more: Any) -> Activations:
    told = {"ring": 300, "contexts": 3, "tell": lambda line: None, "cache": folder} | more
    tokens = tokenize(TEXTS, model, 32, shuffle=0) if tokens is None else tokens
    return Activations(model, site, tokens, 100, **told)


def endless(model):
    return tokenize(TEXTS, model, 32, shuffle=0, epochs=None)


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "capture", lambda *given: pytest.fail("the model was called"))


def same(batches, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(batches, others, strict=True))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock-"))


def test_a_second_run_gives_the_same_bits_and_calls_no_model(model, tmp_path, monkeypatch) -> None:
    first = list(stream(model, tmp_path / "cache"))
    plain = list(stream(model, None))
    assert same(first, [batch.bfloat16() for batch in plain])
    assert len(files(tmp_path / "cache")) > 3
    no_model(monkeypatch)
    again = list(stream(model, tmp_path / "cache"))
    assert same(first, again)
    assert {batch.dtype for batch in again} == {torch.bfloat16}
    other_order = torch.cat(list(stream(model, tmp_path / "cache", seed=1)))
    assert not torch.equal(other_order, torch.cat(first))


def test_rows_straight_from_a_bf16_model_are_those_read_back(tmp_path) -> None:
    model = saekit.load_model("tiny", dtype="bfloat16", device="cpu")
    straight = list(stream(model, None))
    assert same(straight, stream(model, tmp_path / "cache"))
    assert same(straight, stream(model, tmp_path / "cache"))


def test_an_endless_stream_keeps_every_epoch_in_its_order(model, tmp_path, monkeypatch) -> None:
    n = 25  # three epochs
    more = {"tokens": endless(model), "cache_rows": 100 * n}
    first = list(itertools.islice(stream(model, tmp_path / "cache", **more), n))
    no_model(monkeypatch)
    assert same(first, itertools.islice(stream(model, tmp_path / "cache", **more), n))


def test_some_of_the_sites_can_be_read_and_what_is_missing_is_added_for_all(
    model, tmp_path, monkeypatch
) -> None:
    both = list(stream(model, tmp_path / "cache", [OTHER, SITE]))
    with monkeypatch.context() as patched:
        no_model(patched)
        assert same([batch[SITE] for batch in both], stream(model, tmp_path / "cache"))
    for shard in sorted((tmp_path / "cache").glob("shard-*"))[1:]:
        shard.unlink()
    assert same([batch[SITE] for batch in both], stream(model, tmp_path / "cache"))
    no_model(monkeypatch)
    assert same([batch[OTHER] for batch in both], stream(model, tmp_path / "cache", OTHER))


def test_it_resumes_from_any_position(model, tmp_path, monkeypatch) -> None:
    more = {"tokens": endless(model), "cache_rows": 1500}
    whole, positions = [], [StreamPosition()]
    running = stream(model, tmp_path / "cache", **more)
    for batch in itertools.islice(running, 15):
        whole.append(batch)
        positions.append(running.position)
    no_model(monkeypatch)
    for at in (1, 4, 9):
        resumed = stream(model, tmp_path / "cache", start=positions[at], **more)
        assert same(whole[at:], itertools.islice(resumed, 15 - at))


def test_what_a_kill_leaves_is_read_and_gone_on_with(model, tmp_path, monkeypatch) -> None:
    """The folder as it lies on the disk after each batch, with a shard half written."""
    whole, left = [], []
    for number, batch in enumerate(stream(model, tmp_path / "cache")):
        whole.append(batch)
        if number % 4 == 1:
            left.append(shutil.copytree(tmp_path / "cache", tmp_path / f"left-{number}"))
    assert len({len(files(folder)) for folder in left}) > 1  # a cache of nothing, of one shard, of two …
    for folder in left:
        (folder / "shard-0-000099.safetensors.tmp-1").write_bytes(b"half")
        assert same(whole, stream(model, folder))
        assert not list(folder.glob("*.tmp-*"))
    no_model(monkeypatch)
    assert same(whole, stream(model, left[0]))


def test_what_was_forwarded_is_kept_when_the_reader_stops(model, tmp_path, monkeypatch) -> None:
    more = {"tokens": endless(model), "cache_rows": 2000}
    batches = stream(model, tmp_path / "cache", **more).batches()
    expected = [next(batches)[SITE] for _ in range(2)]
    batches.close()
    no_model(monkeypatch)
    assert same(expected, itertools.islice(stream(model, tmp_path / "cache", **more), 2))


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (2, 3), (1, 2)])
def test_processes_that_share_a_stream_share_its_cache(
    model, tmp_path, monkeypatch, writers, readers
) -> None:
    def shared(n: int) -> list[torch.Tensor]:
        streams = [stream(model, tmp_path / "cache", share=(r, n)).shares() for r in range(n)]
        batches = []
        for shares in zip(*streams, strict=True):
            rows = torch.cat([share.rows[SITE] for share in shares])
            numbers = torch.cat([share.numbers for share in shares])
            batches.append(torch.empty_like(rows).index_copy_(0, numbers, rows))
        return batches

    expected = [batch.bfloat16() for batch in stream(model, None)]
    assert same(expected, shared(writers))
    no_model(monkeypatch)
    assert same(expected, shared(readers))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"contexts": 4}, "contexts was 3, is 4"),
        ({"include_special": True}, r"special_ids_dropped was \[0\], is \[\]"),
        ({"site": [SITE, OTHER]}, f"it has no {OTHER}, only {SITE}"),
        ({"tokens": 24}, "context_size was 32, is 24; first_tokens was "),
        ({"tokens": "other seed"}, "first_tokens was "),
    ],
)
def test_a_cache_of_something_else_is_refused(model, tmp_path, more, message) -> None:
    next(iter(stream(model, tmp_path / "cache")))
    before = files(tmp_path / "cache")
    match more.get("tokens"):
        case int(size):
            more = more | {"tokens": tokenize(TEXTS, model, size, shuffle=0)}
        case str():
            more = more | {"tokens": tokenize(TEXTS, model, 32, shuffle=1)}
    with pytest.raises(InvalidInput, match=rf"does not fit: .*{message}.*Name another folder") as refused:
        stream(model, tmp_path / "cache", **more)
    assert "\n" not in str(refused.value)
    assert files(tmp_path / "cache") == before


def test_a_cache_of_another_model_or_dtype_is_refused(model, tmp_path, monkeypatch) -> None:
    next(iter(stream(model, tmp_path / "cache")))
    with monkeypatch.context() as patched:
        patched.setattr(model.cfg, "dtype", torch.bfloat16)
        with pytest.raises(InvalidInput, match="dtype was float32, is bfloat16"):
            stream(model, tmp_path / "cache")
    weight = next(model.original_model.parameters())
    with torch.no_grad():
        kept = weight[0, 0].clone()
        weight[0, 0] += 1
        try:
            with pytest.raises(InvalidInput, match="model was [0-9a-f]{12}…, is [0-9a-f]{12}…"):
                stream(model, tmp_path / "cache")
        finally:
            weight[0, 0] = kept
    stream(model, tmp_path / "cache")


def test_the_size_is_told_before_anything_is_written(model, tmp_path, monkeypatch) -> None:
    told: list[str] = []
    folder = tmp_path / "cache"
    made = stream(model, folder, [SITE, OTHER], tell=told.append)
    rows = sum(len(batch[SITE]) for batch in stream(model, None, [SITE, OTHER]))
    assert f"0.00 MB of activations are there, up to {rows * 2 * ROW / 1e6:.2f} MB will be written" in told[0]
    assert not folder.exists()
    list(made)
    written = sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert rows * 2 * ROW <= written < rows * 2 * ROW * 1.05  # headers
    stream(model, folder, SITE, tell=told.append)
    assert f"{rows * 2 * ROW / 1e6:.2f} MB of activations are there, nothing will be written" in told[1]

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=rows * ROW - 1))
    with pytest.raises(InvalidInput, match=r"up to .* MB would be written, its disk has .* MB free"):
        stream(model, tmp_path / "large", tell=told.append)
    assert not (tmp_path / "large").exists()


def test_no_more_is_written_than_was_told(model, tmp_path) -> None:
    told: list[str] = []
    more = {"tokens": endless(model), "cache_rows": 200, "tell": told.append}
    first = list(itertools.islice(stream(model, tmp_path / "cache", **more), 20))
    assert (
        sum(path.stat().st_size for path in (tmp_path / "cache").glob("shard-*")) < 1.05 * (200 + 300) * ROW
    )
    assert [
        line for line in told if "does not hold all of this stream; the rest is not kept" in line
    ] == told[1:]
    assert same(first, itertools.islice(stream(model, tmp_path / "cache", **more), 20))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def test_a_damaged_shard_is_named_when_it_is_first_used(model, tmp_path) -> None:
    list(stream(model, tmp_path / "cache"))
    last = shards(tmp_path / "cache")[-1]
    data = bytearray(last.read_bytes())
    data[-5] ^= 1
    last.write_bytes(data)
    batches = iter(stream(model, tmp_path / "cache"))
    next(batches)  # the first shards are whole
    with pytest.raises(InvalidInput, match=rf"{last}.* is damaged \(.* differs from its sum\); remove it"):
        list(batches)
    last.unlink()
    assert same([b.bfloat16() for b in stream(model, None)], stream(model, tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["cut", "list", "empty", "no sums"])
def test_a_damaged_header_is_named_at_opening(model, tmp_path, damage) -> None:
    list(stream(model, tmp_path / "cache"))
    shard = shards(tmp_path / "cache")[1]
    data = shard.read_bytes()
    listed = json.dumps(json.loads(json.loads(data[8 : data.index(b"}}") + 2])["__metadata__"]["forwards"]))
    rows = listed[: listed.index("]")].rsplit(" ")[-1].encode()
    changed = {
        "cut": data[: len(data) // 2],
        "list": data.replace(rows + b"]", str(int(rows) - 1).encode() + b"]", 1),
        "empty": b"",
        "no sums": data.replace(b'"sha256"', b'"sha255"', 1),
    }
    assert changed[damage] != data
    shard.write_bytes(changed[damage])
    with pytest.raises(InvalidInput, match=f"{shard}.* is damaged"):
        stream(model, tmp_path / "cache")


def test_sums_are_taken_once_for_an_opening(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(activation_cache, "SHARD_BYTES", 900 * ROW)  # several forwards of two sites
    list(stream(model, tmp_path / "cache", [SITE, OTHER]))
    summed: list[int] = []
    real = activation_cache._sum
    monkeypatch.setattr(activation_cache, "_sum", lambda data: (summed.append(len(data)), real(data))[1])
    opened = stream(model, tmp_path / "cache", SITE)
    assert max(summed) < 100 * ROW  # lists of forwards only
    summed.clear()
    list(opened)
    assert len(summed) == len(shards(tmp_path / "cache")) > 1  # one site of each


def test_a_second_writer_is_refused(model, tmp_path) -> None:
    first = iter(stream(model, tmp_path / "cache"))
    next(first)
    second = stream(model, tmp_path / "cache")
    with pytest.raises(InvalidInput, match=r"another process \(pid \d+ on .*\) is writing this cache"):
        next(iter(second))
    list(first)
    assert len(list(second)) == len(list(stream(model, tmp_path / "cache")))  # done: now it is only read


def test_a_full_disk_is_one_clear_error(model, tmp_path, monkeypatch) -> None:
    def full(path: Path, *given: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activation_cache, "write_tensors", full)
    with pytest.raises(InvalidInput, match=r"cannot be written \(.*No space left.*what is there stays whole"):
        list(stream(model, tmp_path / "cache"))
    assert files(tmp_path / "cache") == ["cache.json"]


def test_wrong_calls(model, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InvalidInput, match="holds something else; name another one"):
        stream(model, tmp_path)
    with pytest.raises(InvalidInput, match="expected a folder, this is a file"):
        stream(model, tmp_path / "thesis.tex")
    with pytest.raises(InvalidInput, match=r"cache_rows: .*epochs=None.* needs a number of rows"):
        stream(model, tmp_path / "cache", tokens=endless(model))
    with pytest.raises(InvalidInput, match="can be read only once"):
        stream(model, tmp_path / "cache", tokens=iter(endless(model)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_plain_ids_are_kept_too(model, tmp_path, monkeypatch) -> None:
    ids = torch.randint(1, 200, (20, 16), generator=torch.Generator().manual_seed(0))
    first = list(stream(model, tmp_path / "cache", tokens=ids))
    no_model(monkeypatch)
    assert same(first, stream(model, tmp_path / "cache", tokens=ids))
