"""The two sparse kernels of training: pre-activations at chosen latents, and the decoder over chosen latents.

Dense encoding is one matmul; after the choice of latents only n of the B·S pairs matter, so the gradients of both
weight matrices are sums over those pairs. The pairs are sorted by latent once and shared. Tokens may have different
numbers of latents, as BatchTopK gives them. `*_plain` are the twins that plain autograd differentiates; tests compare
values and every gradient.

B tokens, D = d_in, E = d_out, S = d_sae, n pairs. W_enc [D, S] and W_dec [S, E] both lie in memory as rows per latent,
which is what makes the segment sums contiguous.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SUM = 0  # embedding_bag's mode


@dataclass(frozen=True)
class Pairs:
    """The chosen (token, latent) pairs, sorted by token."""

    tokens: Tensor  # [n] int64, ascending
    latents: Tensor  # [n] int64
    n_tokens: int  # B
    d_sae: int  # S

    @classmethod
    def of_rows(cls, latents: Tensor, d_sae: int) -> Pairs:
        """The same number of latents for each token: latents [B, K]."""
        B, K = latents.shape
        tokens = torch.arange(B, device=latents.device).repeat_interleave(K)
        return cls(tokens, latents.flatten(), B, d_sae)

    def where(self, kept: Tensor) -> Pairs:
        """The pairs at which kept [n] is true."""
        return Pairs(self.tokens[kept], self.latents[kept], self.n_tokens, self.d_sae)

    @functools.cached_property
    def starts(self) -> Tensor:
        """[B]: where each token's pairs start."""
        return torch.searchsorted(self.tokens, torch.arange(self.n_tokens, device=self.tokens.device))

    @functools.cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order [n] of the pairs sorted by latent, their tokens [n], where each latent starts [S])."""
        in_order, order = torch.sort(self.latents, stable=True)
        starts = torch.searchsorted(in_order, torch.arange(self.d_sae, device=order.device))
        return order, self.tokens[order], starts

    def sum_rows(self, weights: Tensor, table: Tensor) -> Tensor:
        """Σ over the pairs of each latent of weight · table[token]: weights [n], table [B, D] → [S, D]."""
        order, tokens, starts = self._by_latent
        return F.embedding_bag(tokens, table, starts, mode="sum", per_sample_weights=weights[order])

    def sum_weights(self, weights: Tensor) -> Tensor:
        """Σ over the pairs of each latent of its weight: [n] → [S]."""
        order, _, starts = self._by_latent
        return F.embedding_bag(order, weights.reshape(-1, 1), starts, mode="sum").squeeze(1)


class _PreactsAt(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None, pairs: Pairs
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, shift)
        ctx.pairs = pairs
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_n: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, shift = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        g_W = pairs.sum_rows(g_n, x if shift is None else x - shift).t()  # Σ g · (x − shift)
        g_bias = pairs.sum_weights(g_n)
        g_x = None
        if ctx.needs_input_grad[1]:
            g_x = F.embedding_bag(pairs.latents, W_enc.t(), pairs.starts, mode="sum", per_sample_weights=g_n)
        return None, g_x, g_W, g_bias, None if shift is None else -(W_enc @ g_bias), None


def preacts_at(
    p: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None, pairs: Pairs
) -> Tensor:
    """Pre-activations (x − shift) W_enc + bias at the chosen pairs, [n], differentiable in all but p.

    p: all pre-activations [B, S], computed without a graph. x: [B, D]. shift: [D], or None for none.
    """
    return _PreactsAt.apply(p[pairs.tokens, pairs.latents], x, W_enc, bias, shift, pairs)


def preacts_at_plain(
    p: Tensor, x: Tensor, W_enc: Tensor, bias: Tensor, shift: Tensor | None, pairs: Pairs
) -> Tensor:
    """The twin of `preacts_at`: the dense matmul, then a gather."""
    dense = (x if shift is None else x - shift) @ W_enc + bias
    return dense[pairs.tokens, pairs.latents]


class _DecodeAt(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return F.embedding_bag(pairs.latents, W_dec, pairs.starts, mode="sum", per_sample_weights=values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BE: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        g_BE = g_BE.contiguous()
        g_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            g_BE, W_dec, pairs.latents, pairs.starts, pairs.tokens, SUM
        )
        return g_values, pairs.sum_rows(values, g_BE), None


def decode_at(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """Σ over the chosen latents of value · decoder row: [n] → [B, E], differentiable in both."""
    return _DecodeAt.apply(values, W_dec, pairs)


def decode_at_plain(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """The twin of `decode_at`: scatter to [B, S], then the dense matmul."""
    f_BS = torch.zeros(pairs.n_tokens, pairs.d_sae, dtype=values.dtype, device=values.device)
    return f_BS.index_put((pairs.tokens, pairs.latents), values) @ W_dec
