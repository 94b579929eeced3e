"""Sorting by small whole numbers, and ragged ranges: what every accumulator does to hundreds of thousands of firings at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Ints = NDArray[Any]


def group(keys: Ints, n: int) -> tuple[Ints, Ints]:
    """(order [len(keys)], starts [n + 1]) of a stable sort by keys in 0 … n − 1, in linear time.

    Group g is `order[starts[g]:starts[g + 1]]`. (A matrix of one row turned by columns: scipy's counting sort.)
    """
    count = len(keys)
    row = (np.arange(count, dtype=np.int32), keys.astype(np.int32), np.array([0, count], np.int32))
    turned = csr_array(row, shape=(1, n)).tocsc()
    return turned.data, turned.indptr


def starts_of(*sorted_keys: Ints) -> Ints:
    """Indices at which a run of equal keys begins, in arrays sorted together."""
    if len(sorted_keys[0]) == 0:
        return np.zeros(0, np.int64)
    new = np.zeros(len(sorted_keys[0]), bool)
    new[0] = True
    for keys in sorted_keys:
        new[1:] |= keys[1:] != keys[:-1]
    return np.flatnonzero(new)


def rank_in_group(sorted_groups: Ints) -> Ints:
    """0, 1, 2 … within each run of equal values of a sorted array."""
    starts = starts_of(sorted_groups)
    n = len(sorted_groups)
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1 … (lengths[0] of them), starts[1] … as one array."""
    lengths = lengths.astype(np.int64)
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)
