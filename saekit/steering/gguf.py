"""GGUF control vectors, both ways: the files of llama.cpp (`--control-vector`) and of repeng.

    general.architecture = "controlvector"
    direction.N  [D] float32, N from 1          added to the output of block N, counted from 0

That is llama.cpp's reading (`build_cvec` adds tensor N after block N's last residual sum) and repeng's too: direction.N
acts at `blocks.N.hook_resid_post`, which is `blocks.<N+1>.hook_resid_pre`. Neither has a slot for the output of block 0.
They act on every token, BOS too: `steer(…, include_special=True)` does the same.

A vector has its strength multiplied in, so that llama.cpp at scale 1 does what the edit does; the strength is noted
beside it (`saekit.strength.N`, which others ignore) and comes back with the edit.

Written out here and not with the `gguf` package, whose reader loops as often as a hostile file's counts say. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import existing, replacing
from saekit.lm import model_hash
from saekit.steering.edits import Edit
from saekit.steering.files import flat, made_on

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_BYTES = 256 * 2**20  # a model of 128 blocks and width 16,384 has 8 MiB
MAX_BLOCKS = 4096
MAX_ALIGNMENT = 2**16
ARCHITECTURE = "controlvector"
DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,8})")
PRE, POST = (re.compile(rf"blocks\.(0|[1-9][0-9]{{0,3}})\.hook_resid_{where}") for where in ("pre", "post"))
FLOAT32 = 0  # ggml's number for it
STRING, ARRAY, UINT32, FLOAT64 = 8, 9, 4, 12
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, eq=False)
class ControlVector:
    """What a file holds."""

    directions: dict[int, Tensor] = field(repr=False)  # N → [D] float32, the strength multiplied in
    strengths: dict[int, float] = field(
        default_factory=dict
    )  # N → what was multiplied in, where that is known
    model_hint: str | None = None  # the model's architecture, as whoever wrote it calls it
    model: str | None = None  # name and hash of the model, where saekit wrote it
    model_hash: str | None = None


def save(edits: Edit | Sequence[Edit], path: str | Path, *, model: TransformerBridge) -> Path:
    """Write plain additions to residual streams as a control vector; several at one block are summed.

    Raises `InvalidInput` for any other edit, one that adds nothing, or a site that has no slot in the format.
    """
    directions: dict[int, Tensor] = {}
    strengths: dict[int, list[float]] = {}
    for edit in flat(edits):
        n = _slot(edit, model)
        added = edit.amount * edit.direction.detach().to("cpu", torch.float32)
        directions[n] = directions[n] + added if n in directions else added
        strengths.setdefault(n, []).append(edit.amount)
    if not directions:
        raise InvalidInput("control vector: expected one edit at least, such as feature.add(8.0)")
    config = getattr(model.original_model, "config", None)
    vector = ControlVector(
        directions,
        {n: amounts[0] for n, amounts in strengths.items() if len(amounts) == 1},
        getattr(config, "model_type", None),
        str(model.cfg.model_name),
        model_hash(model),
    )
    return write(vector, path)


def load(path: str | Path, *, model: TransformerBridge) -> list[Edit]:
    """The edits of a control vector: `add` at `blocks.N.hook_resid_post` with the strength it was saved with, else 1.

    Raises `FileMissing`; `InvalidInput` for a broken file, a model of another width or with fewer blocks, and, where
    saekit wrote it, for any other model.
    """
    vector = read(path)
    wrong = made_on(model, vector.model, vector.model_hash)
    if (width := len(next(iter(vector.directions.values())))) != model.cfg.d_model:
        wrong.append(f"width {width}, not {model.cfg.d_model}")
    if (last := max(vector.directions)) >= model.cfg.n_layers:
        wrong.append(
            f"direction.{last}, where {model.cfg.model_name} has blocks 0 … {model.cfg.n_layers - 1}"
        )
    if wrong:
        raise InvalidInput(f"{path} is for another model: {'; '.join(wrong)}")
    edits = []
    for n, direction in sorted(vector.directions.items()):
        strength = vector.strengths.get(n, 1.0)
        d = (direction.double() / strength).float()
        label, site = f"{Path(path).name} {n}", f"blocks.{n}.hook_resid_post"
        edits.append(Edit("add", site, d, strength, label=label, model_hash=vector.model_hash))
    return edits


def _slot(edit: Edit, model: TransformerBridge) -> int:
    """N of the edit's direction."""
    if edit.kind != "add" or edit.condition is not None or edit.positions not in (None, "all"):
        raise InvalidInput(f"control vector: it only adds, everywhere; it cannot hold {edit}")
    if edit.unit == "norm" and edit.norm is None:
        raise InvalidInput(f"control vector: the norm that {edit} counts in is not known, use unit='raw'")
    if edit.amount == 0:
        raise InvalidInput(f"control vector: {edit} adds nothing")
    if len(edit.direction) != model.cfg.d_model:
        raise InvalidInput(
            f"control vector: {edit} has width {len(edit.direction)}, {model.cfg.model_name} {model.cfg.d_model}"
        )
    if found := POST.fullmatch(edit.site):
        n = int(found[1])
    elif found := PRE.fullmatch(edit.site):
        n = int(found[1]) - 1
    else:
        raise InvalidInput(f"control vector: it adds to residual streams between blocks, not at {edit.site}")
    if not 1 <= n < model.cfg.n_layers:
        raise InvalidInput(
            f"control vector: no slot for {edit.site}; the format has the outputs of blocks 1 … {model.cfg.n_layers - 1}"
        )
    return n


# The format


def write(vector: ControlVector, path: str | Path) -> Path:
    """A GGUF file, version 3; the old file or the new one, whatever happens."""
    path = Path(path)
    pairs: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, ARCHITECTURE),
        f"{ARCHITECTURE}.model_hint": (STRING, vector.model_hint),
        f"{ARCHITECTURE}.layer_count": (UINT32, len(vector.directions)),
        "saekit.model": (STRING, vector.model),
        "saekit.model_hash": (STRING, vector.model_hash),
    }
    pairs |= {f"saekit.strength.{n}": (FLOAT64, c) for n, c in sorted(vector.strengths.items())}
    pairs = {key: pair for key, pair in pairs.items() if pair[1] is not None}
    header = b"GGUF" + struct.pack("<IQQ", 3, len(vector.directions), len(pairs))
    for key, (kind, value) in pairs.items():
        header += _string(key) + struct.pack("<I", kind)
        header += _string(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)
    data = b""
    for n, direction in sorted(vector.directions.items()):
        header += _string(f"direction.{n}") + struct.pack("<IQIQ", 1, len(direction), FLOAT32, len(data))
        data += _padded(direction.contiguous().numpy().astype("<f4").tobytes())
    with replacing(path) as building:
        building.write_bytes(_padded(header) + data)
    return path


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(data: bytes, alignment: int = 32) -> bytes:
    return data + bytes(-len(data) % alignment)


def read(path: str | Path) -> ControlVector:
    """A control vector's file. Raises `FileMissing`, and `InvalidInput` for anything else than one."""
    path = existing(path, "control vector")
    if not path.is_file():
        raise InvalidInput(f"{path}: not a file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InvalidInput(f"{path}: {size:,} bytes; a control vector has at most {MAX_BYTES:,}")
    try:
        return _parse(path.read_bytes())
    except _Broken as error:
        raise InvalidInput(f"{path}: not a GGUF control vector: {error}") from error


class _Broken(Exception):
    """What is wrong with a file."""


class _Reader:
    """Reads on through bytes; every read is within them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise _Broken(f"it ends at byte {len(self.data)}, in the midst of something")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise _Broken("a name is no UTF-8") from error

    def value(self) -> Any:
        """A metadata value; arrays, of which control vectors have none of their own, are passed over."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(_code(kind))
        kind, n = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(n):  # as many as there are bytes for, whatever n says
                self.take(self.number("Q"))
        else:
            self.take(n * struct.calcsize(f"<{_code(kind)}"))
        return None


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise _Broken(f"a metadata value of type {kind}")
    return SCALARS[kind]


def _parse(data: bytes) -> ControlVector:
    reader = _Reader(data)
    if reader.take(4) != b"GGUF":
        raise _Broken("it does not start with GGUF")
    if (version := reader.number("I")) not in (2, 3):
        raise _Broken(f"version {version}; expected 2 or 3, little-endian")
    n_tensors, n_pairs = reader.number("Q"), reader.number("Q")
    if not 1 <= n_tensors <= MAX_BLOCKS:
        raise _Broken(f"{n_tensors} tensors; expected 1 to {MAX_BLOCKS}")
    pairs: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = reader.string()
        if key in pairs:
            raise _Broken(f"{key!r:.80} twice")
        pairs[key] = reader.value()
    if (architecture := pairs.get("general.architecture")) != ARCHITECTURE:
        raise _Broken(f"general.architecture is {architecture!r:.80}, not {ARCHITECTURE!r}")
    alignment = pairs.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _Broken(f"general.alignment is {alignment!r:.80}")
    infos = [_info(reader, alignment) for _ in range(n_tensors)]
    start = reader.at + -reader.at % alignment
    directions: dict[int, Tensor] = {}
    for n, width, offset in infos:
        if n in directions:
            raise _Broken(f"direction.{n} twice")
        if width != infos[0][1]:
            raise _Broken(f"directions of width {infos[0][1]} and of width {width}")
        end = start + offset + 4 * width
        if end > len(data):
            raise _Broken(f"direction.{n} ends at byte {end}, the file at byte {len(data)}")
        # a copy in the machine's own order of bytes
        numbers = struct.unpack(f"<{width}f", data[start + offset : end])
        directions[n] = torch.tensor(numbers, dtype=torch.float32)
        if not bool(directions[n].isfinite().all()):
            raise _Broken(f"direction.{n} holds NaN or infinite values")
    return ControlVector(
        directions,
        {n: c for n in directions if (c := _strength(pairs, n)) is not None},
        _text(pairs, f"{ARCHITECTURE}.model_hint"),
        _text(pairs, "saekit.model"),
        _text(pairs, "saekit.model_hash"),
    )


def _info(reader: _Reader, alignment: int) -> tuple[int, int, int]:
    """N, width and offset of a tensor."""
    name, n_dims = reader.string(), reader.number("I")
    found = DIRECTION.fullmatch(name)
    if found is None or not 1 <= int(found[1]) <= MAX_BLOCKS:
        raise _Broken(f"a tensor {name!r:.80}; expected direction.N with N from 1 to {MAX_BLOCKS}")
    if n_dims != 1:
        raise _Broken(f"{name} has {n_dims} dimensions, not 1")
    width, kind, offset = reader.number("Q"), reader.number("I"), reader.number("Q")
    if kind != FLOAT32:
        raise _Broken(f"{name} is of ggml type {kind}; expected {FLOAT32}, float32")
    if not 1 <= width <= MAX_BYTES // 4 or offset % alignment:
        raise _Broken(f"{name} has width {width} at offset {offset}")
    return int(found[1]), width, offset


def _strength(pairs: Mapping[str, Any], n: int) -> float | None:
    strength = pairs.get(f"saekit.strength.{n}")
    if strength is None:
        return None
    if type(strength) is not float or not 1e-30 < abs(strength) < 1e30:
        raise _Broken(f"saekit.strength.{n} is {strength!r:.80}")
    return strength


def _text(pairs: Mapping[str, Any], key: str) -> str | None:
    text = pairs.get(key)
    if text is not None and not isinstance(text, str):
        raise _Broken(f"{key} is {text!r:.80}, no text")
    return text
