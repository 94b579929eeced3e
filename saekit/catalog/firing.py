"""Which features fire on each token of a text that the catalog has not seen: one forward of the model, one encode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from saekit.errors import InvalidInput
from saekit.lm import token_strings
from saekit.sites import capture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

PER_TOKEN = 12


@dataclass(frozen=True)
class Firing:
    """What fires on a text of T tokens, those that the model adds (BOS) included."""

    tokens: list[str]  # [T] spaces kept
    features: list[list[tuple[int, float]]]  # [T] (feature, activation) of each token, strongest first

    def __str__(self) -> str:
        rows = zip(self.tokens, self.features, strict=True)
        return "\n".join(f"{t!r:20} {', '.join(f'{i} ({a:.3g})' for i, a in found)}" for t, found in rows)


@torch.no_grad()
def firing(model: TransformerBridge, sae: SAE, text: str, limit: int = PER_TOKEN) -> Firing:
    """The strongest `limit` features on each token. Raises `InvalidInput` for a text beyond the model's context."""
    ids = model.to_tokens(text, truncate=False)
    if ids.shape[1] > model.cfg.n_ctx:
        raise InvalidInput(f"text: {ids.shape[1]} tokens; the context of the model holds {model.cfg.n_ctx}")
    x = capture(model, [sae.site], ids)[sae.site][0]
    f = sae.encode(x.to(sae.W_enc.device)).float()
    values, latents = f.topk(min(limit, sae.d_sae), dim=-1)
    pairs = [zip(*row, strict=True) for row in zip(latents.tolist(), values.tolist(), strict=True)]
    features = [[(i, a) for i, a in row if a > 0] for row in pairs]
    return Firing(token_strings(model.tokenizer, ids[0].tolist()), features)
