"""How well a prediction fits: Pearson r and AUC of many groups at once, and the figures of a yes-or-no judge.

A figure that does not exist (one class only, a constant) is NaN here and null in the tables: never 0, never ½.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]


def pearson(group: NDArray[Any], a: NDArray[Any], b: NDArray[Any], groups: int) -> Figures:
    """[groups] Pearson r of a and b [n] within each group (`group` [n]: its number)."""
    n = np.bincount(group, minlength=groups)
    centred = []
    for x in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        mean = np.bincount(group, x, minlength=groups) / np.maximum(1, n)
        centred.append(x - mean[group])
    x, y = centred
    xx, yy, xy = (np.bincount(group, z, minlength=groups) for z in (x * x, y * y, x * y))
    there = _varies(group, a, groups) & _varies(group, b, groups) & (xx > 0) & (yy > 0)
    r = np.full(groups, np.nan)
    r[there] = (xy[there] / np.sqrt(xx[there]) / np.sqrt(yy[there])).clip(-1, 1)
    return r


def _varies(group: NDArray[Any], x: NDArray[Any], groups: int) -> NDArray[np.bool_]:
    """Whether a group holds two values: a mean's rounding would make a constant vary."""
    first = np.zeros(groups, np.asarray(x).dtype)
    first[group[::-1]] = x[::-1]
    return np.bincount(group, x != first[group], minlength=groups) > 0


def auc(group: NDArray[Any], score: NDArray[Any], fires: NDArray[Any], groups: int) -> Figures:
    """[groups] chance that what fires is scored above what does not, ties counting half, within each group."""
    score, fires = np.asarray(score, np.float64), np.asarray(fires, bool)
    order = np.lexsort((score, group))
    group, score, fires = group[order], score[order], fires[order]
    n = np.bincount(group, minlength=groups)
    before = np.cumsum(n) - n
    new = np.ones(len(group), bool)
    new[1:] = (group[1:] != group[:-1]) | (score[1:] != score[:-1])
    starts = np.flatnonzero(new)
    lengths = np.diff(np.append(starts, len(group)))
    rank = np.repeat(starts + (lengths + 1) / 2, lengths) - before[group]  # from 1; ties share the middle one
    positive = np.bincount(group, fires, minlength=groups)
    negative = n - positive
    ranks = np.bincount(group, rank * fires, minlength=groups)
    found = np.full(groups, np.nan)
    there = (positive > 0) & (negative > 0)
    above = ranks[there] - positive[there] * (positive[there] + 1) / 2
    found[there] = above / (positive[there] * negative[there])
    return found


def balanced_accuracy(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """(TPR + TNR) / 2; NaN unless both classes are there."""
    if true.all() or not true.any():
        return float("nan")
    return (float(said[true].mean()) + float((~said[~true]).mean())) / 2


def f1(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN); NaN unless both classes are there."""
    if true.all() or not true.any():
        return float("nan")
    return 2 * float((said & true).sum()) / float(said.sum() + true.sum())
