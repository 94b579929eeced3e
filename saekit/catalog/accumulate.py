"""What one streaming pass keeps: state of O(S · contexts), never [tokens × S].

Each accumulator takes the non-zero activations of a batch, one `Firings` at a time, and its result depends on the
order of the tokens only where it says so: which of two equal maxima wins is settled by position.

S d_sae, n contexts kept per latent, W window, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

BINS_PER_DECADE, LOWEST, HIGHEST = 8, -4, 4  # log10 of the activation
BINS = BINS_PER_DECADE * (HIGHEST - LOWEST)
PENDING = 1 << 22  # token-table entries merged at once


class Firings(NamedTuple):
    """The non-zero activations of a batch of R corpus rows of T tokens."""

    latents: Ints  # [n]
    values: Floats  # [n]
    rows: Ints  # [n] corpus row, counted over the whole pass
    positions: Ints  # [n] in the row
    token_ids: Ints  # [n]
    documents: Ints  # [n]


class Moments:
    """Count, sum, sum of squares, maximum and log histogram per latent."""

    def __init__(self, d_sae: int) -> None:
        self.count = np.zeros(d_sae, np.int64)
        self.sum = np.zeros(d_sae)
        self.sum_squares = np.zeros(d_sae)
        self.max = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, BINS), np.int64)

    def add(self, firings: Firings) -> None:
        latents, values = firings.latents, firings.values.astype(np.float64)
        S = len(self.count)
        self.count += np.bincount(latents, minlength=S)
        self.sum += np.bincount(latents, values, minlength=S)
        self.sum_squares += np.bincount(latents, values**2, minlength=S)
        np.maximum.at(self.max, latents, firings.values)
        bins = ((np.log10(values) - LOWEST) * BINS_PER_DECADE).astype(np.int64).clip(0, BINS - 1)
        self.histogram += np.bincount(latents * BINS + bins, minlength=S * BINS).reshape(S, BINS)

    def mean(self) -> NDArray[np.float64]:
        return self.sum / np.maximum(1, self.count)

    def std(self) -> NDArray[np.float64]:
        return np.sqrt(np.maximum(0, self.sum_squares / np.maximum(1, self.count) - self.mean() ** 2))


def bin_edges() -> NDArray[np.float64]:
    """[BINS + 1] edges of the histogram."""
    return 10.0 ** (LOWEST + np.arange(BINS + 1) / BINS_PER_DECADE)


class TokenTable:
    """Count and summed activation per (latent, token id) that occurs."""

    def __init__(self, vocabulary: int) -> None:
        self._V = vocabulary
        self._keys: list[Ints] = []
        self._counts: list[Ints] = []
        self._sums: list[NDArray[Any]] = []
        self._pending = 0

    def add(self, firings: Firings) -> None:
        keys, inverse = np.unique(firings.latents * self._V + firings.token_ids, return_inverse=True)
        self._keys.append(keys)
        self._counts.append(np.bincount(inverse, minlength=len(keys)))
        self._sums.append(np.bincount(inverse, firings.values.astype(np.float64), minlength=len(keys)))
        self._pending += len(keys)
        if self._pending > PENDING:
            self._merge()

    def _merge(self) -> None:
        if not self._keys:
            return
        keys, inverse = np.unique(np.concatenate(self._keys), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate(self._counts), minlength=len(keys)).astype(np.int64)
        sums = np.bincount(inverse, np.concatenate(self._sums), minlength=len(keys))
        self._keys, self._counts, self._sums = [keys], [counts], [sums]
        self._pending = 0

    def top(self, per_latent: int, at_least: int) -> tuple[Ints, Ints, Ints, Ints, NDArray[np.float64]]:
        """(latents, ranks, token ids, counts, sums), the highest mean activation first, latents ascending.

        Only tokens with `at_least` occurrences count: one firing says little about a token.
        """
        self._merge()
        if not self._keys:
            empty = np.zeros(0, np.int64)
            return empty, empty, empty, empty, np.zeros(0)
        keys, counts, sums = self._keys[0], self._counts[0], self._sums[0]
        enough = counts >= at_least
        keys, counts, sums = keys[enough], counts[enough], sums[enough]
        latents, ids = keys // self._V, keys % self._V
        order = np.lexsort((ids, -sums / counts, latents))
        latents, ids, counts, sums = latents[order], ids[order], counts[order], sums[order]
        ranks = rank_in_group(latents)
        kept = ranks < per_latent
        return latents[kept], ranks[kept], ids[kept], counts[kept], sums[kept]


class TopContexts:
    """Per latent, the n strongest contexts, at most one per document, with the activations around each peak."""

    def __init__(self, d_sae: int, n: int, window: int) -> None:
        self.n, self.window = n, window
        self.before = (
            window * 5 // 8
        )  # tokens kept before the peak: what led to it says more than what follows
        self.value = np.zeros((d_sae, n), np.float32)  # 0: no context yet
        self.document = np.full((d_sae, n), -1, np.int64)
        self.row = np.full((d_sae, n), -1, np.int64)
        self.peak = np.zeros((d_sae, n), np.int64)  # position in the row
        self.start = np.zeros((d_sae, n), np.int64)  # of the window, in the row
        self.length = np.zeros((d_sae, n), np.int64)
        self.activations = np.zeros((d_sae, n, window), np.float32)

    def add(self, firings: Firings, documents: Ints, first_row: int, special: NDArray[np.bool_]) -> None:
        """documents, special: [R, T] of the batch, whose first corpus row is `first_row`."""
        found = self._candidates(firings)
        if len(found) == 0:
            return
        latents = firings.latents[found]
        start, length = self._windows(firings, found, documents, first_row, special)
        around = self._around(firings, found, start, length, documents.shape[1])
        touched, inverse = np.unique(latents, return_inverse=True)
        # What is there already and what is new compete as one list, sorted by latent, then strength.
        slots = np.repeat(np.arange(len(touched)), self.n)
        group = np.concatenate([slots, inverse])
        value = np.concatenate([self.value[touched].ravel(), firings.values[found]])
        document = np.concatenate([self.document[touched].ravel(), firings.documents[found]])
        row = np.concatenate([self.row[touched].ravel(), firings.rows[found]])
        peak = np.concatenate([self.peak[touched].ravel(), firings.positions[found]])
        starts = np.concatenate([self.start[touched].ravel(), start])
        lengths = np.concatenate([self.length[touched].ravel(), length])
        acts = np.concatenate([self.activations[touched].reshape(-1, self.window), around])
        kept = self._strongest(group, value, document, row, peak)
        rank = rank_in_group(group[kept])
        kept, rank = kept[rank < self.n], rank[rank < self.n]
        place = (touched[group[kept]], rank)
        for name in ("value", "length"):
            getattr(self, name)[touched] = 0
        for name, new in (
            ("value", value), ("document", document), ("row", row), ("peak", peak),
            ("start", starts), ("length", lengths), ("activations", acts),
        ):  # fmt: skip
            getattr(self, name)[place] = new[kept]

    def _candidates(self, firings: Firings) -> Ints:
        """Indices of firings that are the strongest of their document and could enter the list."""
        strong = np.flatnonzero(firings.values > self.value[firings.latents, -1])
        order = strong[
            np.lexsort(
                (
                    firings.positions[strong],
                    firings.rows[strong],
                    -firings.values[strong],
                    firings.documents[strong],
                    firings.latents[strong],
                )
            )
        ]
        latents, documents = firings.latents[order], firings.documents[order]
        first = np.ones(len(order), bool)
        first[1:] = (latents[1:] != latents[:-1]) | (documents[1:] != documents[:-1])
        return order[first]

    @staticmethod
    def _strongest(group: Ints, value: Floats, document: Ints, row: Ints, peak: Ints) -> Ints:
        """Order by (group, strongest first), keeping one per document and dropping empty places."""
        real = np.flatnonzero(value > 0)
        order = real[np.lexsort((peak[real], row[real], -value[real], document[real], group[real]))]
        first = np.ones(len(order), bool)
        first[1:] = (group[order][1:] != group[order][:-1]) | (document[order][1:] != document[order][:-1])
        best = order[first]
        return best[np.lexsort((peak[best], row[best], -value[best], group[best]))]

    def _windows(
        self, firings: Firings, found: Ints, documents: Ints, first_row: int, special: NDArray[np.bool_]
    ) -> tuple[Ints, Ints]:
        """(start, length) of the window around each peak, inside its document and clear of special tokens."""
        R, T = documents.shape
        # A stretch ends where the document changes or a special token stands.
        breaks = np.ones((R, T), bool)
        breaks[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | special[:, 1:] | special[:, :-1]
        columns = np.arange(T)
        begins = np.maximum.accumulate(np.where(breaks, columns, 0), axis=1)
        flipped = np.where(np.roll(breaks, -1, axis=1), columns + 1, T)
        flipped[:, -1] = T
        ends = np.minimum.accumulate(flipped[:, ::-1], axis=1)[:, ::-1]
        at = (firings.rows[found] - first_row, firings.positions[found])
        start = np.maximum(begins[at], at[1] - self.before)
        end = np.minimum(ends[at], start + self.window)
        return start, end - start

    def _around(self, firings: Firings, found: Ints, start: Ints, length: Ints, T: int) -> Floats:
        """[len(found), W] activations of each candidate's latent over its window."""
        corpus = int(firings.rows.max() + 1) * T
        keys = firings.latents * corpus + firings.rows * T + firings.positions
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], firings.values[order]
        offsets = np.arange(self.window)
        wanted = (firings.latents[found] * corpus + firings.rows[found] * T + start)[:, None] + offsets
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        inside = offsets < length[:, None]
        return np.where((keys[at] == wanted) & inside, values[at], 0).astype(np.float32)


def rank_in_group(sorted_groups: Ints) -> Ints:
    """0, 1, 2 … within each run of equal values of a sorted array."""
    if len(sorted_groups) == 0:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]])
    return np.arange(len(sorted_groups)) - np.repeat(starts, np.diff(np.r_[starts, len(sorted_groups)]))
