"""What each architecture minimises. One function per objective, in the order of its paper's equations.

    standard   s² mean‖x − x̂‖² + λ s mean Σ_i f_i ‖d_i‖₂                  Anthropic, circuits update April 2024
    topk       ‖x − x̂‖² / ‖x − x̄‖² + α ‖e − ê‖² / ‖e‖²                    Gao 2024, sections 2.3 and A.2

s is the scale that brings E‖s x‖ to √D, so that λ means the same on every site. e = x − x̂ is what the live
latents leave over, ê its reconstruction by the k_aux largest dead ones (AuxK).

B tokens, D = d_in, S = d_sae, K = k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saekit.sae.kernels import Pairs, decode_at, preacts_at
from saekit.sae.model import SAE


class Objective(NamedTuple):
    """What one batch gave. Everything stays a tensor; nothing here waits for the device."""

    loss: Tensor  # [] to differentiate
    mse: Tensor  # [] mean ‖x − x̂‖², in raw units
    variance: Tensor  # [] mean ‖x − x̄‖², in raw units, x̄ the batch mean
    sparsity: Tensor  # [] the L1 term, weighted; 0 for topk
    aux: Tensor  # [] the AuxK term, unweighted; 0 for standard
    l0: Tensor  # [] mean number of non-zero latents
    fired: Tensor  # [S] bool: which latents fired


def standard(sae: SAE, x: Tensor, *, scale: float, l1_coefficient: float) -> Objective:
    """The L1 objective on x [B, D]."""
    f = sae.encode(x)
    error = x - sae.decode(f)
    mse = error.square().sum(1).mean()
    l1 = (f @ sae.W_dec.norm(dim=1)).mean()
    sparsity = l1_coefficient * scale * l1
    active = f.detach() > 0
    return Objective(
        loss=scale**2 * mse + sparsity,
        mse=mse.detach(),
        variance=_variance(x),
        sparsity=sparsity.detach(),
        aux=torch.zeros_like(mse),
        l0=active.sum() / len(x),
        fired=active.any(0),
    )


def topk(sae: SAE, x: Tensor, *, dead: Tensor | None, aux_coefficient: float, aux_k: int) -> Objective:
    """The TopK objective on x [B, D]. dead: [S] bool, or None where no latent is dead."""
    assert sae.k is not None
    with torch.no_grad():
        p = torch.addmm(sae.b_enc - sae.b_dec @ sae.W_enc, x, sae.W_enc)
    pairs = Pairs(p.topk(sae.k, dim=1, sorted=False).indices, sae.d_sae)
    f = preacts_at(p, x, sae.W_enc, sae.b_enc, sae.b_dec, pairs).relu()
    error = x - (decode_at(f, sae.W_dec, pairs) + sae.b_dec)
    mse, variance = error.square().sum(1).mean(), _variance(x)
    loss, aux = mse / variance, torch.zeros_like(variance)
    if dead is not None and aux_coefficient > 0:
        aux_term = _auxk(sae, x, p, error.detach(), dead, aux_k)
        loss, aux = loss + aux_coefficient * aux_term, aux_term.detach()
    active = f.detach() > 0
    return Objective(
        loss=loss,
        mse=mse.detach(),
        variance=variance,
        sparsity=torch.zeros_like(aux),
        aux=aux,
        l0=active.sum() / len(x),
        fired=torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device).index_put_(
            (pairs.latents[active],), torch.ones((), dtype=torch.bool, device=x.device)
        ),
    )


def _auxk(sae: SAE, x: Tensor, p: Tensor, error: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """‖e − ê‖² / ‖e‖², ê from the aux_k largest dead latents of each token."""
    dead_latents = dead.nonzero().squeeze(1)
    chosen = p[:, dead_latents].topk(min(aux_k, len(dead_latents)), dim=1, sorted=False).indices
    pairs = Pairs(dead_latents[chosen], sae.d_sae)
    f = preacts_at(p, x, sae.W_enc, sae.b_enc, sae.b_dec, pairs).relu()
    left = error - decode_at(f, sae.W_dec, pairs)
    return left.square().sum() / error.square().sum().clamp_min(torch.finfo(x.dtype).tiny)


def _variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum(1).mean()
