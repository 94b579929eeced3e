"""The two sparse kernels of training: pre-activations at chosen latents, and the decoder over chosen latents.

Dense encoding is one matmul; after the choice of K latents per token only B·K of the B·S pairs matter, so the
gradients of both weight matrices are sums over those pairs. The pairs are sorted by latent once and shared.
`*_plain` are the twins that plain autograd differentiates; tests compare values and every gradient.

B tokens, D = d_in, S = d_sae, K chosen latents per token. W_enc [D, S] and W_dec [S, D] both lie in memory
as rows of D per latent, which is what makes the segment sums contiguous.
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
    """The (token, latent) pairs of a choice of latents [B, K] out of S."""

    latents: Tensor  # [B, K] int64
    d_sae: int

    @functools.cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """(order [B·K] of the pairs sorted by latent, their tokens [B·K], where each latent starts [S])."""
        flat = self.latents.flatten()
        in_order, order = torch.sort(flat, stable=True)
        starts = torch.searchsorted(in_order, torch.arange(self.d_sae, device=flat.device))
        return order, order // self.latents.shape[1], starts

    def sum_rows(self, weights: Tensor, table: Tensor) -> Tensor:
        """Σ over the pairs of each latent of weight · table[token]: weights [B, K], table [B, D] → [S, D]."""
        order, tokens, starts = self._by_latent
        return F.embedding_bag(tokens, table, starts, mode="sum", per_sample_weights=weights.flatten()[order])

    def sum_weights(self, weights: Tensor) -> Tensor:
        """Σ over the pairs of each latent of its weight: [B, K] → [S]."""
        order, _, starts = self._by_latent
        return F.embedding_bag(order, weights.reshape(-1, 1), starts, mode="sum").squeeze(1)


class _PreactsAt(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pairs: Pairs
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.pairs = pairs
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BK: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_dec = ctx.saved_tensors
        g_W = ctx.pairs.sum_rows(g_BK, x - b_dec).t()  # Σ g · (x − b_dec)
        g_b_enc = ctx.pairs.sum_weights(g_BK)
        g_x = None
        if ctx.needs_input_grad[1]:
            g_x = F.embedding_bag(ctx.pairs.latents, W_enc.t(), mode="sum", per_sample_weights=g_BK)
        return None, g_x, g_W, g_b_enc, -(W_enc @ g_b_enc), None


def preacts_at(p: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pairs: Pairs) -> Tensor:
    """Pre-activations [B, K] at the chosen latents, differentiable in x, W_enc, b_enc and b_dec.

    p: all pre-activations [B, S], computed without a graph. x: [B, D].
    """
    values = p.gather(1, pairs.latents)
    return _PreactsAt.apply(values, x, W_enc, b_enc, b_dec, pairs)


def preacts_at_plain(
    p: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, pairs: Pairs
) -> Tensor:
    """The twin of `preacts_at`: the dense matmul, then a gather."""
    return ((x - b_dec) @ W_enc + b_enc).gather(1, pairs.latents)


class _DecodeAt(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        return F.embedding_bag(pairs.latents, W_dec, mode="sum", per_sample_weights=values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        g_BD = g_BD.contiguous()
        latents = ctx.pairs.latents
        B, K = latents.shape
        bags = torch.arange(0, B * K, K, device=latents.device)
        bag_of_pair = torch.arange(B, device=latents.device).repeat_interleave(K)
        g_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            g_BD, W_dec, latents.flatten(), bags, bag_of_pair, SUM
        ).view(B, K)
        return g_values, ctx.pairs.sum_rows(values, g_BD), None


def decode_at(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """Σ over the chosen latents of value · decoder row: [B, K] → [B, D], differentiable in both."""
    return _DecodeAt.apply(values, W_dec, pairs)


def decode_at_plain(values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
    """The twin of `decode_at`: scatter to [B, S], then the dense matmul."""
    f_BS = torch.zeros(len(values), pairs.d_sae, dtype=values.dtype, device=values.device)
    return f_BS.scatter(1, pairs.latents, values) @ W_dec
