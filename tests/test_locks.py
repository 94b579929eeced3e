from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from saekit import locks
from saekit.errors import InvalidInput
from saekit.locks import LOCK, exclusive

HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(f"pid {os.getpid()} on here", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_is_told_of_the_first_until_that_dies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin
    assert other.stdout
    with other:
        assert other.stdout.readline() == b"held\n"
        for _ in range(2):
            with (
                pytest.raises(
                    InvalidInput, match=rf"another process \(pid {other.pid} on here\) is writing this run"
                ),
                exclusive(run),
            ):
                raise AssertionError
        other.kill()
        other.wait()
        with exclusive(run):
            assert f"pid {os.getpid()} on " in (run / LOCK).read_text()
            with pytest.raises(InvalidInput, match=f"pid {os.getpid()} on"), exclusive(run):
                raise AssertionError
    assert not run.joinpath(LOCK).exists()


def test_an_exclusive_run_is_made_and_what_is_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "a" / "run"):
        assert names(tmp_path / "a" / "run") == [LOCK]
        raise KeyError
    assert names(tmp_path / "a") == []
    with exclusive(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "step-1").mkdir()
    assert names(tmp_path / "a" / "run") == ["step-1"]
    (tmp_path / "empty").mkdir()
    with exclusive(tmp_path / "empty"):
        pass
    assert names(tmp_path / "empty") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"), exclusive(tmp_path / "file"):
        raise AssertionError


def test_a_lock_file_removed_while_we_came_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """Its holder ended between our open and our flock; a third process may hold the name anew."""
    taken, flock = [], locks.fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with exclusive(tmp_path):
        assert len(taken) == 2
        with pytest.raises(InvalidInput, match="another process"), exclusive(tmp_path):
            raise AssertionError


def test_where_there_is_no_flock_it_is_said(tmp_path: Path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    said: list[str] = []
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with exclusive(tmp_path, said.append):
        (tmp_path / "step-1").mkdir()
    assert said == [
        f"run {tmp_path}: no lock here ([Errno {errno.ENOTSUP}] Operation not supported), "
        "so nothing keeps a second process from writing it too"
    ]
    with pytest.warns(RuntimeWarning, match="no lock here") as caught, exclusive(tmp_path):
        pass
    assert caught[0].filename == __file__
    monkeypatch.setattr(locks, "fcntl", None)
    with exclusive(tmp_path, said.append), warnings.catch_warnings():
        pass
    assert "this platform has no flock" in said[1]
    assert names(tmp_path) == ["step-1"]
