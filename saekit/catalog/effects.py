"""What follows from the weights alone: logit effects, nearest directions, encoder/decoder agreement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saekit.sites import RESIDUAL

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

AT_ONCE = 2**26  # float32 values of an intermediate result, 256 MiB


def logit_effects(
    model: TransformerBridge, directions: Tensor, site: str, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(raised ids, raised effects, lowered ids, lowered effects), each [S, k]: top and bottom of d_i through the unembedding.

    The final norm's gain is applied, and for LayerNorm its centring; the norm's division, which depends on the rest of
    the stream, is left out. None where the site does not write to the residual stream.
    """
    if not site.endswith(RESIDUAL):
        return None
    W_U = model.W_U.detach().float().cpu()  # [D, V]
    rows = directions.float().cpu()
    if model.cfg.normalization_type in ("LN", "LNPre"):
        rows = rows - rows.mean(1, keepdim=True)
    gain = getattr(model.ln_final, "weight", None)
    if gain is not None:
        rows = rows * gain.detach().float().cpu()
    parts = []
    for chunk in rows.split(max(1, AT_ONCE // W_U.shape[1])):
        effects = chunk @ W_U
        top, low = effects.topk(k, dim=1), effects.topk(k, dim=1, largest=False)
        parts.append((top.indices, top.values, low.indices, low.values))
    a, b, c, d = (torch.cat(part) for part in zip(*parts, strict=True))
    return a, b, c, d


def nearest(directions: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, cosines), each [S, k']: the latents whose decoder rows are nearest, itself left out."""
    rows = torch.nn.functional.normalize(directions.float().cpu(), dim=1)
    k = min(k, len(rows) - 1)
    indices, cosines = [], []
    for start in range(0, len(rows), step := max(1, AT_ONCE // len(rows))):
        cosine = rows[start : start + step] @ rows.t()
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -2.0
        top = cosine.topk(k, dim=1)
        indices.append(top.indices)
        cosines.append(top.values)
    return torch.cat(indices).numpy(), torch.cat(cosines).numpy()


def encoder_cosine(W_enc: Tensor, W_dec: Tensor) -> np.ndarray:
    """[S] cosine between each latent's encoder column and decoder row."""
    cosine = torch.cosine_similarity(W_enc.detach().t().float(), W_dec.detach().float(), dim=1)
    return cosine.cpu().numpy()
