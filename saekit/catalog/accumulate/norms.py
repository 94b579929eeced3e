"""How large the activations at the site are: a sample for the median, and a fine histogram that finds the sinks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import Batch, Floats
from saekit.catalog.accumulate.lowest import FREE

SAMPLE = 1 << 16  # tokens
CELLS = 1 << 19  # of the bits of a float32 from its sign down: 1/2048 of an octave, or finer


class Norms:
    """The norms of the SAMPLE evaluated tokens of lowest draw, and counts of all."""

    def __init__(self) -> None:
        self.counts = np.zeros(CELLS, np.int64)
        self._draws = np.zeros(0, np.uint64)
        self._norms = np.zeros(0, np.float32)
        self._worst = FREE

    def add(self, batch: Batch) -> None:
        evaluated = ~batch.special.ravel()
        draws, norms = batch.draws[evaluated], batch.norms.ravel()[evaluated]
        np.add.at(self.counts, _cells(norms), 1)
        self._offer(draws, norms)

    def _offer(self, draws: NDArray[np.uint64], norms: Floats) -> None:
        low = draws < self._worst
        self._draws = np.concatenate([self._draws, draws[low]])
        self._norms = np.concatenate([self._norms, norms[low]])
        if len(self._draws) > 2 * SAMPLE:
            self._settle()

    def _settle(self) -> None:
        order = np.argsort(self._draws)[:SAMPLE]
        self._draws, self._norms = self._draws[order], self._norms[order]
        if len(order) == SAMPLE:
            self._worst = self._draws[-1]

    def merge(self, other: Norms) -> None:
        self.counts += other.counts
        self._offer(other._draws, other._norms)

    def median(self) -> float:
        """Of ‖x‖ over the sample; 0 of none."""
        self._settle()
        return float(np.median(self._norms)) if len(self._norms) else 0.0

    def above(self, limit: float) -> int:
        """Evaluated tokens whose norm is above the limit, which counts as up to the end of its cell (1/2048 octave)."""
        return int(self.counts[int(_cells(np.array([limit], np.float32))[0]) + 1 :].sum())

    def arrays(self) -> dict[str, NDArray]:
        self._settle()
        return {"counts": self.counts, "draws": self._draws, "norms": self._norms}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        self.counts, self._draws, self._norms = arrays["counts"], arrays["draws"], arrays["norms"]
        self._settle()


def _cells(norms: Floats) -> NDArray[np.uint32]:
    return np.ascontiguousarray(norms).view(np.uint32) >> np.uint32(12)
