"""Chance without a state: a number for each thing that could be drawn, the same in every order, on every machine.

What is kept is what has the lowest number; so a sample of a union is found in the samples of its parts, and a build in parts, or
one that was stopped, keeps what a whole one would.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EXPLAINING = 0x5EED  # sets documents apart from rows, which are numbered alike


def draw(*numbers: Any) -> NDArray[np.uint64]:
    """A uniform 64-bit number for each tuple of whole numbers (arrays of one shape): SplitMix64, Steele 2014, chained."""
    with np.errstate(over="ignore"):
        z = np.zeros(np.broadcast_shapes(*(np.shape(n) for n in numbers)), np.uint64)
        for number in numbers:
            z = z + np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        return z


def explains(documents: Any) -> NDArray[np.bool_]:
    """Whether a document is one of the half from which explanations are made; they are scored on the others."""
    return draw(EXPLAINING, documents) & np.uint64(1) == 0
