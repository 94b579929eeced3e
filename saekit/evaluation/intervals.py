"""Sums per document, and confidence intervals from them: documents are resampled, never tokens.

Tokens of one document are alike, so an interval over tokens would be far too narrow. A figure is made of sums over
documents; a resample gives each document a weight, so all resamples of all sums are matrix products, and one set of
formulas turns sums into figures, for the data (every weight 1) as for each resample.

M documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

Sums = Mapping[str, Tensor]  # each [.., M or R, …]
Figures = Callable[[Sums], dict[str, Tensor]]

LEVEL = 0.95
RESAMPLES = 1000
WEIGHTS_AT_ONCE = 2**23  # float64 weights held, 64 MiB


class DocumentSums:
    """Named sums per document, float64, gathered batch by batch. Memory grows with documents, not with tokens."""

    def __init__(self) -> None:
        self._documents: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._rows = self._merged = 0

    def add(self, documents: Tensor, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """documents: [n] numbers. values: per name a mask [n], and what each token under it adds, [m, …]."""
        numbers, where = documents.unique(return_inverse=True)
        for name, (mask, value) in values.items():
            sums = torch.zeros(len(numbers), *value.shape[1:], dtype=torch.float64)
            self._sums.setdefault(name, []).append(sums.index_add_(0, where[mask], value.cpu().double()))
        self._documents.append(numbers)
        self._rows += len(numbers)
        if self._rows > 2 * self._merged + 1024:  # contexts of one document may lie in several batches
            self._merge()

    def _merge(self) -> None:
        numbers, where = torch.cat(self._documents).unique(return_inverse=True)
        for name, parts in self._sums.items():
            rows = torch.cat(parts)
            self._sums[name] = [rows.new_zeros(len(numbers), *rows.shape[1:]).index_add_(0, where, rows)]
        self._documents = [numbers]
        self._rows = self._merged = len(numbers)

    def per_document(self) -> dict[str, Tensor]:
        """[M, …] per name, in the order of the documents' numbers; empty when nothing was added."""
        if self._documents:
            self._merge()
        return {name: parts[0] for name, parts in self._sums.items()}


def totals(per_document: Sums, weights: Tensor) -> dict[str, Tensor]:
    """Sums [R, …] under R weightings of the documents, weights [R, M] float64."""
    return {
        name: (weights @ rows.flatten(1) if rows.ndim > 1 else weights @ rows).reshape(-1, *rows.shape[1:])
        for name, rows in per_document.items()
    }


def bootstrap(
    per_document: Sums, figures: Figures, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of figures under resampling of documents (Efron 1979) → {figure: (low, high)}.

    per_document: {name: [M, …]} sums. figures: {name: [R, …]} sums → {figure: [R]}; a resample in which a figure is
    not a number (nothing to divide by) is left out of that figure's interval.

    With fewer than two documents there is nothing to resample, and the answer is empty. Percentile intervals are a
    little narrow with few documents: of a mean over 10 about 90 % hold the truth, from 50 on about 94 %.
    """
    m = min((len(rows) for rows in per_document.values()), default=0)
    if m < 2:
        return {}
    draw = np.random.default_rng(seed)
    at_once = max(1, WEIGHTS_AT_ONCE // m)
    drawn: dict[str, list[Tensor]] = {}
    for start in range(0, resamples, at_once):
        counts = draw.multinomial(m, np.full(m, 1 / m), size=min(at_once, resamples - start))
        for name, values in figures(totals(per_document, torch.from_numpy(counts).double())).items():
            drawn.setdefault(name, []).append(values)
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    intervals = {}
    for name, parts in drawn.items():
        low, high = torch.cat(parts).nanquantile(tail).tolist()
        if low == low:
            intervals[name] = (low, high)
    return intervals
