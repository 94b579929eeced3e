"""Directions as files: safetensors with metadata, GGUF control vectors, JSON lists of numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import (
    MAX_JSON_BYTES,
    existing,
    read_metadata,
    read_tensors,
    replacing,
    write_tensors,
)
from saekit.steering import gguf

BEFORE = re.compile(r"blocks\.([0-9]+)\.hook_resid_pre")
FORMAT = "saekit direction 1"
ABOUT = ("site", "label", "source", "model", "model_hash")


def write_direction(path: Path, vector: Tensor, about: Mapping[str, str | None]) -> Path:
    """A safetensors file with the tensor `vector` [D] float32 and what is known about it; the old file or the new one."""
    if path.suffix != ".safetensors":
        raise InvalidInput(f"direction: {path} does not end with .safetensors")
    metadata = {"format": FORMAT} | {key: value for key, value in about.items() if value}
    with replacing(path) as building:
        write_tensors(building, {"vector": vector}, metadata)
    return path


def read_direction(path: Path, site: str | None) -> dict[str, Any]:
    """The fields of the `Direction` in a file. Raises `FileMissing`, `InvalidInput`."""
    existing(path, "direction")
    if path.suffix == ".gguf":
        return _gguf(path, site)
    if path.suffix == ".json":
        found: dict[str, Any] = {"vector": _json(path)}
    elif path.suffix == ".safetensors":
        found = {"vector": _safetensors(path)}
        metadata = read_metadata(path)
        found |= {key: metadata[key] for key in ABOUT if key in metadata}
    else:
        raise InvalidInput(f"direction: {path} is no .safetensors, .gguf or .json file")
    said = found.get("site")
    if site is not None and said is not None and site != said:
        raise InvalidInput(f"{path}: a direction at {said}, not at {site}")
    if site is None and said is None:
        raise InvalidInput(f"{path} does not say its site: site='blocks.2.hook_resid_pre', for instance")
    return {"label": path.stem, "source": f"file {path.name}"} | found | {"site": site or said}


def _safetensors(path: Path) -> Tensor:
    tensors = read_tensors(path)
    vectors = [tensor for tensor in tensors.values() if tensor.ndim == 1 and tensor.is_floating_point()]
    if len(vectors) != 1:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:5])
        raise InvalidInput(f"{path}: expected one vector [D], found {shapes or 'nothing'}")
    return vectors[0]


def _json(path: Path) -> Tensor:
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise InvalidInput(f"{path}: {size:,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read")
    try:
        numbers = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not valid JSON ({error})") from error
    if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
        raise InvalidInput(f"{path}: expected a list of numbers")
    try:
        return torch.tensor(numbers, dtype=torch.float32)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise InvalidInput(f"{path}: numbers that no float holds ({error})") from error


def _gguf(path: Path, site: str | None) -> dict[str, Any]:
    """One block's direction of a control vector: direction.N acts on the stream after block N, before block N + 1."""
    held = gguf.read(path)
    places = {f"blocks.{n}.hook_resid_post": n for n in held.directions}
    if site is None:
        if len(places) > 1:
            raise InvalidInput(
                f"{path}: a direction for each of {len(places)} blocks; name one, site={min(places)!r}"
            )
        (site,) = places
    n = places.get(site)
    if n is None and (found := BEFORE.fullmatch(site)):
        n = places.get(f"blocks.{int(found[1]) - 1}.hook_resid_post")
    if n is None:
        raise InvalidInput(f"{path}: no direction at {site}; it holds {', '.join(places)}")
    return {
        "vector": held.directions[n] / held.strengths.get(n, 1.0),
        "site": site,
        "label": f"{path.stem} {n}",
        "source": f"control vector {path.name}",
        "model": held.model,
        "model_hash": held.model_hash,
    }
