"""The BatchTopK sparse autoencoder: Bussmann 2024, arXiv 2412.06410.

    f = ReLU(the B·k largest p of the whole batch, else 0)        while training
    f = p · 1[p > θ]                                              in use

θ is the mean, over recent batches, of the smallest latent kept: with it each token is encoded by itself, and about k
latents fire. The rest is TopK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from saekit.sae import choosing
from saekit.sae.architectures.base import ALL, Architecture, Terms
from saekit.sae.architectures.topk import TopK
from saekit.sae.pairs import Pairs

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class BatchTopK(TopK):
    name = "batchtopk"
    running_threshold = True

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        return p.relu() * (p > sae.threshold)

    def active(self, sae: SAE, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return Architecture.active(self, sae, p)

    def choose(self, sae: SAE, x: Tensor, terms: Terms) -> tuple[Pairs, Tensor]:
        return choosing.largest(sae, x, terms.k * terms.tokens(x), terms.dtype or x.dtype, terms.ranks)
