"""Dead latents start anew where the reconstruction is worst: Bricken 2023, appendix "Resampling of neurons".

Rows of the batch are drawn with probability ∝ (their squared error)². A dead latent's decoder row points to the row it
drew, at the living rows' mean norm; its encoder row too, at a fifth of theirs; its bias is 0 again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.sae import SAE
from saekit.sae.ranks import ALONE, Ranks

ENCODER_SHARE = 0.2


@torch.no_grad()
def resample(
    sae: SAE, dead: Tensor, x: Tensor, y: Tensor, error: Tensor, seed: int, ranks: Ranks = ALONE
) -> Tensor:
    """Give the dead latents new rows in place → their indices [n].

    dead: [S] bool. x [B, D], y [B, E]: a batch and its target; error [B, E]: y − x̂. seed: of the draw.
    ranks: where processes share the latents, sae and dead are this one's; all of them draw for all.
    """
    latents = dead.nonzero().squeeze(1)
    dead_of = [len(part.nonzero()) for part in ranks.latents.gather(dead.byte())]
    if sum(dead_of) == 0:
        return latents
    weights = error.square().sum(1).square().double()
    if not bool(weights.sum() > 0):
        return latents[:0]
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(weights.cpu(), sum(dead_of), replacement=True, generator=draw).to(x.device)
    chosen = chosen.split(dead_of)[ranks.latents.rank]
    alive = ~dead if sum(dead_of) < len(dead) * ranks.latents.size else dead
    inputs = x[chosen] if sae.shift is None else x[chosen] - sae.shift
    sae.W_dec[latents] = _at_norm(y[chosen] - sae.b_dec, _mean(sae.W_dec[alive].norm(dim=1), ranks))
    sae.W_enc[:, latents] = _at_norm(
        inputs, ENCODER_SHARE * _mean(sae.W_enc[:, alive].norm(dim=0), ranks)
    ).t()
    for name, value in sae.kind.vectors.items():
        getattr(sae, name)[latents] = value
    return latents


def _mean(norms: Tensor, ranks: Ranks) -> Tensor:
    """Of all processes' norms [n]."""
    total, n = ranks.latents.sum(torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]))
    return total / n


def _at_norm(rows: Tensor, norm: Tensor) -> Tensor:
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
