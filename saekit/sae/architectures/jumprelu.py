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
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saekit.sae import choosing
from saekit.sae.architectures.base import ALL, Architecture, Objective, Terms, objective

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class JumpReLU(Architecture):
    name = "jumprelu"
    vectors: ClassVar[Mapping[str, float]] = {"b_enc": 0.0, "threshold": 0.1}
    penalty = "l0"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        return p.relu() * (p > sae.threshold[at])

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        """Only what lies above θ − ε/2 is looked at: nothing else reconstructs or is near a threshold."""
        bounds = (sae.threshold - terms.bandwidth / 2).detach()
        at = choosing.above(sae, x, bounds, terms.dtype or x.dtype, terms.ranks)
        tanh = terms.l0_penalty == "tanh"
        f, sums, counts = at.jump(sae.threshold, terms.bandwidth, felt=tanh)
        if tanh:
            norms = terms.scale * sae.decoder_norms()
            penalty = torch.tanh(terms.tanh_scale * f * at.of(norms)).sum(dtype=x.dtype)
            below = self._below(sae, x, sums, counts.detach(), norms)
            sparsity = (terms.sparsity * penalty + terms.preact * below) / terms.tokens(x)
        else:
            sparsity = terms.sparsity * counts.sum() / terms.tokens(x)
        return objective(sae, x, y, f, at, terms, counts=counts, sparsity=sparsity)

    def _below(self, sae: SAE, x: Tensor, sums: Tensor, counts: Tensor, norms: Tensor) -> Tensor:
        """Σ ReLU(θ − p) ‖d‖ over all pairs, of which only those above θ are at hand: Σ (θ − p) ‖d‖ + Σ ReLU(p − θ) ‖d‖."""
        total = x.sum(0) if sae.shift is None else x.sum(0) - len(x) * sae.shift
        all_p = total @ sae.W_enc + len(x) * sae.b_enc
        over = sums - counts * sae.threshold
        return (len(x) * sae.threshold - all_p + over) @ norms
