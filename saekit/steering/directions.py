"""Directions [D] at a site that are not (or not only) a feature's decoder row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.sites import capture
from saekit.steering.edits import Edit
from saekit.steering.kinds import Unit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector [D] at a site, with a label that says where it came from."""

    vector: Tensor = field(repr=False)
    site: str
    label: str = "direction"

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

    def add(self, strength: float, *, unit: Unit = "raw") -> Edit:
        """Add strength · vector (unit raw), or strength × the median residual norm along it (unit norm)."""
        return Edit("add", self.site, self.vector, strength, unit, self.label)


def last_activation(model: TransformerBridge, text: str, site: str) -> Tensor:
    """The activation [D] at the last token of a text, float32."""
    if not text:
        raise InvalidInput("contrast: a prompt is empty; expected a text such as ' Jedi'")
    return capture(model, [site], model.to_tokens(text))[site][0, -1].float().cpu()
