"""Where an SAE's latents are looked at: at chosen pairs of token and latent (`Pairs`), or everywhere (`Grid`).

Latents f lie [n] or [B, S], with a graph, and both answer the few questions that objectives ask, so that an objective is
written once, as its paper has it. Of the pre-activations p that exceed some bounds (`Above`), or of all of them (`Grid`):

    f, sums, counts = at.relu()               ReLU(p), its sum over the tokens and on how many it fires, [S]
    f, sums, counts = at.jump(θ, ε)           p · 1[p > θ] likewise
    gate, f, sums, counts = at.gate(a, b)     ReLU(p), ReLU(a p + b) where p > 0, the gate's sums and f's counts
    at.of(vector)                             a vector over latents [S], as f lies
    at.squared_error(f, W_dec, rest)          Σ‖rest − f W_dec‖² and the error [B, E]

After dense encoding only n of the B·S pairs matter, so the gradients of both weight matrices are sums over those pairs,
sorted by latent once and shared. Where the pairs are a large share of B·S, dense products are the faster ones; what lies
between them is then done in one pass over all latents each way.

B tokens, D = d_in, E = d_out, S = d_sae. W_enc [D, S] and W_dec [S, E] both lie in memory as rows per latent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.sae import kernels, memory
from saekit.sae.ranks import ALONE, Ranks

BLOCK = 1024  # latents whose gradient is made and used up while it is in cache, on a CPU


@dataclass(frozen=True)
class Pairs:
    """The chosen (token, latent) pairs, sorted by token."""

    latents: Tensor  # [n] int64
    starts: Tensor  # [B + 1] int64: where each token's pairs start
    d_sae: int  # S, of this process
    ranks: Ranks = ALONE  # whose latents together make x̂

    @classmethod
    def of_rows(cls, latents: Tensor, d_sae: int, ranks: Ranks = ALONE) -> Pairs:
        """The same number of latents for each token: latents [B, K]."""
        B, K = latents.shape
        starts = torch.arange(B + 1, device=latents.device) * K
        return cls(latents.flatten(), starts, d_sae, ranks)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """[n] int64, ascending."""
        B = len(self.starts) - 1
        return torch.repeat_interleave(
            torch.arange(B, device=self.latents.device), self.starts.diff(), output_size=len(self.latents)
        )

    @functools.cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order [n] of the pairs sorted by latent, their tokens [n], where each latent starts [S + 1])."""
        return kernels.by_latent(self.latents, self.tokens, self.d_sae)

    def sum_rows(self, weights: Tensor, table: Tensor) -> Tensor:
        """Σ over the pairs of each latent of weight · table[token]: weights [n], table [B, W] → [S, W]."""
        order, tokens, starts = self.by_latent
        return kernels.segment_sum(tokens, weights, starts, table, order)

    def sum_weights(self, weights: Tensor) -> Tensor:
        """Σ over the pairs of each latent of its weight: [n] → [S]."""
        order, _, starts = self.by_latent
        return kernels.segment_total(weights, order, starts)

    # What objectives ask

    def preactivations(
        self, values: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None
    ) -> Tensor:
        """x W_enc + bias at the pairs, [n], whose values are known, with a graph to W_enc, bias and shift.

        x: [B, D], the shift [D] taken off already (None: there is none).
        """
        return _Preactivations.apply(values, x, W_enc, bias, shift, self)

    def of(self, vector: Tensor) -> Tensor:
        """vector [S] at the pairs, [n]."""
        return _Of.apply(vector, self)

    def squared_error(self, f: Tensor, W_dec: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Σ‖e‖² [] and e [B, E] = rest − Σ f · decoder row, both differentiable; f [n], rest [B, E]."""
        return _SquaredError.apply(f, W_dec, rest, self)

    def counts(self, f: Tensor) -> Tensor:
        """[S] of f [n]: on how many tokens each latent fires, as f is."""
        counts = f.new_zeros(self.d_sae)
        return counts.index_add_(0, self.latents, (f.detach() > 0).to(f.dtype))

    def where(self, kept: Tensor) -> Pairs:
        """The pairs at which kept [n] is true."""
        counts = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
        torch.cumsum(kept, 0, out=counts[1:])
        return Pairs(self.latents[kept], counts[self.starts], self.d_sae, self.ranks)

    def before(self, width: int) -> Tensor:
        """[n] bool: pairs of the first `width` latents of all processes together."""
        return self.latents + self.ranks.latents.rank * self.d_sae < width


@dataclass(frozen=True)
class Above:
    """The pairs whose pre-activation exceeds its latent's bound; what lies below has no part in f, nor in its gradient."""

    pairs: Pairs
    p: Tensor  # [n] with a graph

    def relu(self) -> tuple[Tensor, Tensor, Tensor]:
        """f = ReLU(p) of bounds ≥ 0; sums and counts [S]."""
        return self.p, _Sums.apply(self.p, self.pairs), self.pairs.by_latent[2].diff().to(self.p.dtype)

    def jump(
        self, threshold: Tensor, bandwidth: float, *, felt: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f = p · 1[p > θ] of bounds ≤ θ − ε/2, with the estimators of ∂f/∂θ and ∂counts/∂θ that `jumprelu` has; ∂sums as ∂Σp.

        threshold: θ [S]. bandwidth: ε. felt: p gets the estimator of f, too.
        """
        return _Jump.apply(self.p, threshold, self.pairs, bandwidth, felt)

    def gate(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """gate = ReLU(p) and f = 1[p > 0] ReLU(a p + b) of bounds ≥ 0, sums of the gate and counts of f [S]. a, b: [S]."""
        f = (self.of(a) * self.p + self.of(b)).relu()
        return self.p, f, _Sums.apply(self.p, self.pairs), self.pairs.counts(f)

    def of(self, vector: Tensor) -> Tensor:
        return self.pairs.of(vector)

    def squared_error(self, f: Tensor, W_dec: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs.squared_error(f, W_dec, rest)


@dataclass(frozen=True)
class Grid:
    """Every pair. What is asked is what `Above` is asked, of latents [B, S], which lie in memory as rows per latent.

    Products are taken of operands rounded to `dtype`, in which the latents are; sums and what leaves the grid are as the
    weights are.
    """

    x: Tensor  # [B, D], the shift taken off
    W_enc: Tensor
    bias: Tensor
    shift: Tensor | None  # [D] what was taken off x, which gets its gradient
    dtype: torch.dtype
    ranks: Ranks = ALONE  # whose latents together make x̂

    def relu(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.jump(torch.zeros_like(self.bias), 0.0)  # a jump where there is nothing to jump

    def jump(
        self, threshold: Tensor, bandwidth: float, *, felt: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _DenseJump.apply(self.W_enc, self.bias, self.shift, threshold, self, bandwidth, felt)

    def gate(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _DenseGate.apply(self.W_enc, self.bias, self.shift, a, b, self)

    def of(self, vector: Tensor) -> Tensor:
        return vector.to(self.dtype)

    def squared_error(self, f: Tensor, W_dec: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pairs.squared_error`, of f [B, S]."""
        return _DenseError.apply(f, W_dec, rest, self)


At = Above | Grid


class _Preactivations(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None, pairs: Pairs
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.pairs, ctx.shifted = pairs, shift is not None
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        g_bias = ctx.pairs.sum_weights(g_n)
        g_W = ctx.pairs.sum_rows(g_n, x).t()
        return None, None, g_W, g_bias, -(W_enc @ g_bias) if ctx.shifted else None, None


class _Of(Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return vector[pairs.latents]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pairs.sum_weights(g_n), None


class _Sums(Function):
    """Of each latent the sum of its pairs' values: [n] → [S]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return pairs.sum_weights(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g[ctx.pairs.latents], None


class _Jump(Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, threshold: Tensor, pairs: Pairs, bandwidth: float, felt: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        distance = p - threshold[pairs.latents]
        fires, near = distance > 0, distance.abs() < bandwidth / 2
        ctx.save_for_backward(threshold, fires, near)
        ctx.pairs, ctx.bandwidth, ctx.felt = pairs, bandwidth, felt
        f = torch.where(fires, p, 0)
        return f, pairs.sum_weights(f), pairs.sum_weights(fires.to(p.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_f: Tensor, g_sums: Tensor, g_counts: Tensor) -> tuple[Tensor | None, ...]:
        threshold, fires, near = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        there, slope = torch.where(near, g_f, 0), threshold / ctx.bandwidth
        g_p = torch.where(fires, g_f + g_sums[pairs.latents], 0)
        if ctx.felt:
            g_p += slope[pairs.latents] * there
        g_threshold = slope * pairs.sum_weights(there)
        g_threshold += g_counts / ctx.bandwidth * pairs.sum_weights(near.to(g_f.dtype))
        return g_p, -g_threshold, None, None, None


class _SquaredError(Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, W_dec: Tensor, rest: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        at = pairs.tokens, pairs.latents, pairs.starts
        if pairs.ranks.latents.size == 1:
            error, squares, dots = kernels.decode_error(*at, f, W_dec, rest.contiguous())
        else:
            error = rest - pairs.ranks.latents.sum_(
                kernels.segment_sum(pairs.latents, f, pairs.starts, W_dec)
            )
            squares, dots = error.square().sum(1), kernels.pair_dots(*at, error, W_dec)
        ctx.save_for_backward(f, W_dec, error, dots)
        ctx.pairs = pairs
        ctx.set_materialize_grads(False)
        return squares.sum(), error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_sum: Tensor | None, g_error: Tensor | None) -> tuple[Tensor | None, ...]:
        f, W_dec, error, dots = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        factor = 0.0 if g_sum is None else 2 * g_sum  # ∂ Σ‖e‖² / ∂e = 2e
        if g_error is None:  # then the sums over e need no second table
            g_rest, g_f, weights, table = factor * error, -factor * dots, -factor * f, error
        else:
            g_rest = table = g_error.contiguous() + factor * error
            g_f, weights = -kernels.pair_dots(pairs.tokens, pairs.latents, pairs.starts, table, W_dec), -f
        g_W = pairs.sum_rows(weights, table) if ctx.needs_input_grad[1] else None
        return g_f, g_W, g_rest if ctx.needs_input_grad[2] else None, None


class _DenseJump(Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        threshold: Tensor,
        grid: Grid,
        bandwidth: float,
        felt: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, f = _encoded(grid)
        sums, counts = kernels.jump(f, bias, threshold, bandwidth / 2)
        ctx.save_for_backward(x, W_enc, threshold, f)
        ctx.shifted, ctx.bandwidth, ctx.felt = shift is not None, bandwidth, felt
        return f.t(), sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_f: Tensor, g_sums: Tensor, g_counts: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, threshold, f = ctx.saved_tensors
        rate = 1 / ctx.bandwidth if ctx.bandwidth else 0.0
        g = g_f.to(f.dtype).t().contiguous()

        def back(some: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            felt = rate if ctx.felt else 0.0
            return kernels.jump_back(f[some], g[some], threshold[some], g_sums[some], ctx.bandwidth / 2, felt)

        g_W, g_bias, near_sums, near_counts = _into_encoder(back, x, W_enc)
        g_threshold = -rate * (threshold * near_sums + g_counts * near_counts)
        return g_W, g_bias, _into_shift(ctx, W_enc, g_bias), g_threshold, None, None, None


class _DenseGate(Function):
    @staticmethod
    def forward(
        ctx: Any, W_enc: Tensor, bias: Tensor, shift: Tensor | None, a: Tensor, b: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, gate = _encoded(grid)
        f, sums, counts = kernels.gate(gate, bias, a, b)
        ctx.save_for_backward(x, W_enc, a, b, gate)
        ctx.shifted = shift is not None
        ctx.mark_non_differentiable(counts)
        return gate.t(), f.t(), sums, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, a, b, gate = ctx.saved_tensors
        g_gate, g_f = (g.to(gate.dtype).t().contiguous() for g in given[:2])
        g_sums = given[2]

        def back(some: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return kernels.gate_back(gate[some], g_gate[some], g_f[some], a[some], b[some], g_sums[some])

        g_W, g_bias, g_a, g_b = _into_encoder(back, x, W_enc)
        return g_W, g_bias, _into_shift(ctx, W_enc, g_bias), g_a, g_b, None


class _DenseError(Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, W_dec: Tensor, rest: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        rows = rounded(W_dec, grid.dtype)
        error = rest - grid.ranks.latents.sum((f @ rows).to(rest.dtype))
        ctx.save_for_backward(f, rows, error)
        ctx.set_materialize_grads(False)
        return error.square().sum(), error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_sum: Tensor | None, g_error: Tensor | None) -> tuple[Tensor | None, ...]:
        f, rows, error = ctx.saved_tensors
        g_rest = torch.zeros_like(error) if g_sum is None else 2 * g_sum * error
        if g_error is not None:
            g_rest += g_error
        g, g_W = -g_rest.to(f.dtype), None
        if ctx.needs_input_grad[1]:
            g_W = memory.take(tuple(rows.shape), error.dtype, rows.device)
            product(f.t(), g, g_W)
        g_f = memory.take((len(rows), len(g)), f.dtype, f.device)
        return product(rows, g.t(), g_f).t(), g_W, g_rest if ctx.needs_input_grad[2] else None, None


def rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [m, n] in `dtype`: themselves, or a copy."""
    rows = rows.detach()
    return rows if rows.dtype == dtype else memory.take(tuple(rows.shape), dtype, rows.device).copy_(rows)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, taken in their dtype, in `out`, whatever that one's is."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return out.copy_(torch.mm(a, b, out=memory.take(tuple(out.shape), a.dtype, a.device)))


def _encoded(grid: Grid) -> tuple[Tensor, Tensor]:
    """x [B, D] in the grid's dtype, and its product with the encoder [S, B]."""
    x, rows = grid.x.to(grid.dtype), rounded(grid.W_enc.t(), grid.dtype)
    return x, product(rows, x.t(), memory.take((len(rows), len(x)), grid.dtype, x.device))


def _into_encoder(
    back: Callable[[slice], tuple[Tensor, Tensor, Tensor, Tensor]], x: Tensor, W_enc: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂W_enc [D, S], and what else `back` says of some latents: their ∂p [m, B], and three vectors [m]."""
    S = W_enc.shape[1]
    g_W = memory.take((S, len(W_enc)), W_enc.dtype, W_enc.device)
    vectors = []
    block = S if x.is_cuda else BLOCK
    for start in range(0, S, block):
        some = slice(start, start + block)
        g_p, *found = back(some)
        product(g_p, x, g_W[some])
        vectors.append(found)
    one, two, three = (torch.cat(parts) for parts in zip(*vectors, strict=True))
    return g_W.t(), one, two, three


def _into_shift(ctx: Any, W_enc: Tensor, g_bias: Tensor) -> Tensor | None:
    return -(W_enc @ g_bias) if ctx.shifted else None
