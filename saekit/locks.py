"""One writer to a folder: a lock of the kernel's on a file in it, which ends with the process, however that dies."""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from saekit.errors import InvalidInput, first_line
from saekit.files import fsync

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def exclusive(
    folder: Path, report: Callable[[str], object] | None = None, *, what: str = "run", name: str = LOCK
) -> Iterator[None]:
    """Be the only process that writes into `folder`, which is created if missing and removed again if left empty.

    what: the folder holds, for messages. name: of the lock's file; several may stand in one folder. A second process gets
    `InvalidInput` that names the first one. Where the file system or the platform has no such lock the work goes on
    without one, and `report` (without it, a warning) says that nothing keeps a second writer away.
    """
    created = not folder.exists()
    try:
        descriptor = _locked(folder, report, what, name)
    except OSError as error:
        raise InvalidInput(f"{what} {folder}: cannot be written ({first_line(error)})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / name).unlink()  # while it is held: `_locked` looks whether its file still has the name
        os.close(descriptor)
        if created:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _locked(folder: Path, report: Callable[[str], object] | None, what: str, name: str) -> int:
    """Descriptor of the lock's file, held."""
    path = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
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
                f"{what} {folder}: another process ({holder}) is writing this {what}; wait for it or stop it, "
                "or give this one another name"
            ) from None
        except OSError as error:
            message = f"{what} {folder}: no lock here ({first_line(error)}), so nothing keeps a second process from writing it too"
            report(message) if report else warnings.warn(message, RuntimeWarning, stacklevel=4)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # its holder finished, and removed it, between our two calls
    with contextlib.suppress(OSError):  # on a full disk nobody learns the pid
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        fsync(folder.parent)  # the folder's own entry
    return descriptor
