"""ActAdd's full form: a contrast of two prompts at every position, added from the first position on.

    positive   BOS  Love             h⁺ [T, D]
    negative   BOS  Hate   ␣  …      h⁻ [T, D]     the shorter one is filled up with spaces
    prompt     BOS  I   hate  you …  x[t] += c · (h⁺ − h⁻)[t],  t < T

Both prompts begin with the same BOS and see nothing before it, so it cancels: row 0 is zero (Turner 2023, arXiv 2308.10248).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import model_hash
from saekit.sites import capture
from saekit.steering.directions.direction import Direction
from saekit.steering.directions.states import text_ids
from saekit.steering.edits import Edit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class Prefix:
    """A difference for each of the first T positions."""

    vectors: Tensor = field(repr=False)  # [T, D] float32, on the CPU
    site: str
    label: str
    model: str
    model_hash: str = field(repr=False)

    @classmethod
    def from_contrast(cls, model: TransformerBridge, positive: str, negative: str, *, site: str) -> Prefix:
        """h⁺ − h⁻ at every position of two prompts.

        The shorter one is filled up with the token for a space; T is the longer one's length with BOS.
        Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty prompt.
        """
        plus, minus = (text_ids(model, text) for text in (positive, negative))
        space = model.tokenizer(" ", add_special_tokens=False)["input_ids"]
        if len(plus) != len(minus) and not space:
            raise InvalidInput(
                f"prompts of {len(plus)} and {len(minus)} tokens, and {model.cfg.model_name} has no token for a space to "
                "fill up the shorter one; take prompts of one length"
            )
        length = max(len(plus), len(minus))
        ids = torch.stack(
            [torch.cat([side, side.new_tensor(space[-1:] * (length - len(side)))]) for side in (plus, minus)]
        )
        h = capture(model, [site], ids)[site].float().cpu()
        return cls(
            h[0] - h[1],
            site,
            f"{positive!r} − {negative!r}",
            str(model.cfg.model_name),
            model_hash(model),
        )

    def at(self, position: int) -> Direction:
        """The difference at one position, as a direction of its own."""
        if not 0 <= position < len(self.vectors):
            raise InvalidInput(f"{self.label} covers positions 0 to {len(self.vectors) - 1}, not {position}")
        source = f"contrast of two prompts, position {position}"
        return Direction(
            self.vectors[position],
            self.site,
            self.label,
            source=source,
            model=self.model,
            model_hash=self.model_hash,
        )

    def add(self, strength: float) -> list[Edit]:
        """Edits that add strength times each position's difference at that position of the prompt.

        They go to `steer` as they are. A position that the prompt does not reach is steered when it is generated;
        the paper adds to the prompt only, so take a prompt of T tokens or more.
        """
        moved = self.vectors.any(1).nonzero().squeeze(1).tolist()
        return [self.at(position).add(strength).at([position]) for position in moved]

    def __str__(self) -> str:
        norms = ", ".join(f"{norm:.3g}" for norm in self.vectors.norm(dim=1).tolist())
        return f"{self.label} at {self.site} of {self.model}, positions 0 to {len(self.vectors) - 1}, norms {norms}"
