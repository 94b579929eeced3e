"""What a reader of a foreign folder gives, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saekit.errors import InvalidInput
from saekit.sae.model import SAEConfig

Shape = tuple[int, ...]


class Parts(NamedTuple):
    """An SAE as `files.assemble` takes it."""

    config: SAEConfig
    tensors: dict[str, Tensor]
    path: Path  # the file that held them


def check_shapes(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Shape],
    where: Path | str,
    optional: Collection[str] = (),
) -> None:
    """Raises one `InvalidInput` that lists all tensors that are missing, unexpected or of a wrong shape."""
    wrong = [
        f"missing {name} {list(shape)}"
        for name, shape in expected.items()
        if name not in tensors and name not in optional
    ]
    wrong += [
        f"unexpected {name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in expected
    ]
    wrong += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise InvalidInput(f"{where}: " + "; ".join(wrong))


def width(section: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """A whole number from 1 in a foreign configuration."""
    value = section.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInput(f"{where}: {key}: expected a whole number from 1, got {value!r:.80}")
    return value


def flag(section: Mapping[str, Any], key: str, where: Path) -> bool:
    """True or false in a foreign configuration; false where it is not there."""
    value = section.get(key, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{where}: {key}: expected true or false, got {value!r:.80}")
    return value


def known(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that have a value."""
    return {key: value for key, value in metadata.items() if value is not None}
