"""The tensors of a `.pt` file, read as data. Nothing in it is ever run.

A `.pt` is a zip of a pickle, which says how the dictionary is put together, and of raw bytes, one entry for each
storage. A pickle is a program: it may call any function, and even the ones that `torch.load(weights_only=True)`
allows can be asked for terabytes (`torch.Tensor(10**12)`). So the few instructions that dictionaries of tensors consist
of are followed here, by hand, into plain values; no other is known.
Only what `torch.save` writes since 1.6 is read, uncompressed, so a file gives at most as many bytes as it has.
"""

from __future__ import annotations

import math
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import existing

MAX_ENTRIES = 10_000
MAX_PICKLE_BYTES = 2**20
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


class _Name(NamedTuple):
    """A global that the pickle names."""

    module: str
    name: str


class _Storage(NamedTuple):
    key: str  # its entry is data/<key>
    dtype: torch.dtype
    length: int


class _Strided(NamedTuple):
    """A tensor, as the pickle describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pt(path: Path) -> dict[str, Tensor]:
    """All tensors of a dictionary saved with `torch.save`. Raises `InvalidInput` for anything else."""
    path = existing(path, "PyTorch file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path)
            described = _interpret(archive.read(entries["data.pkl"]), path)
            read: dict[str, Tensor] = {}
            return {
                name: _tensor(name, strided, archive, entries, read, path)
                for name, strided in described.items()
            }
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise InvalidInput(
            f"{path}: not a readable PyTorch file ({error}); files from before PyTorch 1.6 have to be saved again"
        ) from error


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The zip's entries by their names below its one folder, after looking at every header."""
    infos, size = archive.infolist(), path.stat().st_size
    if not 0 < len(infos) <= MAX_ENTRIES:
        raise InvalidInput(f"{path}: {len(infos):,} entries; at most {MAX_ENTRIES:,} are read")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InvalidInput(
                f"{path}: entry {info.filename!r:.80} is compressed, which torch.save never does"
            )
        if info.flag_bits & 1 or info.is_dir() or not name or ".." in name or name in entries:
            raise InvalidInput(f"{path}: entry {info.filename!r:.80} is not one that torch.save writes")
        if info.external_attr >> 16 & 0o170000 == 0o120000:
            raise InvalidInput(f"{path}: entry {info.filename!r:.80} is a link")
        entries[name] = info
    if sum(info.file_size for info in infos) > size:
        raise InvalidInput(f"{path}: its entries claim more than its {size:,} bytes")
    if "data.pkl" not in entries or any(name.startswith("code/") for name in entries):
        raise InvalidInput(f"{path}: not a dictionary of tensors saved with torch.save")
    if (length := entries["data.pkl"].file_size) > MAX_PICKLE_BYTES:
        raise InvalidInput(f"{path}: {length:,} bytes of pickle; at most {MAX_PICKLE_BYTES:,} are read")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise InvalidInput(f"{path}: its numbers are not little-endian")
    return entries


def _interpret(program: bytes, path: Path) -> dict[str, _Strided]:
    """The dictionary that the pickle describes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in texts that are refused anyway
            value = _Machine().run(program)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{path}: not a plain dictionary of tensors ({error})") from error
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise InvalidInput(f"{path}: expected a dictionary of tensors, found {type(value).__name__}")
    if odd := [name for name, tensor in value.items() if not isinstance(tensor, _Strided)]:
        raise InvalidInput(f"{path}: {', '.join(odd)[:200]} are not tensors")
    return value


class _Machine:
    """Follows the instructions of a pickle that put dictionaries, tuples, names and numbers together."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("no end")

    def _step(self, code: str, argument: Any) -> None:
        stack = self.stack
        match code:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(code[-1]))))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_Name(*argument.split(" ")))
            case "STACK_GLOBAL":
                stack.append(_Name(*self._pop(2)))
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                stack.append(_called(*self._pop(2)))
            case "BUILD":  # the versions that a module's state dictionary carries along
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError(f"state for {stack[-1]!r:.80}")
            case _:
                raise ValueError(f"instruction {code}, which plain dictionaries of tensors do not need")

    def _pop(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise ValueError("an empty stack")
        taken = self.stack[-n:]
        del self.stack[-n:]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _set(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or len(pairs) % 2:
            raise ValueError("items for what is no dictionary")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))


def _storage(description: Any) -> _Storage:
    match description:
        case ("storage", _Name("torch", kind), str(key), str(), int(length)) if (
            kind in DTYPES and length >= 0
        ):
            return _Storage(key, DTYPES[kind], length)
    raise ValueError(f"storage {description!r:.120}")


def _called(function: Any, arguments: Any) -> Any:
    """What the three functions of torch.save's dictionaries would give."""
    match function, arguments:
        case _Name("collections", "OrderedDict"), ():
            return {}
        case _Name("torch._utils", "_rebuild_tensor_v2"), (
            _Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            *_,
        ):
            return _Strided(storage, offset, shape, stride)
        case _Name("torch._utils", "_rebuild_parameter"), (_Strided() as tensor, *_):
            return tensor
        case _Name(module, name), _:
            raise ValueError(f"it calls {module}.{name}"[:200])
    raise ValueError("it calls something unnamed")


def _tensor(
    name: str,
    strided: _Strided,
    archive: zipfile.ZipFile,
    entries: dict[str, zipfile.ZipInfo],
    read: dict[str, Tensor],
    path: Path,
) -> Tensor:
    """One tensor, from its storage's bytes, which are read once."""
    storage, offset, shape, stride = strided
    if len(shape) != len(stride) or any(not isinstance(n, int) or n < 0 for n in (offset, *shape, *stride)):
        raise InvalidInput(f"{path}: tensor {name!r:.80} has shape {shape!r:.80} and strides {stride!r:.80}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and max(last + 1, math.prod(shape)) > storage.length:
        raise InvalidInput(f"{path}: tensor {name!r:.80} of shape {list(shape)} reaches beyond its storage")
    if storage.key not in read:
        info = entries.get(f"data/{storage.key}")
        if info is None or info.file_size != storage.length * storage.dtype.itemsize:
            raise InvalidInput(
                f"{path}: the bytes of tensor {name!r:.80} are missing, or not as many as it says"
            )
        read[storage.key] = _bytes(archive, info)
    tensor = read[storage.key].view(storage.dtype).as_strided(shape, stride, offset)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InvalidInput(f"{path}: tensor {name!r:.80} holds NaN or infinite values")
    return tensor


def _bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    """[n] uint8, in chunks, so that it is in memory once. The zip's checksum is compared on the way."""
    data = np.empty(info.file_size, dtype=np.uint8)
    start = 0
    with archive.open(info) as file:
        while chunk := file.read(2**24):
            data[start : start + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
            start += len(chunk)
    if start != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} ends early")
    return torch.from_numpy(data)
