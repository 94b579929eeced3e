"""The work of a training step that is not a product: choosing pairs of token and latent, sums over the chosen ones, and what
is done to each latent of each token where none are chosen. And products of a few rows, which are what generation waits for.

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


def segment_sum(
    index: Tensor, weights: Tensor, starts: Tensor, table: Tensor, order: Tensor | None = None
) -> Tensor:
    """Σ over each segment of weights[i], or weights[order[i]], · table[index[i]].

    index, weights, order: [n]; starts [m + 1]; table [R, W] → [m, W].
    """
    if native.usable(index, weights, starts, table):
        out = memory.take((len(starts) - 1, table.shape[1]), table.dtype, table.device)
        m, W = out.shape
        native.call("segment_sum", index, weights, order, starts, m, table, W, out)
        return out
    weights = weights if order is None else weights[order]
    if triton := _triton(weights, table):
        return triton.segment_sum(index, weights, starts, table)
    return F.embedding_bag(
        index, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def segment_total(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Σ over each segment of weights[order[i]]: weights, order [n], starts [m + 1] → [m]."""
    if native.usable(weights, order, starts):
        out = weights.new_empty(len(starts) - 1)
        native.call("segment_total", weights, order, starts, len(out), out)
        return out
    return torch.segment_reduce(weights[order], "sum", offsets=starts, unsafe=True)


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


# Every latent of every token, [S, B]: a row per latent, whose sums are then sums of a row


def jump(p: Tensor, bias: Tensor, threshold: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """In the place of p: f = p + bias where that exceeds its latent's threshold, else 0 → Σ f and how many are positive, [S].

    Where p + bias is less than `half` below the threshold, the zero is −0.0, so that `jump_back` need not see p again. At
    threshold 0 this is ReLU. p: [S, B], bfloat16 or what bias and threshold [S] are; f is rounded as p is, then summed.
    """
    if _takes(p, bias, threshold):
        sums, counts = torch.empty_like(bias), torch.empty_like(bias)
        native.call(_typed("jump", p), p, bias, threshold, half, *p.shape, sums, counts)
        return sums, counts
    v, bound = p + bias[:, None], threshold[:, None]
    below = v <= bound
    v.masked_fill_(below, 0.0).masked_fill_(below & (p + bias[:, None] > bound - half), -0.0)
    p.copy_(v)
    return _positive(p, bias.dtype)


def jump_back(
    f: Tensor, g: Tensor, threshold: Tensor, lift: Tensor, half: float, felt: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂p of `jump` [S, B] of g = ∂f: g + lift where f > 0, and felt · threshold · g more where p is near the threshold.

    And of each latent: Σ ∂p, Σ g where p is near, and how often it is. f, g: [S, B]; threshold, lift: [S].
    """
    out = memory.take(tuple(f.shape), f.dtype, f.device)
    if _takes(f, threshold, lift) and _takes(g):
        sums, near_sums, near_counts = (torch.empty_like(lift) for _ in range(3))
        native.call(
            _typed("jump_back", f), f, g, threshold, lift, half, felt, *f.shape, out, sums, near_sums, near_counts
        )  # fmt: skip
        return out, sums, near_sums, near_counts
    fires, theta = f > 0, threshold[:, None]
    near = fires & (f - theta < half) | (f == 0) & f.signbit()
    there = torch.where(near, g, 0).to(lift.dtype)
    r = torch.where(fires, g + lift[:, None], 0) + felt * theta * there
    return out.copy_(r), r.sum(1), there.sum(1), near.sum(1, dtype=lift.dtype)


def gate(p: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the place of p: gate = ReLU(p + bias) → f = ReLU(a · gate + b) where gate > 0 [S, B], Σ gate, how many f are positive.

    p: [S, B], bfloat16 or what bias, a and b [S] are; the gate is rounded as p is, before it is used.
    """
    f = memory.take(tuple(p.shape), p.dtype, p.device)
    if _takes(p, bias, a, b):
        sums, counts = torch.empty_like(bias), torch.empty_like(bias)
        native.call(_typed("gate", p), p, bias, a, b, *p.shape, f, sums, counts)
        return f, sums, counts
    p.copy_((p + bias[:, None]).relu_())
    f.copy_((a[:, None] * p + b[:, None]).relu_().masked_fill_(p <= 0, 0))
    return f, _positive(p, bias.dtype)[0], _positive(f, bias.dtype)[1]


def gate_back(
    gate: Tensor, g_gate: Tensor, g_f: Tensor, a: Tensor, b: Tensor, lift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂p of `gate` [S, B]: g_gate + lift where the gate is open, and a · g_f more where f > 0.

    And of each latent: Σ ∂p, ∂a and ∂b. gate, g_gate, g_f: [S, B]; a, b, lift: [S].
    """
    out = memory.take(tuple(gate.shape), gate.dtype, gate.device)
    if _takes(gate, a, b, lift) and _takes(g_gate) and _takes(g_f):
        sums, g_a, g_b = (torch.empty_like(lift) for _ in range(3))
        native.call(
            _typed("gate_back", gate), gate, g_gate, g_f, a, b, lift, *gate.shape, out, sums, g_a, g_b
        )  # fmt: skip
        return out, sums, g_a, g_b
    opened = gate > 0
    h = torch.where(opened & (a[:, None] * gate + b[:, None] > 0), g_f, 0).to(lift.dtype)
    r = torch.where(opened, g_gate + lift[:, None], 0) + a[:, None] * h
    return out.copy_(r), r.sum(1), (h * gate).sum(1), h.sum(1)


# Products of a few rows, for which libraries made for many take up to six times as long as the weights need from memory

FEW = 8  # rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b as `torch.nn.Linear` has it: x […, D], weight [S, D], bias [S] → […, S], of x's dtype.

    In inference mode each of up to `FEW` rows comes out as it would alone, bit for bit, summed in float32, where the compiled
    kernels take them.
    """
    if rows := few(x, weight, bias):
        S, D = weight.shape
        out = x.new_empty(*x.shape[:-1], S)
        native.call(_typed("linear", x), x.contiguous(), rows, D, weight, S, bias, out)
        return out
    return F.linear(x, weight, bias)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W + b as GPT-2's Conv1D has it: `linear` with weight [D, S]."""
    if rows := few(x, weight, bias):
        D, S = weight.shape
        out = x.new_empty(*x.shape[:-1], S)
        native.call(_typed("conv1d", x), x.contiguous(), rows, D, weight, S, bias, out)
        return out
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def few(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """How many rows x has, if the compiled kernels take them; else 0.

    They know of no gradient of any kind, so in inference mode only. (Asked for at each layer of each token: so no loops.)
    """
    if not torch.is_inference_mode_enabled():
        return 0
    dtype = x.dtype
    fits = (
        (dtype == torch.float32 or dtype == torch.bfloat16)
        and weight.dtype == dtype
        and x.is_cpu
        and weight.is_cpu
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == dtype and bias.is_cpu and bias.is_contiguous()))
    )
    rows = x.numel() // x.shape[-1] if fits and x.numel() else 0
    return rows if rows <= FEW and native.library() is not None else 0


def _positive(f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each row of f [S, B] the sum of its positive entries, and how many there are, in a dtype."""
    fires = f > 0
    return torch.where(fires, f, 0).sum(1, dtype=dtype), fires.sum(1, dtype=dtype)


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
