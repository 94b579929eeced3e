"""Directions [D] at a site: from a contrast of prompts, from an SAE's latent, or drawn at random as a control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput, UnknownName
from saekit.sites import capture
from saekit.steering.edits import Edit, Steerable
from saekit.steering.kinds import Kind, Unit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE


@dataclass(frozen=True, eq=False)
class Direction(Steerable):
    """A vector [D] at a site, with a label that says where it came from."""

    vector: Tensor = field(repr=False)
    site: str
    label: str = "direction"
    sae: SAE | None = field(default=None, repr=False)
    latent: int | None = None

    @classmethod
    def from_contrast(cls, model: TransformerBridge, positive: str, negative: str, *, site: str) -> Direction:
        """h₊ − h₋ at the site, read at the last token of each prompt (ActAdd, Turner 2023, arXiv 2308.10248).

        Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty prompt.
        """
        plus, minus = (last_activation(model, text, site) for text in (positive, negative))
        return cls(plus - minus, site, f"{positive!r} − {negative!r}")

    @classmethod
    def random(cls, like: Tensor, site: str, seed: int = 0) -> Direction:
        """A random direction of the same norm: the control that every steering claim needs beside it."""
        vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
        return cls(vector * (float(like.norm()) / vector.norm()), site, f"random direction {seed}")

    @classmethod
    def from_sae(cls, sae: SAE, latent: int, site: str | None = None) -> Direction:
        """A latent's decoder row, without a catalog. site: which of a crosscoder's; of a transcoder it is its target.

        Raises `UnknownFeature` for a latent the SAE lacks, `UnknownName` for a site it does not write.
        """
        sites = sae.target_sites
        if site is None and len(sites) > 1:
            raise InvalidInput(f"feature {latent}: this SAE writes {', '.join(sites)}; name one, site=…")
        site = site or sites[0]
        if site not in sites:
            raise UnknownName(f"site {site!r}: this SAE writes {', '.join(sites)}")
        row = sae.split(sae.direction(latent))[sites.index(site)]
        return cls(row, site, f"feature {latent}", sae, latent)

    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        return Edit(
            kind, self.site, self.vector, strength, unit, self.label, latent=self.latent, sae=self.sae
        )


def last_activation(model: TransformerBridge, text: str, site: str) -> Tensor:
    """The activation [D] at the last token of a text, float32."""
    if not text:
        raise InvalidInput("contrast: a prompt is empty; expected a text such as ' Jedi'")
    return capture(model, [site], model.to_tokens(text))[site][0, -1].float().cpu()
