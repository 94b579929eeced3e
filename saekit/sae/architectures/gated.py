"""The gated sparse autoencoder: Rajamanoharan 2024, arXiv 2404.16014.

    π = (x − b_dec) W_enc + b_gate                  which latents fire
    m = e^{r_mag} (x − b_dec) W_enc + b_mag         how strongly
    f = 1[π > 0] ReLU(m)
    L = s² mean‖y − x̂(f)‖² + λ mean Σ_i ReLU(π_i) s‖d_i‖ + s² mean‖y − x̂(ReLU(π))‖²

The step has no gradient, so the gate learns through the other two terms. They see a frozen decoder: it should fit f and
not ReLU(π), and the paper holds its rows at norm 1. Where rows are free, as here, a penalty that reached ‖d_i‖ would
shrink them, e^{r_mag} would make up for it in f at no cost, and the gate would be left with rows too short to use.
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


class Gated(Architecture):
    name = "gated"
    vectors: ClassVar[Mapping[str, float]] = {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}
    bias = "b_gate"
    penalty = "l1"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        magnitude = sae.r_mag[at].exp() * (p - sae.b_gate[at]) + sae.b_mag[at]
        return (p > 0) * magnitude.relu()

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        at = choosing.above(sae, x, torch.zeros_like(sae.b_gate), terms.dtype or x.dtype, terms.ranks)
        stretch = sae.r_mag.exp()  # of π itself, which holds b_gate: m = e^{r_mag} (π − b_gate) + b_mag
        gate, f, sums, counts = at.gate(stretch, sae.b_mag - stretch * sae.b_gate)
        norms = sae.decoder_norms().detach()
        sparsity = terms.sparsity * terms.scale * (sums @ norms) / terms.tokens(x)
        rest = y - sae.affine(x).detach()
        # Before f's error, so that a dense step forgets f before it makes the gate's gradient: three of all latents at most
        via_gate = terms.scale**2 * at.squared_error(gate, sae.W_dec.detach(), rest)[0] / terms.tokens(x)
        found = objective(sae, x, y, f, at, terms, counts=counts, sparsity=sparsity)
        return found._replace(loss=found.loss + via_gate, aux=found.aux + via_gate.detach())
