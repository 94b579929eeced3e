"""Where an SAE's latents are looked at: at chosen pairs of token and latent (`Pairs`), or everywhere (`Grid`).

Both carry pre-activations with a graph, and both answer the few questions that objectives ask, so that an objective is
written once, as its paper has it:

    p                                   the pre-activations looked at, [n] or [B, S]
    at.of(vector)                       a vector over latents [S], as p lies
    at.total(f, vector)                 Σ f · vector[latent]
    at.squared_error(f, W_dec, rest)    Σ‖rest − f W_dec‖² and the error [B, E]
    at.fired(mask)                      which latents fired, [S]

After dense encoding only n of the B·S pairs matter, so the gradients of both weight matrices are sums over those pairs,
sorted by latent once and shared. Where the pairs are a large share of B·S, dense products are the faster ones.

B tokens, D = d_in, E = d_out, S = d_sae. W_enc [D, S] and W_dec [S, E] both lie in memory as rows per latent.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.sae import kernels
from saekit.sae.ranks import ALONE, Ranks


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
        return kernels.segment_sum(tokens, weights[order], starts, table)

    def sum_weights(self, weights: Tensor) -> Tensor:
        """Σ over the pairs of each latent of its weight: [n] → [S]."""
        order, _, starts = self.by_latent
        return torch.segment_reduce(weights[order], "sum", offsets=starts, unsafe=True)

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

    def total(self, f: Tensor, vector: Tensor) -> Tensor:
        """Σ f · vector[latent], []: f [n], vector [S]."""
        return (f * self.of(vector)).sum()

    def squared_error(self, f: Tensor, W_dec: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Σ‖e‖² [] and e [B, E] = rest − Σ f · decoder row, both differentiable; f [n], rest [B, E]."""
        return _SquaredError.apply(f, W_dec, rest, self)

    def fired(self, fires: Tensor) -> Tensor:
        """[S] bool: latents with a pair at which `fires` [n] is true."""
        counts = torch.zeros(self.d_sae, dtype=torch.int32, device=fires.device)
        return counts.index_add_(0, self.latents, fires.int()) > 0

    def where(self, kept: Tensor) -> Pairs:
        """The pairs at which kept [n] is true."""
        counts = torch.zeros(len(kept) + 1, dtype=torch.int64, device=kept.device)
        torch.cumsum(kept, 0, out=counts[1:])
        return Pairs(self.latents[kept], counts[self.starts], self.d_sae, self.ranks)

    def before(self, width: int) -> Tensor:
        """[n] bool: pairs of the first `width` latents of all processes together."""
        return self.latents + self.ranks.latents.rank * self.d_sae < width


@dataclass(frozen=True)
class Grid:
    """Every pair, as [B, S] of `dtype`, in which products are taken; sums and what leaves the grid are as the weights are."""

    dtype: torch.dtype
    ranks: Ranks = ALONE  # whose latents together make x̂

    def preactivations(self, x: Tensor, W_enc: Tensor, bias: Tensor) -> Tensor:
        """x W_enc + bias [B, S] with a graph; a shift comes off x with one, too."""
        return _Biased.apply(_Product.apply(x, W_enc, self.dtype, self.dtype), bias)

    def of(self, vector: Tensor) -> Tensor:
        return vector.to(self.dtype)

    def total(self, f: Tensor, vector: Tensor) -> Tensor:
        return (f @ self.of(vector)).sum(dtype=vector.dtype)

    def squared_error(self, f: Tensor, W_dec: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pairs.squared_error`, of f [B, S]."""
        error = rest - self.ranks.latents.summed(_Product.apply(f, W_dec, self.dtype, rest.dtype))
        return error.square().sum(), error

    def fired(self, fires: Tensor) -> Tensor:
        return fires.any(0)


At = Pairs | Grid


class _Preactivations(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None, pairs: Pairs
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.pairs, ctx.shifted = pairs, shift is not None
        return values.clone()

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


class _Biased(Function):
    """p + bias [B, S], in the place of p; the bias' gradient is a product, which is faster than a sum of bfloat16 columns."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, bias: Tensor) -> Tensor:
        ctx.type = bias.dtype
        ctx.mark_dirty(p)
        return p.add_(bias.to(p.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, (g.new_ones(1, len(g)) @ g).squeeze(0).to(ctx.type)


class _Product(Function):
    """a b [m, n] of operands rounded to `dtype`, as `result` dtype; the same rounding in the gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype, result: torch.dtype) -> Tensor:
        ctx.types = a.dtype, b.dtype
        a, b = a.to(dtype), b.to(dtype)
        ctx.save_for_backward(a, b)
        return (a @ b).to(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        a_type, b_type = ctx.types
        g = g.to(a.dtype)
        g_a = (g @ b.t()).to(a_type) if ctx.needs_input_grad[0] else None
        g_b = None
        if ctx.needs_input_grad[1]:  # lies in memory as b lies, or adding it to the weight's would copy it
            g_b = ((g.t() @ a).t() if b.t().is_contiguous() else a.t() @ g).to(b_type)
        return g_a, g_b, None, None
