"""The TopK sparse autoencoder: Gao 2024, arXiv 2406.04093.

    p = (x − b_dec) W_enc + b_enc
    f = ReLU(the k largest p of each token, else 0)
    x̂ = f W_dec + b_dec
    L = s² mean‖y − ȳ‖² · ( ‖y − x̂‖² / ‖y − ȳ‖² + α ‖e − ê‖² / ‖e‖² )

e = y − x̂ is what the live latents leave over, ê its reconstruction by the aux_k largest dead ones (AuxK). The factor
before the paper's loss is one number for all batches but for noise; it gives the gradient the size that the other
architectures' have, so that clipping it at one norm means the same. The decoder rows have norm 1. Only the chosen pairs
of token and latent are ever differentiated (`sae.pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saekit.sae import choosing
from saekit.sae.architectures.base import (
    ALL,
    Architecture,
    Constraint,
    Objective,
    Terms,
    auxk,
    report,
    variance,
    without_affine,
)
from saekit.sae.pairs import Pairs

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class TopK(Architecture):
    name = "topk"
    row_norm = 1.0
    takes_k = True
    decoder: ClassVar[Constraint] = "unit"
    dead_latents = "auxk"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        assert sae.k is not None
        values, latents = p.topk(sae.k, dim=-1, sorted=False)
        return torch.zeros_like(p).scatter(-1, latents, values.relu())

    def active(self, sae: SAE, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert sae.k is not None
        values, latents = p.topk(sae.k, dim=-1, sorted=False)
        tokens, slots = (values > 0).nonzero(as_tuple=True)
        return tokens, latents[tokens, slots], values[tokens, slots]

    def choose(self, sae: SAE, x: Tensor, terms: Terms) -> tuple[Pairs, Tensor]:
        """The pairs that may fire on x [B, D], and their pre-activations [n]."""
        return choosing.top_k(sae, x, terms.k, terms.dtype or x.dtype, terms.ranks)

    def squared_errors(self, sae: SAE, f: Tensor, pairs: Pairs, rest: Tensor) -> tuple[list[Tensor], Tensor]:
        """Σ‖e‖² of each reconstruction that the loss compares with y, and the error [B, E] of the whole."""
        total, error = pairs.squared_error(f, sae.W_dec, rest)
        return [total], error

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        pairs, p = self.choose(sae, x, terms)
        f = p.relu()
        rest = without_affine(sae, x, y, terms)
        totals, error = self.squared_errors(sae, f, pairs, rest)
        error, spread, rows = error.detach(), variance(sae, y, rest, terms), terms.tokens(x)
        loss = terms.scale**2 * sum(totals[1:], totals[0]) / rows
        mse, aux = totals[-1] / rows, torch.zeros_like(spread)
        if terms.dead is not None:
            left = terms.ranks.data.sum(error.square().sum()).clamp_min(torch.finfo(x.dtype).tiny)
            aux = auxk(sae, x, error, terms) / left
            loss = loss + terms.scale**2 * spread * terms.aux * aux
        found = report(loss, mse, aux, pairs.counts(f), error, spread, terms)
        values = f.detach()
        smallest = (
            torch.where(values > 0, values, torch.inf).amin() if len(values) else values.new_tensor(torch.inf)
        )
        return found._replace(smallest=smallest)
