"""Which pairs of token and latent a step looks at: dense encoding a tile of tokens at a time, and the choice from it.

Pre-activations of a tile stay in cache and go with it, so that no [B, S] tensor is ever held on a CPU; a GPU takes the
batch as one tile. Operands are rounded to `dtype` (bfloat16 where the processor multiplies it natively), sums are
float32, and the bias is added in float32.

B tokens, D = d_in, S = d_sae, n chosen pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saekit.sae import kernels, memory
from saekit.sae.pairs import Above, At, Grid, Pairs, rounded
from saekit.sae.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from saekit.sae.model import SAE

TILE = 512  # tokens: fewer make the product slower, more no longer fit the cache
FIRST = 128  # tokens that tell how many pairs exceed their bounds
DENSE = 1 / 12  # share of all pairs from which dense products beat sums over pairs (LOG.md, November 2026)
SAMPLE, MARGIN = 64, 1.5  # BatchTopK: tokens that say where to cut, and pairs to collect for each one wanted


def top_k(sae: SAE, x: Tensor, k: int, dtype: torch.dtype, ranks: Ranks = ALONE) -> tuple[Pairs, Tensor]:
    """The k largest pre-activations of each token of x [B, D] → pairs, and p [n] with a graph."""
    shifted = _shifted(sae, x)
    bias = sae.encoder_bias.detach()
    own = min(k, len(bias))
    values, latents = _top_k(_tiles(sae, shifted, dtype), bias, own, len(x))
    return _of_all(sae, shifted, values, Pairs.of_rows(latents, len(bias), ranks), k)


def largest(sae: SAE, x: Tensor, n: int, dtype: torch.dtype, ranks: Ranks = ALONE) -> tuple[Pairs, Tensor]:
    """The n largest pre-activations of all tokens of x [B, D] together → pairs, and p [n] with a graph.

    Some tokens tell a bound that more than n exceed; what exceeds it is collected, and cut exactly.
    """
    shifted, bias = _shifted(sae, x), sae.encoder_bias.detach()
    choose = _largest_without_waiting if x.is_cuda else _largest

    def own(n: int) -> Chosen:
        if n == 0:  # a process may have no rows of a batch
            none = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
            return bias[:0], none[:0], none
        return choose(lambda: _tiles(sae, shifted, dtype), bias, n, len(x))

    values, latents, starts = own(n) if ranks.alone else _largest_of_all(own, n, len(x) * len(bias), ranks)
    return _with_graph(sae, shifted, values, Pairs(latents, starts, len(bias), ranks))


def above(sae: SAE, x: Tensor, bounds: Tensor, dtype: torch.dtype, ranks: Ranks = ALONE) -> At:
    """The pre-activations of x [B, D] that exceed their latent's bound [S], with a graph.

    All of them (`Grid`), where the first tokens have too many, and on a GPU, which would have to wait for their number.
    """
    shifted, bias = _shifted(sae, x), sae.encoder_bias.detach()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for tile in () if x.is_cuda else _tiles(sae, shifted, dtype, first=FIRST):
        found.append(kernels.above(tile, bias, bounds))
        if len(found) == 1 and len(found[0][0]) > DENSE * tile.numel():
            found.clear()
            break
    if not found:
        return Grid(shifted, sae.W_enc, sae.encoder_bias, sae.shift, dtype, ranks)
    values, latents, starts = _joined(found)
    return Above(*_with_graph(sae, shifted, values, Pairs(latents, starts, len(bias), ranks)))


def at_latents(
    sae: SAE, x: Tensor, latents: Tensor, k: int, dtype: torch.dtype, ranks: Ranks = ALONE
) -> tuple[Pairs, Tensor]:
    """The k largest (or all) of each token's pre-activations at some latents [m] → pairs, and p [B · k] with a graph.

    A latent of −1 is none: its pre-activation is −∞, wherever it points.
    """
    none, latents = latents < 0, latents.clamp_min(0)
    shifted, bias = _shifted(sae, x), sae.encoder_bias.detach()[latents].masked_fill(none, -torch.inf)
    own = min(k, len(latents))
    values, chosen = _top_k(_tiles(sae, shifted, dtype, latents), bias, own, len(x))
    return _of_all(sae, shifted, values, Pairs.of_rows(latents[chosen], len(sae.encoder_bias), ranks), k)


def _shifted(sae: SAE, x: Tensor) -> Tensor:
    return x if sae.shift is None else x - sae.shift.detach()


def _with_graph(sae: SAE, shifted: Tensor, values: Tensor, pairs: Pairs) -> tuple[Pairs, Tensor]:
    return pairs, pairs.preactivations(values, shifted, sae.W_enc, sae.encoder_bias, sae.shift)


@torch.no_grad()
def _tiles(
    sae: SAE, shifted: Tensor, dtype: torch.dtype, latents: Tensor | None = None, *, first: int | None = None
) -> Iterator[Tensor]:
    """Products with the encoder (at some latents [m]), without its bias: [T, S or m] in `dtype`, a tile of tokens at a time.

    The next tile overwrites the last one. first: tokens of the first one, should it be smaller.
    """
    rows = rounded(sae.W_enc.t() if latents is None else sae.W_enc.t()[latents], dtype)
    B = len(shifted)
    tokens = B if shifted.is_cuda else min(TILE, B)
    out = memory.take((tokens, len(rows)), dtype, rows.device)
    # A process may have no rows of a batch: then there is one empty tile.
    starts = [0, *range(max(1, min(first or tokens, tokens)), B, max(1, tokens))]
    for start, end in pairwise([*starts, B]):
        tile = shifted[start:end].to(dtype)
        yield torch.mm(tile, rows.t(), out=out[: len(tile)])


def _top_k(tiles: Iterator[Tensor], bias: Tensor, k: int, B: int) -> tuple[Tensor, Tensor]:
    """The k largest of each of B tokens: values and latents [B, k]."""
    values, latents = (memory.take((B, k), dtype, bias.device) for dtype in (bias.dtype, torch.int64))
    start = 0
    for tile in tiles:
        end = start + len(tile)
        values[start:end], latents[start:end] = kernels.top_k(tile, bias, k)
        start = end
    return values, latents


def _joined(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(values, latents, starts) of several tiles as of one."""
    values, latents, starts = zip(*found, strict=True)
    if len(found) == 1:
        return found[0]
    counts = torch.cat([part.diff() for part in starts])
    joined = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=joined[1:])
    return torch.cat(values), torch.cat(latents), joined


def _of_all(sae: SAE, shifted: Tensor, values: Tensor, pairs: Pairs, k: int) -> tuple[Pairs, Tensor]:
    """Of each token's largest, values [B, own], those among the k largest of all processes; of equals the lower latents."""
    group = pairs.ranks.latents
    if group.size > 1:
        width = min(k, pairs.d_sae)
        padded = F.pad(values, (0, width - values.shape[1]), value=-torch.inf)
        offered = torch.cat(group.gather(padded), 1)
        no_bias = offered.new_zeros(offered.shape[1])
        chosen = kernels.top_k(offered, no_bias, min(k, offered.shape[1]))[1]
        kept = torch.zeros_like(offered, dtype=torch.bool).scatter_(1, chosen, True)
        kept = kept[:, group.rank * width :][:, : values.shape[1]].flatten()
        values, pairs = values.flatten()[kept], pairs.where(kept)
    return _with_graph(sae, shifted, values.flatten(), pairs)


Chosen = tuple[Tensor, Tensor, Tensor]  # values [n], latents [n], each token's first [B + 1]


def _largest_of_all(own: Callable[[int], Chosen], n: int, pairs: int, ranks: Ranks) -> Chosen:
    """This process's among the n largest of all processes'; of equals those of the first processes.

    own: the n largest of this process, which looks at so many `pairs`. Each offers somewhat more than its share, and all
    that it may have to give only where that turns out to be too little.
    """
    world = ranks.world
    for offer in (round(MARGIN * n / world.size) + 1, n):
        values, latents, starts = own(min(offer, pairs))
        padded = F.pad(values, (0, offer - len(values)), value=-torch.inf)
        offered = torch.stack(world.gather(padded))
        last = offered.flatten().topk(n).values[-1]
        if offer == n or not bool((offered.amin(1) > last).any()):
            break
    equal = (offered == last).sum(1)
    wanted = n - int((offered > last).sum()) - int(equal[: world.rank].sum())
    kept = values > last
    kept[(values == last).nonzero().squeeze(1)[: max(0, wanted)]] = True
    counts = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept, 0, out=counts[1:])
    return values[kept], latents[kept], counts[starts]


def _largest(tiles: Callable[[], Iterator[Tensor]], bias: Tensor, n: int, B: int) -> Chosen:
    """The n largest of p + bias, sorted by token and latent; of equals the first."""
    sample, wanted = bias[:0], 0
    while True:
        found, bounds = [], None
        for tile in tiles():
            if wanted == 0:
                sample = (tile[:: -(-len(tile) // SAMPLE)] + bias).flatten()
                wanted = round(MARGIN * n * len(sample) / (B * len(bias))) + 1
            if bounds is None:
                all_of_it = wanted >= len(sample)
                bound = sample.new_full((), -torch.inf) if all_of_it else kernels.kth_largest(sample, wanted)
                bounds = bound.expand(len(bias)).contiguous()
            found.append(kernels.above(tile, bias, bounds))
        values, latents, starts = _joined(found)
        if len(values) >= n:
            break
        if wanted >= len(sample):  # NaN among them: the loss will say so
            return values, latents, starts
        wanted *= 4  # the sample has more than its share
    last = kernels.kth_largest(values, n)
    kept = values > last
    equal = (values == last).nonzero().squeeze(1)
    kept[equal[: n - int(kept.sum())]] = True
    counts = torch.zeros(len(kept) + 1, dtype=torch.int64)
    torch.cumsum(kept, 0, out=counts[1:])
    return values[kept], latents[kept], counts[starts]


def _largest_without_waiting(tiles: Callable[[], Iterator[Tensor]], bias: Tensor, n: int, B: int) -> Chosen:
    """`_largest` with sizes that are known beforehand, so that a GPU is never asked how many there are.

    Each token offers the largest of its own, a few times the average; their n-th largest is no more than that of all, and
    what reaches it is collected, up to half more than n. Exact unless a third of the pairs goes to tokens that have more
    than they could offer.
    """
    (p,) = tiles()
    q, S = p + bias, len(bias)
    offered = kernels.top_k(p, bias, min(S, 4 * -(-n // B) + 16))[0]
    bound = offered.flatten().topk(n).values[-1]
    places = torch.nonzero_static(q.flatten() >= bound, size=round(MARGIN * n), fill_value=-1).squeeze(1)
    values = torch.where(places >= 0, q.flatten()[places], -torch.inf)
    places = (
        places[values.topk(n).indices].sort().values.clamp_min(0)
    )  # −1 where NaN is: the loss will say so
    starts = torch.searchsorted(places, torch.arange(B + 1, device=p.device) * S)
    return q.flatten()[places], places % S, starts
