"""Writing: whole or not there, and nothing left over. (What readers refuse is tested with the files they read.)"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from saekit import files
from saekit.files import clear_leftovers, remove, replace_text, staged, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def build(folder: Path, text: str) -> None:
    with staged(folder) as building:
        (building / "a").write_text(text)


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_exception_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "x") as building:
        (building / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    build(tmp_path / "x", "one")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "x") as building:
        raise KeyboardInterrupt
    assert names(tmp_path) == ["x", "x/a"]


@pytest.mark.parametrize("swap", [1, 2])
def test_a_failing_rename_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch, swap: int) -> None:
    build(tmp_path / "x", "one")
    rename, calls = Path.rename, []

    def once(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == swap:
            fail()
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "rename", once)
        build(tmp_path / "x", "two")
    assert names(tmp_path) == ["x", "x/a"]
    assert (tmp_path / "x/a").read_text() == "one"


def test_a_pid_that_comes_again_finds_its_own_leftovers(tmp_path: Path) -> None:
    """In a container every run has the same pid."""
    tmp, old = (tmp_path / f"x.{kind}-{os.getpid()}" for kind in ("tmp", "old"))
    build(tmp_path / "x", "first")
    for there in (True, False):  # killed while it removed the old folder; killed between the two renames
        for leftover in (tmp, old):
            leftover.mkdir()
            (leftover / "b").write_text(leftover.name)
        if not there:
            remove(tmp_path / "x")
        build(tmp_path / "x", "new")
        assert names(tmp_path) == ["x", "x/a"]


def test_the_old_folder_comes_back_where_the_new_one_never_came(tmp_path: Path) -> None:
    for name in ("x.tmp-1", "x.old-2", "x.old-3", "y", "y.old-2", "z.old-4.tmp-5", "z.tmp-old", "w.old-1b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / "rows.tmp-7").write_text("")
    (tmp_path / "link.tmp-8").symlink_to(tmp_path / "y")
    os.utime(tmp_path / "x.old-3", (1, 1))
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["w.old-1b", "w.old-1b/a", "x", "x/a", "y", "y/a", "z.tmp-old", "z.tmp-old/a"]
    assert (tmp_path / "x/a").read_text() == "x.old-2"  # the newer one
    assert (tmp_path / "y/a").read_text() == "y"


def test_half_a_removal_has_another_name(tmp_path: Path, monkeypatch) -> None:
    build(tmp_path / "x", "one")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # a kill
        remove(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("broken", ["write_text", "replace"])
def test_a_text_is_replaced_or_stays(tmp_path: Path, monkeypatch, broken: str) -> None:
    replace_text(tmp_path / "t", "one")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, broken, fail)
        replace_text(tmp_path / "t", "two")
    assert names(tmp_path) == ["t"]
    assert (tmp_path / "t").read_text() == "one"
    replace_text(tmp_path / "t", "two")
    assert (tmp_path / "t").read_text() == "two"


def test_folders_without_fsync_are_fine_and_files_are_not(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").write_text("")

    def none(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", none)
    files.fsync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        files.fsync(tmp_path / "a")


def test_tensors_that_do_not_fit_are_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(tmp_path / "nowhere" / "a.safetensors", {"a": torch.ones(2)})
    assert caught.value.errno == errno.ENOENT
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
