"""Where in the corpus a pass stands.

Every process of a build reads the whole corpus, unit by unit, looks at its own units, and hashes all of them: a build that
goes on, and parts that are merged, have seen the same text to the last id.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Position:
    """Before a unit: all units before it have been read."""

    units: int = 0
    rows: int = 0
    tokens: int = 0  # evaluated
    context_size: int = 0
    digest: str = ""  # of all token ids and document numbers, unit by unit

    def after(self, ids: NDArray[np.int64], documents: NDArray[np.int64], evaluated: int) -> Position:
        """Behind a unit of R rows of T tokens: ids and documents [R, T], of which so many tokens are evaluated."""
        digest = hashlib.blake2b(self.digest.encode(), digest_size=16)
        for numbers in (ids, documents):
            digest.update(f"{numbers.shape}".encode())
            digest.update(np.ascontiguousarray(numbers, "<i8").data)
        return Position(
            self.units + 1, self.rows + len(ids), self.tokens + evaluated, ids.shape[1], digest.hexdigest()
        )
