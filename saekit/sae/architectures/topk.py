"""The TopK sparse autoencoder: Gao 2024, arXiv 2406.04093.

    p = (x − b_dec) W_enc + b_enc
    f = ReLU(the k largest p of each token, else 0)
    x̂ = f W_dec + b_dec
    L = s² mean‖y − ȳ‖² · ( ‖y − x̂‖² / ‖y − ȳ‖² + α ‖e − ê‖² / ‖e‖² )

e = y − x̂ is what the live latents leave over, ê its reconstruction by the aux_k largest dead ones (AuxK). The factor
before the paper's loss is one number for all batches but for noise; it gives the gradient the size that the other
architectures' have, so that clipping it at one norm means the same. The decoder rows have norm 1. Only the chosen pairs of token and latent are ever differentiated (`sae.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saekit.sae.architectures.base import (
    ALL,
    Architecture,
    Constraint,
    Objective,
    Terms,
    auxk,
    variance,
)
from saekit.sae.kernels import Pairs, decode_at, preacts_at

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

    def choose(self, p: Tensor, k: int) -> Pairs:
        """The pairs that may fire, of pre-activations p [B, S]."""
        return Pairs.of_rows(p.topk(k, dim=1, sorted=False).indices, p.shape[1])

    def reconstructions(self, sae: SAE, f: Tensor, pairs: Pairs) -> list[Tensor]:
        """What the loss compares with y, each [B, E] without b_dec and skip; the last one is the whole."""
        return [decode_at(f, sae.W_dec, pairs)]

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        with torch.no_grad():
            p = sae.fused_preactivations(x)
        pairs = self.choose(p, terms.k)
        f = preacts_at(p, x, sae.W_enc, sae.encoder_bias, sae.shift, pairs).relu()
        rest = y - sae.affine(x)
        errors = [rest - part for part in self.reconstructions(sae, f, pairs)]
        error, spread = errors[-1], variance(y)
        loss = torch.stack([e.square().sum(1).mean() for e in errors]).sum() / spread
        aux = torch.zeros_like(spread)
        if terms.dead is not None:
            left = auxk(sae, x, p, error.detach(), terms.dead, terms.aux_k).square().sum()
            aux = left / error.detach().square().sum().clamp_min(torch.finfo(x.dtype).tiny)
            loss = loss + terms.aux * aux
        fires = f.detach() > 0
        fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
        return Objective(
            loss=loss * (terms.scale**2 * spread),
            mse=error.detach().square().sum(1).mean(),
            variance=spread,
            sparsity=torch.zeros_like(spread),
            aux=aux.detach(),
            l0=fires.sum() / len(x),
            fired=fired.index_put_((pairs.latents[fires],), torch.ones_like(fired[:1])),
            error=error.detach(),
            smallest=torch.where(fires, f.detach(), torch.inf).min(),
        )
