"""Folders that other libraries write: dictionary_learning's and sparsify's.

A reader turns a folder into `Parts`: the configuration and the tensors of the SAE that computes the same function,
under the names and in the shapes of the SAELens layout. What has no counterpart here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from saekit.sae.foreign import dictionary_learning, sparsify
from saekit.sae.foreign.parts import Parts

READERS: tuple[tuple[tuple[str, str], Callable[[Path], Parts]], ...] = (
    ((dictionary_learning.CONFIG, dictionary_learning.WEIGHTS), dictionary_learning.read),
    ((sparsify.CONFIG, sparsify.WEIGHTS), sparsify.read),
)


def reader(folder: Path) -> Callable[[Path], Parts] | None:
    """The reader whose files lie in the folder, or None."""
    for files, read in READERS:
        if all((folder / file).is_file() for file in files):
            return read
    return None


__all__ = ["Parts", "reader"]
