from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.catalog.explain.measures import auc, balanced_accuracy, f1, pearson

POINTS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0, 7.5]), st.floats(0, 10, width=32)),
    max_size=40,
)


def slow_pearson(a: list[float], b: list[float]) -> float:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    ma, mb = math.fsum(a) / len(a), math.fsum(b) / len(b)
    top = math.fsum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return (
        top / math.sqrt(math.fsum((x - ma) ** 2 for x in a)) / math.sqrt(math.fsum((y - mb) ** 2 for y in b))
    )


def slow_auc(score: list[float], fires: list[bool]) -> float:
    pairs = [
        (x > y) + (x == y) / 2
        for x, yes in zip(score, fires, strict=True)
        for y, no in zip(score, fires, strict=True)
        if yes and not no
    ]
    return sum(pairs) / len(pairs) if pairs else math.nan


@given(POINTS)
def test_many_groups_at_once_are_each_group_alone(points) -> None:
    group, a, b = (np.array(x) for x in zip(*points, strict=True)) if points else (np.zeros(0, int),) * 3
    r, area = pearson(group, a, b, 4), auc(group, a, b > 1, 4)
    for g in range(4):
        xs, ys = a[group == g].tolist(), b[group == g].tolist()
        if not np.ptp(ys or [0]) < 1e-30:  # whose square is not a float any more
            np.testing.assert_allclose(r[g], slow_pearson(xs, ys), atol=1e-6)
        np.testing.assert_allclose(area[g], slow_auc(xs, [y > 1 for y in ys]), atol=1e-12)


def test_what_does_not_vary_has_no_correlation() -> None:
    group = np.array([0] * 3 + [1] * 3)
    a = np.array([0.1, 0.1, 0.1, 1, 2, 3])  # the mean of three 0.1 is not 0.1
    r = pearson(group, a, np.array([1.0, 2, 3, 2, 4, 6]), 3)
    assert math.isnan(r[0])
    assert r[1] == pytest.approx(1)
    assert math.isnan(r[2])  # a group without anything


def test_one_class_has_no_auc() -> None:
    assert math.isnan(auc(np.zeros(2, int), np.array([1.0, 2]), np.array([True, True]), 1)[0])


def test_figures_of_a_judge() -> None:
    true = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    said = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
    assert balanced_accuracy(said, true) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(said, true) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert balanced_accuracy(np.ones(8, bool), true) == 0.5
    assert f1(np.zeros(8, bool), true) == 0
    for one_class in (np.ones(3, bool), np.zeros(3, bool)):
        assert math.isnan(balanced_accuracy(one_class, one_class))
        assert math.isnan(f1(one_class, one_class))
