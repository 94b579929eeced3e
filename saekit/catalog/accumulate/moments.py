"""How often and how strongly each latent fires: exact sums, the maximum, a log histogram. S d_sae."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import Batch

BINS_PER_DECADE, LOWEST, HIGHEST = 8, -4, 4  # log10 of the activation
BINS = BINS_PER_DECADE * (HIGHEST - LOWEST)


def bin_edges() -> NDArray[np.float64]:
    """[BINS + 1] edges of the histogram; what lies outside is counted in the first and the last bin."""
    return 10.0 ** (LOWEST + np.arange(BINS + 1) / BINS_PER_DECADE)


class Moments:
    """Sums are of whole numbers, v · 2^24 and v² · 2^30 rounded, so that they do not depend on the order of the tokens."""

    def __init__(self, d_sae: int) -> None:
        self.count = np.zeros(d_sae, np.int64)
        self.max = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self._sum = np.zeros(d_sae, np.int64)
        self._squares = np.zeros((2, d_sae), np.int64)  # whole part, and the rest in units of 2^-30

    def add(self, batch: Batch) -> None:
        latents = batch.latents
        squares = batch.values.astype(np.float64) ** 2
        whole = np.floor(squares)
        rest = np.rint((squares - whole) * 2**30).astype(np.int64)
        bins = ((batch.logs - LOWEST) * BINS_PER_DECADE).astype(np.int64).clip(0, BINS - 1)
        self.count += np.diff(batch.starts)
        np.add.at(self._sum, latents, batch.fixed)
        np.add.at(self._squares[0], latents, whole.astype(np.int64))
        np.add.at(self._squares[1], latents, rest)
        np.maximum.at(self.max, latents, batch.values)
        np.add.at(self.histogram.reshape(-1), latents * np.int64(BINS) + bins, 1)

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.histogram += other.histogram
        self._sum += other._sum
        self._squares += other._squares
        np.maximum(self.max, other.max, out=self.max)

    @property
    def sum(self) -> NDArray[np.float64]:
        """[S]"""
        return self._sum / 2**24

    @property
    def sum_squares(self) -> NDArray[np.float64]:
        """[S]"""
        return self._squares[0] + self._squares[1] / 2**30

    def mean(self) -> NDArray[np.float64]:
        """[S] where it fires; 0 where it never did."""
        return self.sum / np.maximum(1, self.count)

    def std(self) -> NDArray[np.float64]:
        """[S] where it fires."""
        return np.sqrt(np.maximum(0, self.sum_squares / np.maximum(1, self.count) - self.mean() ** 2))

    def arrays(self) -> dict[str, NDArray]:
        return {
            "count": self.count,
            "max": self.max,
            "histogram": self.histogram,
            "sum": self._sum,
            "squares": self._squares,
        }

    def restore(self, arrays: dict[str, NDArray]) -> None:
        self.count, self.max, self.histogram = arrays["count"], arrays["max"], arrays["histogram"]
        self._sum, self._squares = arrays["sum"], arrays["squares"]
