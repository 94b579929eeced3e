"""The BatchTopK sparse autoencoder: Bussmann 2024, arXiv 2412.06410.

    f = ReLU(the B·k largest p of the whole batch, else 0)        while training
    f = p · 1[p > θ]                                              in use

θ is the mean, over recent batches, of the smallest latent kept: with it each token is encoded by itself, and about k
latents fire. The rest is TopK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.sae.architectures.base import ALL, Architecture
from saekit.sae.architectures.topk import TopK
from saekit.sae.kernels import Pairs

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class BatchTopK(TopK):
    name = "batchtopk"
    running_threshold = True

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        return p.relu() * (p > sae.threshold)

    def active(self, sae: SAE, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return Architecture.active(self, sae, p)

    def choose(self, p: Tensor, k: int) -> Pairs:
        tokens, latents = largest_of_batch(p, k * len(p))
        return Pairs(tokens, latents, len(p), p.shape[1])


def largest_of_batch(p: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(tokens, latents) of the n largest entries of p [B, S], sorted by token and latent.

    Few tokens take more than a few times the average, so each row gives only its largest as candidates; if one row's
    candidates are all chosen, it might have had more, and the whole matrix is searched.
    """
    B, S = p.shape
    candidates = min(S, 4 * -(-n // B) + 16)
    values, latents = p.topk(candidates, dim=1, sorted=False)
    chosen = values.flatten().topk(n, sorted=False).indices
    taken = torch.bincount(chosen // candidates, minlength=B)
    if candidates < S and bool((taken == candidates).any()):
        flat = p.flatten().topk(n, sorted=False).indices
    else:
        flat = chosen // candidates * S + latents.flatten()[chosen]
    flat = flat.sort().values
    return flat // S, flat % S
