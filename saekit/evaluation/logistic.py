"""Logistic regression and the two figures a probe is judged by: accuracy and the area under the ROC curve.

n examples, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from saekit.errors import InvalidInput


def logistic(x: Tensor, y: Tensor, *, penalty: float = 1.0) -> tuple[Tensor, float]:
    """P(y = 1 | x) = σ(x · direction + bias) → (direction [D] float64, bias), in units of x.

    x: [n, D]. y: [n], true or 1 for the positive class.

    The minimum of Σ cross-entropy + penalty/2 · ‖w‖², w the weights of standardised columns (mean 0, variance 1;
    a constant column gets 0) and the bias unpenalised: scikit-learn's `LogisticRegression(C=1/penalty)` after its
    `StandardScaler`. Standardising keeps the penalty from deciding by a column's scale, which means nothing for a
    latent. Convex, so the answer is the only one; float64 L-BFGS, deterministic.

    Raises `InvalidInput` unless both classes are there.
    """
    x, y = x.detach().double(), y.detach().to(x.device).double()
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise InvalidInput(
            f"logistic: expected x [n, D] and y [n], got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not 0 < float(y.sum()) < len(y):
        raise InvalidInput(f"logistic: all {len(y)} examples are of one class; expected both")
    mean, deviation = x.mean(0), x.std(0, correction=0)
    varies = deviation > 1e-12 * x.abs().amax(0).clamp_min(1e-300)
    scale = torch.where(varies, 1 / deviation.where(varies, deviation.new_ones(())), 0.0)
    standardised = (x - mean) * scale

    with torch.enable_grad():
        weights = x.new_zeros(x.shape[1]).requires_grad_()
        offset = x.new_zeros(()).requires_grad_()
        lbfgs = torch.optim.LBFGS(
            [weights, offset],
            max_iter=1000,
            tolerance_grad=1e-9,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            lbfgs.zero_grad()
            fit = binary_cross_entropy_with_logits(standardised @ weights + offset, y)
            loss = fit + penalty / (2 * len(y)) * weights.square().sum()
            loss.backward()
            return loss

        lbfgs.step(objective)
    direction = weights.detach() * scale
    return direction, float(offset.detach() - mean @ direction)


def accuracy(scores: Tensor, y: Tensor) -> float:
    """Share of examples on the right side of 0. scores, y: [n]."""
    return float(((scores > 0) == y.bool()).double().mean())


def auc(scores: Tensor, y: Tensor) -> float:
    """P(a positive scores above a negative), ties counting half: the area under the ROC curve. scores, y: [n]."""
    order = scores.double().sort().values
    # Mid-rank of each score: the mean of the first and the last place it could take in the order.
    ranks = (
        torch.searchsorted(order, scores.double()) + torch.searchsorted(order, scores.double(), right=True)
    ) / 2
    positive = y.bool()
    p = int(positive.sum())
    return float((ranks[positive].sum().double() - p * p / 2) / (p * (len(y) - p)))
