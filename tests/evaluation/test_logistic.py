"""Logistic regression is the minimum it says it is, and AUC the share of pairs in order."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.evaluation.logistic import accuracy, auc, logistic


def example(n=120, d=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.logspace(-3, 2, d).double() + 5
    z = (x[:, 3] - x[:, 3].mean()) / x[:, 3].std()
    return x, z + torch.randn(n, generator=draw).double() > 0


def test_the_gradient_is_zero_at_the_answer() -> None:
    x, y = example()
    direction, bias = logistic(x, y, penalty=0.7)
    wrong = torch.sigmoid(x @ direction + bias) - y.double()
    deviation = x.std(0, correction=0)
    standardised = (x - x.mean(0)) / deviation
    assert standardised.T @ wrong + 0.7 * direction * deviation == pytest.approx(torch.zeros(7), abs=1e-5)
    assert float(wrong.sum()) == pytest.approx(0, abs=1e-5)  # the bias is not penalised


def test_units_do_not_matter_and_neither_do_constants() -> None:
    x, y = example()
    direction, bias = logistic(x, y)
    scores = x @ direction + bias
    stretched = torch.cat([1000 * x + 3, torch.full((len(x), 1), 0.1).double()], 1)
    other, other_bias = logistic(stretched, y)
    assert torch.allclose(stretched @ other + other_bias, scores, atol=1e-6)
    assert other[-1] == 0
    with torch.no_grad():  # also where gradients are off
        assert torch.equal(logistic(x, y)[0], direction)
    assert direction.requires_grad is False


def test_separable_classes_are_separated() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    y = torch.tensor([0, 0, 1, 1])
    direction, bias = logistic(x, y)
    assert accuracy(x.double() @ direction + bias, y) == 1


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order(seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (40,), generator=draw).float()  # many ties
    y = torch.rand(40, generator=draw) > 0.6
    pairs = scores[y][:, None] - scores[~y][None]
    assert auc(scores, y) == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).double().mean()))


def test_one_class_and_wrong_shapes_are_errors() -> None:
    with pytest.raises(InvalidInput, match="of one class"):
        logistic(torch.randn(4, 2), torch.ones(4))
    with pytest.raises(InvalidInput, match="expected x \\[n, D\\] and y \\[n\\]"):
        logistic(torch.randn(4, 2), torch.ones(3))
