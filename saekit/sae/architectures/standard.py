"""The L1 sparse autoencoder: Bricken 2023; the objective of Anthropic's circuits update, April 2024.

p = (x − b_dec) W_enc + b_enc
f = ReLU(p)
x̂ = f W_dec + b_dec
L = s² mean‖y − x̂‖² + λ mean Σ_i f_i s‖d_i‖
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.sae import choosing
from saekit.sae.architectures.base import ALL, Architecture, Objective, Terms, objective

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class Standard(Architecture):
    name = "standard"
    penalty = "l1"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        return p.relu()

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        at = choosing.above(sae, x, torch.zeros_like(sae.b_enc), terms.dtype or x.dtype, terms.ranks)
        f, sums, counts = at.relu()
        sparsity = terms.sparsity * terms.scale * (sums @ sae.decoder_norms()) / terms.tokens(x)
        return objective(sae, x, y, f, at, terms, counts=counts, sparsity=sparsity)
