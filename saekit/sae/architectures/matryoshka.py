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
from saekit.sae.pairs import Pairs

if TYPE_CHECKING:
    from saekit.sae.model import SAE


class Matryoshka(BatchTopK):
    name = "matryoshka"
    decoder = "free"  # unlike the paper's; LOG.md, November 2026

    def squared_errors(self, sae: SAE, f: Tensor, pairs: Pairs, rest: Tensor) -> tuple[list[Tensor], Tensor]:
        assert sae.prefixes is not None
        totals: list[Tensor] = []
        for start, end in zip((0, *sae.prefixes), sae.prefixes, strict=False):
            here = pairs.before(end) & ~pairs.before(start)
            total, rest = pairs.where(here).squared_error(f[here], sae.W_dec, rest)
            totals.append(total)
        return totals, rest
