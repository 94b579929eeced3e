"""Which latents fire on the same tokens, estimated from sketches (bottom-k; Cohen & Kaplan 2007).

Per latent the m lowest draws of the tokens on which it fires: a uniform sample of them that two latents take in the same way, so
that tokens of both are in both samples. With τ the smaller of the two samples' largest draws, all tokens of either up to τ are known:

    J = |S_i ∩ S_j| / (a_i + a_j − |S_i ∩ S_j|),   a = elements of a sketch up to τ

S d_sae, m draws per sketch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from saekit.catalog.accumulate.batch import Batch
from saekit.catalog.accumulate.grouping import Ints, group, ranges, rank_in_group, starts_of
from saekit.catalog.accumulate.lowest import FREE

SKETCH = 256
PENDING = 1 << 19  # draws that wait
AT_ONCE = 1 << 19  # numbers sorted at once


class Neighbours(NamedTuple):
    """Sorted by feature and rank."""

    feature: Ints
    rank: Ints
    neighbour: Ints
    similarity: NDArray[np.float64]


class Sketches:
    """m lowest draws per latent, sorted."""

    def __init__(self, d_sae: int, m: int = SKETCH) -> None:
        self.draws = np.full((d_sae, m), FREE)
        self._latents: list[Ints] = []
        self._new: list[NDArray[np.uint64]] = []
        self._pending = 0

    def add(self, batch: Batch) -> None:
        draws = batch.draws[batch.tokens]
        low = np.flatnonzero(draws < self.draws[batch.latents, -1])
        self._offer(batch.latents[low], draws[low])

    def _offer(self, latents: Ints, draws: NDArray[np.uint64]) -> None:
        self._latents.append(latents)
        self._new.append(draws)
        self._pending += len(latents)
        if self._pending >= PENDING:
            self.settle()

    def settle(self) -> None:
        """Take in what waits, latents of equally many new draws together."""
        if not self._pending:
            return
        S, m = self.draws.shape
        latents, draws = np.concatenate(self._latents), np.concatenate(self._new)
        self._latents, self._new, self._pending = [], [], 0
        order, starts = group(latents, S)
        latents, draws = latents[order], draws[order]
        slots = m + rank_in_group(latents)
        size = np.diff(starts)
        touched = np.flatnonzero(size)
        touched = touched[np.argsort(size[touched], kind="stable")]
        first = 0
        while first < len(touched):
            # The widest of the rows is the last one.
            widths = (m + size[touched[first:]]) * np.arange(1, len(touched) - first + 1)
            last = first + max(1, int(np.searchsorted(widths, AT_ONCE, "right")))
            some = touched[first:last]
            rows = np.full((len(some), m + int(size[some[-1]])), FREE)
            rows[:, :m] = self.draws[some]
            own = ranges(starts[some], size[some])
            rows[np.repeat(np.arange(len(some)), size[some]), slots[own]] = draws[own]
            rows.sort(axis=1)
            self.draws[some] = rows[:, :m]
            first = last

    def merge(self, other: Sketches) -> None:
        other.settle()
        self.settle()
        for i in range(0, len(self.draws), AT_ONCE // self.draws.shape[1]):
            block = slice(i, i + AT_ONCE // self.draws.shape[1])
            both = np.concatenate([self.draws[block], other.draws[block]], axis=1)
            both.sort(axis=1)
            self.draws[block] = both[:, : self.draws.shape[1]]

    def neighbours(self, k: int, count: Ints) -> Neighbours:
        """Up to k latents of the highest J above 0 for each, equal ones by their number. count: [S] firings."""
        self.settle()
        none = np.zeros(0, np.int64)
        parts = [Neighbours(none, none, none, np.zeros(0)), *self._nearest(k, count)]
        return Neighbours(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _nearest(self, k: int, count: Ints) -> Iterator[Neighbours]:
        S, m = self.draws.shape
        size = (self.draws != FREE).sum(1)
        tokens = np.zeros(0, np.uint64)
        step = AT_ONCE // m
        for i in range(0, S, step):
            found = np.sort(np.append(tokens, self.draws[i : i + step]))
            tokens = found[starts_of(found)]
        indptr = np.append(0, np.cumsum(size))
        # Tokens by their place in the order of draws: small numbers, ordered as the draws are. (FREE has a place too.)
        columns = np.empty(indptr[-1], np.int32)
        for s, row in enumerate(self.draws):
            columns[indptr[s] : indptr[s + 1]] = np.searchsorted(tokens, row[: size[s]])
        sketches = csr_array((np.ones(len(columns), np.int16), columns, indptr), shape=(S, len(tokens)))
        by_token = sketches.T.tocsr()
        last = np.append(columns, 0)[np.maximum(indptr[1:] - 1, 0)]
        limit = np.where(count > m, last, len(tokens))  # up to here a sketch tells all
        for i, block in _blocks(sketches, by_token):
            common = block @ by_token
            local = np.repeat(np.arange(block.shape[0]), np.diff(common.indptr))
            other, both = common.indices, common.data
            least = self._least(local, both, block.shape[0], k)
            # The sketch that ends first lies within τ, so that J ≤ |S_i ∩ S_j| / its size.
            ends_first = np.where(limit[other] < limit[local + i], size[other], size[local + i])
            possible = (both >= least[local] * ends_first) & (other != local + i)
            own, other, both = local[possible] + i, other[possible], both[possible].astype(np.int64)
            up_to = np.minimum(limit[own], limit[other])
            a = _up_to(columns, indptr, size, own, up_to)
            b = _up_to(columns, indptr, size, other, up_to)
            similarity = both / (a + b - both)
            order = np.lexsort((other, -similarity, own))
            rank = rank_in_group(own[order])
            order, rank = order[rank < k], rank[rank < k]
            yield Neighbours(own[order], rank, other[order].astype(np.int64), similarity[order])

    def _least(self, rows: Ints, both: Ints, n: int, k: int) -> NDArray[np.float64]:
        """[n] a bound that at least k similarities of each row reach: sketches hold up to m, so J ≥ both / (2m − both)."""
        m = self.draws.shape[1]
        pairs = np.bincount(rows * np.int64(m + 1) + both, minlength=n * (m + 1)).reshape(n, m + 1)
        reached = np.cumsum(pairs[:, ::-1], axis=1)[:, ::-1] > k  # by more than k, as a row also meets itself
        common = reached.sum(1) - 1  # the largest number that more than k pairs reach; −1: fewer pairs
        return np.maximum(0, common) / (2 * m - np.maximum(0, common)) * (1 - 1e-12)

    def arrays(self) -> dict[str, NDArray]:
        self.settle()
        return {"draws": self.draws}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        self.draws = arrays["draws"]


def _blocks(sketches: csr_array, by_token: csr_array) -> Iterator[tuple[int, csr_array]]:
    """(first latent, rows) such that the product of rows with all stays around AT_ONCE numbers."""
    ends = np.append(0, np.cumsum(sketches @ np.diff(by_token.indptr).astype(np.int64)))
    first = 0
    while first < sketches.shape[0]:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + AT_ONCE, "right")) - 1)
        yield first, sketches[first:last]
        first = last


def _up_to(columns: Ints, indptr: Ints, size: Ints, rows: Ints, limit: Ints) -> Ints:
    """How many of each row's sorted columns are ≤ its limit: a binary search in all rows at once."""
    low, high = np.zeros(len(rows), np.int64), size[rows].astype(np.int64)
    start = indptr[rows]
    while len(open_ := np.flatnonzero(low < high)):
        middle = (low[open_] + high[open_]) // 2
        below = columns[start[open_] + middle] <= limit[open_]
        low[open_[below]] = middle[below] + 1
        high[open_[~below]] = middle[~below]
    return low
