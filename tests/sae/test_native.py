"""The compiled kernels are built where they can be, once; everywhere else plain torch does the work, without a word."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from saekit.sae import kernels, native

COMPILER = os.environ.get("CXX") or "c++"
compiled = pytest.mark.skipif(
    shutil.which(shlex.split(COMPILER)[0]) is None, reason="no C++ compiler on the PATH: nothing to build"
)
QUIET = (
    "-Wno-unknown-warning-option -Wno-unknown-pragmas -Wno-psabi".split()
)  # compilers differ in what they know

SMALL = """extern "C" void answer(int* out, int) {{ *out = {}; }}\n"""


def answer(library) -> int:
    out = ctypes.c_int()
    library.answer(ctypes.addressof(out), 1)
    return out.value


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Builds of a small source in a cache of its own; gives the cache's folder."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL.format(42))
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(native, "SIGNATURES", {"answer": "p"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "library", lambda: native._built.__wrapped__())  # remembers nothing
    return tmp_path / "cache" / "saekit"


def counting(folder: Path, name: str = "counting") -> Path:
    """A compiler that leaves a line behind for every file it makes."""
    compiler = folder / name
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo built >> {folder}/builds;; esac\nexec {COMPILER} "$@"\n'
    )
    compiler.chmod(0o755)
    return compiler


@compiled
def test_the_kernels_build_where_there_is_a_compiler(monkeypatch) -> None:
    # A fault in the source would otherwise pass for a machine without a compiler.
    monkeypatch.delenv("SAEKIT_NATIVE", raising=False)
    lib = native.library()
    assert lib is not None
    assert native.library() is lib


@compiled
def test_the_source_has_nothing_to_warn_of() -> None:
    """For any processor: the one at hand, and one of which nothing is known."""
    for flags in (native.FLAGS, native.PORTABLE):
        kept = [flag for flag in flags if not flag.startswith("-O")]  # only read, not translated
        done = subprocess.run(
            [
                *shlex.split(COMPILER),
                *kept,
                *"-fsyntax-only -Wall -Wextra -Werror".split(),
                *QUIET,
                native.SOURCE,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_saekit_native_0_asks_for_plain_torch(monkeypatch) -> None:
    monkeypatch.setenv("SAEKIT_NATIVE", "0")
    assert native.library() is None
    assert not native.usable(torch.zeros(3))


@compiled
def test_what_the_kernels_take(monkeypatch) -> None:
    monkeypatch.delenv("SAEKIT_NATIVE", raising=False)
    assert native.usable(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    for other in (torch.zeros(3, 2).t(), torch.zeros(3, dtype=torch.float64), torch.zeros(3, device="meta")):
        assert not native.usable(torch.zeros(3), other)


@compiled
def test_the_built_file_is_kept_and_used_again(anew, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", str(counting(tmp_path)))
    assert answer(native.library()) == 42
    (built,) = anew.iterdir()
    assert answer(native.library()) == 42
    assert (tmp_path / "builds").read_text() == "built\n"
    assert list(anew.iterdir()) == [built]
    native.SOURCE.write_text(SMALL.format(43))
    assert answer(native.library()) == 43, "another source is another file"
    assert len(list(anew.iterdir())) == 2


@compiled
def test_a_compiler_that_does_not_know_the_processor_still_builds(anew, monkeypatch, tmp_path) -> None:
    plain = tmp_path / "plain"
    plain.write_text(f'#!/bin/sh\ncase "$*" in *-march*) exit 1;; esac\nexec {COMPILER} "$@"\n')
    plain.chmod(0o755)
    monkeypatch.setenv("CXX", str(plain))
    assert answer(native.library()) == 42
    assert len(list(anew.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_plain_torch_does_the_work(compiler, anew, monkeypatch, capfd) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert native.library() is None
    check_that_work_goes_on()
    assert capfd.readouterr() == ("", "")
    assert not anew.exists() or not list(anew.iterdir())


@compiled
def test_a_source_that_does_not_build_leaves_nothing_behind(anew, capfd) -> None:
    native.SOURCE.write_text("this is not C++")
    assert native.library() is None
    check_that_work_goes_on()
    assert capfd.readouterr() == ("", "")
    assert not list(anew.iterdir())


@compiled
@pytest.mark.parametrize("why", [PermissionError, FileExistsError])
def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(why, anew, monkeypatch, tmp_path, capfd) -> None:
    elsewhere, make = tmp_path / "tmp", Path.mkdir
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def refuse(path, *args, **kwargs):
        if path.is_relative_to(anew.parent):
            raise why(f"{path}: not ours")  # permission bits would not stop a superuser
        return make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert answer(native.library()) == 42
    assert capfd.readouterr() == ("", "")
    assert not anew.exists()
    assert not list(elsewhere.iterdir()), "for this process alone, and gone with it"


@compiled
def test_a_compiler_may_be_given_with_its_flags(anew, monkeypatch) -> None:
    native.SOURCE.write_text(SMALL.format("ANSWER"))
    for number in (6, 7):
        monkeypatch.setenv("CXX", f"{COMPILER} -DANSWER={number}")
        assert answer(native.library()) == number
    assert len(list(anew.iterdir())) == 2


@compiled
def test_builds_at_once_do_not_disturb_each_other(anew, monkeypatch, tmp_path) -> None:
    """Threads here, processes elsewhere: they share nothing but the folder."""
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) sleep 0.3;; esac\nexec {counting(tmp_path)} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    with ThreadPoolExecutor(2) as pool:
        answers = [answer(future.result()) for future in [pool.submit(native.library) for _ in range(2)]]
    assert answers == [42, 42]
    assert (tmp_path / "builds").read_text() == "built\nbuilt\n", "not at once: nothing was tested"
    assert len(list(anew.iterdir())) == 1


def check_that_work_goes_on() -> None:
    values, latents = kernels.top_k(torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(3), 2)
    assert (values.tolist(), latents.tolist()) == ([[3.0, 2.0]], [[1, 2]])


def test_the_signatures_are_those_of_the_source() -> None:
    """ctypes believes what it is told: a wrong letter would read another argument."""
    source = native.SOURCE.read_text()
    found = {}
    for name, arguments in re.findall(r"^void (\w+)\(([^)]*)\)", source[source.index('extern "C"') :], re.M):
        found[name] = "".join("p" if "*" in one else one.split()[0][0] for one in arguments.split(","))
    threads = "i"
    assert found == {name: letters + threads for name, letters in native.SIGNATURES.items()}
