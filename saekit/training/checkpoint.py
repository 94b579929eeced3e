"""Exact checkpoints: a folder that is whole or not there, the newest one that is, and one writer at a time.

    run/step-1200/  state.safetensors · state.json · manifest.json (SHA-256 of the others, written last)
    run/.lock       held while a process writes the run (`exclusive`), with its pid; gone when it is done

A checkpoint is built beside its place, made durable and renamed (`files.staged`), so a kill at any moment
leaves those before it untouched. Old ones are pruned only after the new one is in place and durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from saekit.errors import InvalidInput, first_line
from saekit.files import (
    LEFTOVER,
    clear_leftovers,
    fsync,
    read_json,
    read_tensors,
    remove,
    sha256_of_file,
    staged,
    write_json,
    write_tensors,
)

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
LOCK = ".lock"
STEP = re.compile("step-(0|[1-9][0-9]*)")
SETTLED = 2.0  # seconds after which a change to a file is sure to change its time stamp
Report = Callable[[str], None]


def save(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write `run/step-<step>`, then prune.

    What is kept: the newest `keep` checkpoints up to this one (at least this one). The others go, earlier ones and
    later ones: a run goes on from its newest whole checkpoint, so a later one is damaged and was passed over.
    Pruning waits until the new one is durable, so the disk holds up to `keep + 1` for a moment; what cannot
    be removed is no reason to end a run, and is tried again the next time.

    Raises `InvalidInput` where it cannot be written (no space left, say): no part of it is left, and those
    before it are untouched.
    """
    folder = run / f"step-{step}"
    try:
        with staged(folder) as building:
            write_tensors(building / TENSORS, tensors)
            write_json(building / STATE, state)
            sums = {name: sha256_of_file(building / name) for name in (TENSORS, STATE)}
            write_json(building / MANIFEST, sums)
    except OSError as error:
        raise InvalidInput(
            f"checkpoint {folder}: could not be written ({first_line(error)}); earlier ones are whole. "
            "Make room or choose another disk, then resume"
        ) from error
    _prune(run, step, keep)
    return folder


def _prune(run: Path, step: int, keep: int) -> None:
    kept = [path for path in _folders(run) if _step(path) <= step][-max(1, keep) :]
    for path in _folders(run):
        if path not in kept:
            with contextlib.suppress(OSError):
                remove(path)


def newest(run: Path, report: Report | None = None) -> Path | None:
    """The newest whole checkpoint of a run. report: gets one line for each damaged one that is passed over."""
    for folder in reversed(_folders(run)):
        problem = _problem(folder)
        if problem is None:
            return folder
        if report:
            report(f"passed over a damaged checkpoint, {folder}: {problem}")
    return None


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint whose sums are right; those that `newest` has just found right are not read twice."""
    if (problem := _problem(folder)) is not None:
        raise InvalidInput(
            f"checkpoint {folder}: files are missing or differ from its manifest ({problem}); "
            "remove the folder, and a resume takes the one before it"
        )
    return read_tensors(folder / TENSORS, finite=False), read_json(folder / STATE)


def _folders(run: Path) -> list[Path]:
    """The run's checkpoints by step, whole or not."""
    return sorted((path for path in run.glob("step-*") if STEP.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# Checkpoints found whole in this process, by what `stat` said of their files: they may be gigabytes.
_whole: dict[Path, tuple[tuple[int, ...], ...]] = {}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one."""
    try:
        before = [(folder / name).stat() for name in (TENSORS, STATE, MANIFEST)]
        signature = tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in before)
        if _whole.get(folder) == signature:
            return None
        sums = read_json(folder / MANIFEST)
        for name in (TENSORS, STATE):
            if sums.get(name) != sha256_of_file(folder / name):
                return f"{name} differs from {MANIFEST}"
    except (OSError, InvalidInput) as error:
        return first_line(error)
    if time.time() - max(s.st_ctime for s in before) > SETTLED:
        _whole[folder] = signature
    return None


def check_new(run: Path) -> None:
    """Raises `InvalidInput` where a run was begun before."""
    if run.exists() and any(entry.name != LOCK for entry in run.iterdir()):
        raise InvalidInput(
            f"run {run} exists: resume it (--resume), choose another name, or remove the folder"
        )


@contextlib.contextmanager
def disk_errors_told(run: Path) -> Iterator[None]:
    """A disk that is full or fails under a run's rows or its `final` is one clear error: the checkpoints are whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise InvalidInput(
            f"run {run}: could not be written ({first_line(error)}); its checkpoints are whole. Make room, then go on with "
            "--resume"
        ) from error


@contextlib.contextmanager
def exclusive(run: Path, report: Report | None = None) -> Iterator[None]:
    """Be the only process that writes into `run`, which is created if missing and removed again if left empty.

    The lock is the kernel's (`flock` on `run/.lock`), so it ends with the process, however that dies. A second
    process gets `InvalidInput` that names the first one. Where the file system or the platform has no such lock the
    run goes on without one, and `report` (without it, a warning) says that nothing keeps a second writer away.
    """
    created = not run.exists()
    try:
        descriptor = _locked(run, report)
    except OSError as error:
        raise InvalidInput(f"run {run}: cannot be written ({first_line(error)})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run / LOCK).unlink()  # while it is held: `_locked` looks whether its file still has the name
        os.close(descriptor)
        if created:
            with contextlib.suppress(OSError):  # not empty
                run.rmdir()


def _locked(run: Path, report: Report | None) -> int:
    """Descriptor of the run's lock file, held."""
    path = run / LOCK
    while True:
        run.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the one before us has just removed the folder it left empty
            continue
        try:
            if fcntl is None:
                raise OSError("this platform has no flock")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "pid unknown"
            os.close(descriptor)
            raise InvalidInput(
                f"run {run}: another process ({holder}) is writing this run; wait for it or stop it, "
                "or give this one another name"
            ) from None
        except OSError as error:
            message = f"run {run}: no lock here ({first_line(error)}), so nothing keeps a second process from writing it too"
            report(message) if report else warnings.warn(message, RuntimeWarning, stacklevel=4)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its holder finished, and removed it, between our two calls
    with contextlib.suppress(OSError):  # on a full disk nobody learns the pid
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        fsync(run.parent)  # the run's own entry
    return descriptor


def clean(run: Path) -> None:
    """Remove what killed processes left in the run folder and one level down; call it inside `exclusive`.

    A folder that was being replaced when its process died (`final.old-<pid>` without `final`) is put back: it is
    whole, and the new one is made again from the checkpoint before it, which is what makes a run finished.
    """
    clear_leftovers(run)
    for folder in _subfolders(run):
        clear_leftovers(folder)


def _subfolders(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if path.is_dir() and not path.is_symlink()]


def settle(run: Path, keep: int) -> None:
    """Tidy a run whose last checkpoint is in place, if a kill right after that left something to tidy."""
    folders = [run, *_subfolders(run)]
    leftovers = any(LEFTOVER.fullmatch(path.name) for folder in folders for path in folder.iterdir())
    if leftovers or (run / LOCK).exists() or len(_folders(run)) > keep:
        with exclusive(run):
            clean(run)
            if (last := newest(run)) is not None:
                _prune(run, _step(last), keep)


def check_origin(then: Mapping[str, str], now: Mapping[str, str], where: Path | str) -> None:
    """Refuse to go on from what another model, text or program made: the steps to come would not be the same bits.

    then, now: what the checkpoint was made of and what is there, by kind (`torch`, `transformer_lens`, `saekit` …:
    versions; `model`, `tokenizer`, `text`: fingerprints). where: the checkpoint.
    Raises `InvalidInput` that lists every difference with its remedy.
    """
    wrong = [
        f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}: {_remedy(key, then.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if wrong:
        raise InvalidInput(
            f"{where} cannot be resumed exactly: " + "; ".join(wrong) + "; or start a run with another name"
        )


def _short(value: str | None) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:12]}…" if re.fullmatch("[0-9a-f]{16,}", value) else value


def _remedy(key: str, then: str | None) -> str:
    what = {
        "model": "load the model it was started with",
        "tokenizer": "load the tokenizer it was started with",
        "text": "put the text back as it was",
    }
    return what.get(key, f"install {key} {then}" if then else "go on with what it was started with")


class StopFlag:
    """Whether a signal has asked the run to end at the next step boundary."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM only set a flag, so that the state saved is that of a whole step."""
    flag = StopFlag()
    try:
        before = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
