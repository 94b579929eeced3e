"""What follows from the weights alone: logit effects, nearest directions, the neurons beside them, encoder against decoder.

S d_sae, D width at the site that is written, V vocabulary, N neurons of an MLP.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.lm import through_final_norm
from saekit.sae import kernels
from saekit.sites import RESIDUAL

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

AT_ONCE = 2**23  # float32 values of an intermediate result, 32 MiB
EFFECT_BINS = 40
BLOCK = re.compile(r"(blocks\.[0-9]+)\..+")
NEURONS = re.compile(r"blocks\.([0-9]+)\.mlp\.out\.hook_in")
OF_MLP = re.compile(r"blocks\.([0-9]+)\.mlp\.hook_out")

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Effects(NamedTuple):
    """Effects of each direction on the logits: the k tokens raised and lowered most, and how all V spread."""

    raised_ids: Ints  # [S, k], strongest first, of equals the lower ids
    raised: Floats  # [S, k]
    lowered_ids: Ints
    lowered: Floats
    low: Floats  # [S] least effect
    high: Floats  # [S] greatest effect
    counts: Ints  # [S, EFFECT_BINS] tokens in even bins from low to high


def logit_effects(model: TransformerBridge, directions: Tensor, site: str, k: int) -> Effects | None:
    """d_i through the final norm's gain and the unembedding: the logits that one unit of the latent adds, up to one factor.

    For LayerNorm d_i is centred first, as the norm does; its division, which depends on the rest of the stream, is left
    out. directions: [S, D]. None where the site does not write to the residual stream.
    """
    if not writes(model, site):
        return None
    W_U = model.W_U.detach().float()  # [D, V]
    S, V, device = len(directions), W_U.shape[1], W_U.device
    k, none = min(k, V), torch.zeros(V, device=device)
    step = min(S, max(1, AT_ONCE // V))
    # Made beforehand: what stays small among what comes and goes large would leave a hole in memory with each chunk.
    out = torch.empty(step, V, device=device)
    ids, values = torch.empty(2, S, k, dtype=torch.int64), torch.empty(2, S, k)
    bounds, counts = torch.empty(2, S, device=device), torch.empty(S, EFFECT_BINS, device=device)
    for start in range(0, S, step):
        rows = through_final_norm(model, directions[start : start + step])
        here = slice(start, start + len(rows))
        effects = torch.mm(rows, W_U, out=out[: len(rows)])
        torch.aminmax(effects, dim=1, out=(bounds[0, here], bounds[1, here]))
        for row, least, greatest, own in zip(effects, *bounds[:, here].tolist(), counts[here], strict=True):
            torch.histc(row, EFFECT_BINS, least, greatest, out=own)
        for side, sign in ((0, 1), (1, -1)):
            values[side, here], ids[side, here] = _strongest(effects.mul_(sign), none, k)
    found = (ids[0], values[0], ids[1], -values[1], *bounds, counts.long())
    return Effects(*(array.cpu().numpy() for array in found))


def _strongest(effects: Tensor, none: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, strongest first: values and places [rows, k]."""
    values, ids = kernels.top_k(effects, none, k)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), ids.gather(1, order)


def neurons(model: TransformerBridge, directions: Tensor, site: str, k: int) -> tuple[Ints, Floats] | None:
    """(neurons, cosines), each [S, k]: those along which a direction lies most, by |cosine|, at an MLP's site.

    Where the site is the neurons themselves (`mlp.hook_post`) a neuron is a coordinate, where it is what the MLP writes
    (`hook_mlp_out`) a row of W_out. None elsewhere, and where the MLP has no W_out of that width.
    """
    name = _place(model, site)
    if NEURONS.fullmatch(name):
        rows = None
    elif found := OF_MLP.fullmatch(name):
        W_out = getattr(model.blocks[int(found[1])].mlp, "W_out", None)  # [N, D]
        if not isinstance(W_out, Tensor) or W_out.ndim != 2 or W_out.shape[1] != directions.shape[1]:
            return None
        rows = _unit(W_out.detach().to(directions.device, torch.float32)).t()
    else:
        return None
    S, n = len(directions), directions.shape[1] if rows is None else rows.shape[1]
    k, none = min(k, n), torch.zeros(n, device=directions.device)
    indices, cosines = torch.empty(S, k, dtype=torch.int64), torch.empty(S, k)
    for start in range(0, S, step := max(1, AT_ONCE // n)):
        cosine = _unit(directions[start : start + step].detach().float())
        cosine = cosine if rows is None else cosine @ rows
        here, (_, top) = slice(start, start + len(cosine)), _strongest(cosine.abs(), none, k)
        indices[here], cosines[here] = top, cosine.gather(1, top)
    return indices.numpy(), cosines.numpy()


def nearest(directions: Tensor, k: int) -> tuple[Ints, Floats]:
    """(indices, cosines), each [S, k']: the latents whose decoder rows are nearest, itself left out; k' = min(k, S − 1)."""
    rows = _unit(directions.detach().float())
    S = len(rows)
    k, none = min(k, S - 1), torch.zeros(S, device=rows.device)
    indices, cosines = torch.empty(S, k, dtype=torch.int64), torch.empty(S, k)
    out = torch.empty(step := min(S, max(1, AT_ONCE // S)), S, device=rows.device)
    for start in range(0, S, step) if k else ():
        some = rows[start : start + step]
        cosine = torch.mm(some, rows.t(), out=out[: len(some)])
        cosine.diagonal(start).fill_(-2.0)
        here = slice(start, start + len(some))
        cosines[here], indices[here] = _strongest(cosine, none, k)
    return indices.numpy(), cosines.numpy()


def encoder_cosine(W_enc: Tensor, directions: Tensor) -> Floats:
    """[S] cosine between each latent's encoder column and its direction; NaN where they live at different widths."""
    if len(W_enc) != directions.shape[1]:
        return np.full(W_enc.shape[1], np.nan, np.float32)
    pairs = zip(W_enc.detach().t().split(4096), directions.detach().split(4096), strict=True)
    cosine = [torch.cosine_similarity(a.float(), b.float(), dim=1) for a, b in pairs]
    return torch.cat(cosine).cpu().numpy()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def writes(model: TransformerBridge, site: str) -> bool:
    """Whether a site is one of its block's places in the residual stream, or of what is added to it, by whichever name."""
    block = BLOCK.fullmatch(site)
    places = {_place(model, f"{block[1]}.{name}") for name in RESIDUAL} if block else set()
    return _place(model, site) in places


def _place(model: TransformerBridge, site: str) -> str:
    """The bridge's own name of a site that may be given as TransformerLens names it."""
    point = model.get_hook_point(site)
    return str(point.name) if point is not None and point.name else site
