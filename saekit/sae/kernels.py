"""The sparse work of a training step: choosing pairs of token and latent, and the sums over the chosen ones.

Every function says what it computes in plain torch, and is that wherever nothing better is at hand; on a CPU with a
compiler it is `native.cpp`, on a GPU with Triton `triton_kernels.py`, equal to rounding. Nothing here knows of autograd
(`sae.pairs`) or of SAEs.

B tokens, S = d_sae, W a row's width, n pairs. Segments: segment j holds the entries starts[j] … starts[j + 1] − 1.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from saekit.sae import memory, native


def top_k(p: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of p + bias in each row, by ascending latent: values [B, k] and latents [B, k].

    p: [B, S], bfloat16 or what bias [S] is. On the CPU, of equals the lower latents.
    """
    if _takes(p, bias):
        B, S = p.shape
        values, latents = bias.new_empty(B, k), torch.empty(B, k, dtype=torch.int64)
        native.call(_typed("top_k", p), p, S, bias, B, S, k, values, latents)
        return values, latents
    triton = _triton(bias) if p.is_contiguous() else None
    if triton and triton.group_size(p.shape[1], k) is not None:
        return triton.top_k(p, bias, k)
    q = p + bias  # float32, should p be bfloat16
    latents = q.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return q.gather(1, latents), latents


def above(p: Tensor, bias: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of p + bias that exceed their latent's bound: values [n], latents [n], and each row's first, [B + 1].

    p: [B, S], bfloat16 or what bias is. bias, bounds: [S].
    """
    B, S = p.shape
    starts = torch.zeros(B + 1, dtype=torch.int64, device=p.device)
    if _takes(p, bias, bounds):
        name, counts = _typed("above", p), torch.empty(B, dtype=torch.int64)
        native.call(name, p, S, bias, bounds, B, S, counts, None, None, None)
        torch.cumsum(counts, 0, out=starts[1:])
        n = int(starts[-1])
        values, latents = bias.new_empty(n), torch.empty(n, dtype=torch.int64)
        native.call(name, p, S, bias, bounds, B, S, None, starts, values, latents)
        return values, latents, starts
    q = p + bias
    chosen = q > bounds
    torch.cumsum(chosen.sum(1), 0, out=starts[1:])
    latents = chosen.nonzero()[:, 1]
    return q[chosen], latents, starts


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest, [], of values [n]."""
    if native.usable(values):
        out = values.new_empty(())
        native.call("kth_largest_of", values, len(values), k, out)
        return out
    return values.kthvalue(len(values) - k + 1).values


def by_latent(latents: Tensor, tokens: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by latent, those of a latent in their order: (order [n], their tokens [n], each latent's first, [S + 1])."""
    if native.usable(latents, tokens):
        order, theirs = torch.empty_like(latents), torch.empty_like(latents)
        starts = torch.empty(d_sae + 1, dtype=torch.int64)
        native.call("by_latent", latents, tokens, len(latents), d_sae, order, theirs, starts)
        return order, theirs, starts
    in_order, order = torch.sort(latents, stable=True)
    starts = torch.searchsorted(in_order, torch.arange(d_sae + 1, device=order.device))
    return order, tokens[order], starts


def segment_sum(index: Tensor, weights: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Σ over each segment of weights[i] · table[index[i]]: index, weights [n], starts [m + 1], table [R, W] → [m, W]."""
    if native.usable(index, weights, starts, table):
        out = memory.take((len(starts) - 1, table.shape[1]), table.dtype, table.device)
        native.call("segment_sum", index, weights, starts, len(starts) - 1, table, table.shape[1], out)
        return out
    if triton := _triton(weights, table):
        return triton.segment_sum(index, weights, starts, table)
    return F.embedding_bag(
        index, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def pair_dots(tokens: Tensor, latents: Tensor, starts: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a[token] · b[latent] of each pair: a [B, W], b [S, W], starts [B + 1] of each token's pairs → [n]."""
    if native.usable(latents, starts, a, b):
        out = a.new_empty(len(latents))
        native.call("pair_dots", latents, starts, len(a), a, b, a.shape[1], out)
        return out
    if triton := _triton(a, b):
        return triton.pair_dots(tokens, latents, a, b)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, latents, starts[:-1], tokens, 0)


def decode_error(
    tokens: Tensor, latents: Tensor, starts: Tensor, values: Tensor, rows: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the chosen latents leave of `rest`: error = rest − Σ value · row [B, W], its squared norm [B], and
    error[token] · row[latent] of each pair [n].

    rows: [S, W]. rest: [B, W]. values: [n].
    """
    if native.usable(latents, starts, values, rows, rest):
        error, squares, dots = torch.empty_like(rest), rest.new_empty(len(rest)), torch.empty_like(values)
        native.call(
            "decode_error",
            latents,
            values,
            starts,
            len(rest),
            rows,
            rows.shape[1],
            rest,
            error,
            squares,
            dots,
        )
        return error, squares, dots
    if triton := _triton(values, rows, rest):
        return triton.decode_error(tokens, latents, starts, values, rows, rest)
    error = rest - segment_sum(latents, values, starts, rows)
    return error, error.square().sum(1), pair_dots(tokens, latents, starts, error, rows)


def _triton(*tensors: Tensor) -> ModuleType | None:
    """The Triton kernels, where they can take these tensors: contiguous float32 on a GPU."""
    if all(t.is_cuda and t.is_contiguous() and t.dtype == torch.float32 for t in tensors) and has_triton():
        from saekit.sae import triton_kernels

        return triton_kernels
    return None


def _takes(p: Tensor, *vectors: Tensor) -> bool:
    """Whether the compiled kernels take pre-activations p and vectors over the latents."""
    fits = p.device.type == "cpu" and p.is_contiguous() and p.dtype in (torch.float32, torch.bfloat16)
    return fits and native.usable(*vectors)


def _typed(name: str, p: Tensor) -> str:
    return f"{name}_bf16" if p.dtype == torch.bfloat16 else f"{name}_f32"
