"""Reading what others wrote and writing so that nothing is ever half there.

Readers turn every broken file into one `InvalidInput` that names it. `staged` builds a folder beside
its final place and swaps it in with a rename, so a reader sees the old folder or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
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
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    path.chmod(0o644)  # safetensors leaves 0600, which a shared folder cannot use


def sha256_of_tensor(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite_number(value: float, name: str) -> float:
    """`value` as a float, refusing NaN, infinities and non-numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidInput(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Build a folder out of sight, make it durable, then swap it in; on any exception leave no trace."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    retired = folder.with_name(f"{folder.name}.old-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        for path in sorted(building.rglob("*")):
            fsync(path)
        fsync(building)
        if folder.exists():
            folder.rename(retired)
        building.rename(folder)
        fsync(folder.parent)
    except BaseException:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(retired, ignore_errors=True)
