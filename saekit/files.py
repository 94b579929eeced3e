"""Reading what others wrote and writing so that nothing is ever half there.

Readers turn every broken file into one `InvalidInput` that names it. `staged` builds a folder beside
its final place and swaps it in with a rename, so a reader sees the old folder or the new one.

Two kinds of names beside a folder belong to writing it, and a killed process leaves them behind:

    folder.tmp-<pid>   rubbish: half built, or half removed
    folder.old-<pid>   whole: the folder before, while the new one takes its place

So without `folder` its `.old-` is what was there, and with it both kinds may go (`clear_leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import FileMissing, InvalidInput

MAX_JSON_BYTES = 16 * 2**20
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9]+")


def existing(path: str | os.PathLike[str], what: str) -> Path:
    """The path, or `FileMissing` that says what was looked for."""
    path = Path(path)
    try:
        there = path.exists()
    except (OSError, ValueError) as error:  # a name of 300 characters, a NUL byte
        raise FileMissing(f"{what}: {str(path)[:200]!r} is not a usable path ({error})") from error
    if not there:
        raise FileMissing(f"{what}: {path} does not exist (current folder: {Path.cwd()})")
    return path


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"duplicate keys {twice}")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. NaN, duplicate keys, deep nesting and files over 16 MiB are refused."""
    path = existing(path, "JSON file")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise InvalidInput(f"{path}: {size:,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read")
    try:
        value = json.loads(
            path.read_text("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def read_tensors(path: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Broken files and, by default, NaN or Inf are refused."""
    path = existing(path, "safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidInput(f"{path}: not a readable safetensors file ({error})") from error
    if finite:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InvalidInput(f"{path}: tensor {name!r} holds NaN or infinite values")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata in a safetensors header."""
    try:
        with safe_open(existing(path, "safetensors file"), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable safetensors file ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises OSError where it cannot be written, as every other writer does."""
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:
        if found := re.search(r"\(os error ([0-9]+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    path.chmod(0o644)  # safetensors leaves 0600, which a shared folder cannot use


def sha256_of_tensor(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite_number(value: float, name: str) -> float:
    """`value` as a float, refusing NaN, infinities and non-numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems know no fsync of folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file that is, at any moment, the old one or the new one."""
    building = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        building.write_text(text, "utf-8")
        fsync(building)
        building.replace(path)
        fsync(path.parent)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder; a kill midway leaves nothing under its name. Raises OSError if it has to stay."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    _delete(doomed)
    path.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink() or path.exists():
        path.unlink()


def clear_leftovers(folder: Path) -> None:
    """Undo what killed processes left in `folder`. Nobody may be writing there.

    An `x.old-<pid>` without `x` was about to be replaced when its process died: it is whole, and becomes `x` again.
    """
    found = [(path, match) for path in folder.iterdir() if (match := LEFTOVER.fullmatch(path.name))]
    for path, match in found:
        if match["kind"] == "tmp":
            _delete(path)
    whole = [(path, path.with_name(match["name"])) for path, match in found if match["kind"] == "old"]
    for path, place in sorted(whole, key=lambda pair: pair[0].stat().st_mtime_ns, reverse=True):
        if place.exists():
            remove(path)
        else:
            path.rename(place)
            fsync(folder)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder out of sight, make it durable, then swap it in; on any exception leave no trace."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    retired = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    _retire(retired, folder)  # of a killed process that had this pid: in a container it is always the same
    _delete(building)
    try:
        building.mkdir()
        yield building
        for path in sorted(building.rglob("*")):
            fsync(path)
        fsync(building)
        if folder.exists():
            folder.rename(retired)
        building.rename(folder)
        fsync(folder.parent)
    except BaseException:
        _retire(retired, folder)
        _delete(building)
        raise
    with contextlib.suppress(
        OSError
    ):  # the new folder is in place and durable; `clear_leftovers` has another try
        _retire(retired, folder)


def _retire(retired: Path, folder: Path) -> None:
    """What `folder` was goes, or becomes it again where there is none."""
    if retired.exists():
        if folder.exists():
            remove(retired)
        else:
            retired.rename(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside the file to write it under; it takes the file's place when it is whole and durable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield building
        fsync(building)
        building.replace(path)
        fsync(path.parent)
    except BaseException:
        building.unlink(missing_ok=True)
        raise
