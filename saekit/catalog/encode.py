"""Activations → what fires, a tile of tokens at a time, so that no [tokens, S] array is held.

On a CPU the choice from a tile is made by the kernels of the training step, here of float32 products: the latents are those of
`SAE.encode`, but for the rounding of a product of another shape. How a batch is cut depends on its size alone, so the same
batch gives the same bits.

n tokens, D = d_in, S = d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saekit.sae import SAE, kernels
from saekit.sae.model import Active

AT_ONCE = 2**24  # pre-activations, 64 MiB in float32
TILE = 512  # tokens on a CPU: more no longer fit the cache


@torch.no_grad()
def encode(sae: SAE, x: Tensor) -> Active:
    """The non-zero latents of x [n, D], sorted by token, as `SAE.encode_active` gives them."""
    chosen = _can_choose(sae, x)
    size = max(32, AT_ONCE // sae.d_sae)
    tiles = x.split(min(TILE, size) if chosen else size)
    out = torch.empty(len(tiles[0]), sae.d_sae) if chosen else None
    found = [sae.encode_active(tile) if out is None else _chosen(sae, tile, out) for tile in tiles]
    first = [number * len(tiles[0]) for number in range(len(tiles))]
    return Active(
        torch.cat([active.tokens + start for active, start in zip(found, first, strict=True)]),
        torch.cat([active.latents for active in found]),
        torch.cat([active.values for active in found]),
    )


def _can_choose(sae: SAE, x: Tensor) -> bool:
    plain = not (sae.config.rescale_acts_by_decoder_norm or sae.config.center_input)
    return plain and x.device.type == sae.W_enc.device.type == "cpu" and sae.W_enc.dtype == torch.float32


def _chosen(sae: SAE, x: Tensor, out: Tensor) -> Active:
    """out: [n or more, S] to be overwritten."""
    x = x.float() if sae.shift is None else x.float() - sae.shift
    p, bias = torch.mm(x, sae.W_enc, out=out[: len(x)]), sae.encoder_bias
    if sae.architecture == "topk":
        assert sae.k is not None
        values, rows = kernels.top_k(p, bias, sae.k)
        f, latents = values.relu().flatten(), rows.flatten()
        counts = torch.full((len(x),), sae.k)
    else:
        bounds = getattr(sae, "threshold", torch.zeros(())).clamp_min(0).expand(sae.d_sae).contiguous()
        values, latents, starts = kernels.above(p, bias, bounds)
        f, counts = sae.kind.activate(sae, values, latents), starts.diff()  # type: ignore[arg-type]
    tokens = torch.repeat_interleave(torch.arange(len(x)), counts)
    fires = f > 0
    return Active(tokens[fires], latents[fires], f[fires])
