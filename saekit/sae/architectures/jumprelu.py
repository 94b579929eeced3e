"""The JumpReLU sparse autoencoder: Rajamanoharan 2024, arXiv 2407.14435; the tanh variant: Anthropic, January 2025.

    p = (x − b_dec) W_enc + b_enc
    f = p · 1[p > θ],  θ > 0 learned per latent
    L = s² mean‖y − x̂‖² + λ mean Σ_i 1[p_i > θ_i]                                                      step
    L = s² mean‖y − x̂‖² + λ mean Σ_i tanh(c f_i s‖d_i‖) + λ_P mean Σ_i ReLU(θ_i − p_i) s‖d_i‖          tanh

A step has no gradient, but its expectation over the data has one. The straight-through estimators replace the step by
a ramp of width ε about the threshold (K is 1 on [−½, ½], else 0):

    ∂f/∂θ = −(θ/ε) K((p − θ)/ε),    ∂1[p > θ]/∂θ = −(1/ε) K((p − θ)/ε)

In the step variant only θ gets these; in the tanh variant p gets their negatives, so that the encoder feels the jump
too. θ is trained as log θ, which keeps it positive (`training.trainer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.sae import choosing
from saekit.sae.architectures.base import ALL, Architecture, Objective, Terms, objective

if TYPE_CHECKING:
    from saekit.sae.model import SAE
    from saekit.sae.pairs import At


class JumpReLU(Architecture):
    name = "jumprelu"
    vectors: ClassVar[Mapping[str, float]] = {"b_enc": 0.0, "threshold": 0.1}
    penalty = "l0"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        return p.relu() * (p > sae.threshold[at])

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        """Only what lies above θ − ε/2 is looked at: nothing else reconstructs or is near a threshold."""
        bounds = (sae.threshold - terms.bandwidth / 2).detach()
        at, p = choosing.above(sae, x, bounds, terms.dtype or x.dtype, terms.ranks)
        threshold, tanh = at.of(sae.threshold), terms.l0_penalty == "tanh"
        f = jump(p, threshold, terms.bandwidth, to_input=tanh)
        if tanh:
            norms = terms.scale * sae.decoder_norms()
            penalty = torch.tanh(terms.tanh_scale * f * at.of(norms)).sum(dtype=x.dtype)
            below = self._below(sae, x, p, at, norms)
            sparsity = (terms.sparsity * penalty + terms.preact * below) / terms.tokens(x)
        else:
            penalty = step(p, threshold, terms.bandwidth).sum(dtype=x.dtype)
            sparsity = terms.sparsity * penalty / terms.tokens(x)
        return objective(sae, x, y, f, at, terms, sparsity=sparsity)

    def _below(self, sae: SAE, x: Tensor, p: Tensor, at: At, norms: Tensor) -> Tensor:
        """Σ ReLU(θ − p) ‖d‖ over all pairs, of which only those above θ are at hand: Σ (θ − p) ‖d‖ + Σ ReLU(p − θ) ‖d‖."""
        total = x.sum(0) if sae.shift is None else x.sum(0) - len(x) * sae.shift
        all_p = total @ sae.W_enc + len(x) * sae.b_enc
        over = at.total((p - at.of(sae.threshold)).relu(), norms)
        return ((len(x) * sae.threshold - all_p) * norms).sum() + over


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return p * (p > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        p, threshold = ctx.saved_tensors
        near = g * (threshold / ctx.bandwidth) * _rectangle(p - threshold, ctx.bandwidth)
        g_p = g * (p > threshold)
        return g_p + near if ctx.to_input else g_p, -near.sum_to_size(threshold.shape), None, None


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return (p > threshold).to(p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        p, threshold = ctx.saved_tensors
        near = g / ctx.bandwidth * _rectangle(p - threshold, ctx.bandwidth)
        return None, -near.sum_to_size(threshold.shape), None


def jump(p: Tensor, threshold: Tensor, bandwidth: float, *, to_input: bool = False) -> Tensor:
    """p · 1[p > θ] for p and θ of one shape, or θ [S] and p [.., S], with the estimator's gradients."""
    return _Jump.apply(p, threshold, bandwidth, to_input)


def step(p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1[p > θ] for p and θ as `jump` takes them, with the estimator's gradient for θ."""
    return _Step.apply(p, threshold, bandwidth)


def _rectangle(distance: Tensor, bandwidth: float) -> Tensor:
    return distance.abs() < bandwidth / 2
