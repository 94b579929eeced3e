"""The Matryoshka BatchTopK sparse autoencoder: Bussmann 2025, arXiv 2503.17547.

    x̂_m = Σ_{i < m} f_i d_i + b_dec                                   for nested prefixes m_1 < … < m_n = S
    L   = s² mean‖y − ȳ‖² · ( Σ_m ‖y − x̂_m‖² / ‖y − ȳ‖² + α AuxK )

f is BatchTopK's. Early latents must reconstruct without the later ones, so general features are not absorbed into
special ones. The partial sums share one pass over the chosen pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from saekit.sae.architectures.batchtopk import BatchTopK
from saekit.sae.kernels import Pairs, decode_at

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class Matryoshka(BatchTopK):
    name = "matryoshka"
    decoder = "free"  # unlike the paper's; LOG.md, November 2026

    def reconstructions(self, sae: SAE, f: Tensor, pairs: Pairs) -> list[Tensor]:
        assert sae.prefixes is not None
        sums: list[Tensor] = []
        for start, end in zip((0, *sae.prefixes), sae.prefixes, strict=False):
            here = (pairs.latents >= start) & (pairs.latents < end)
            part = decode_at(f[here], sae.W_dec, pairs.where(here))
            sums.append(sums[-1] + part if sums else part)
        return sums
