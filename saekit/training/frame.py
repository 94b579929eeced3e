"""The space training works in, where one scale for all of x will not do: x' = (x − m) A, block by block.

    whiten        A = Σ^{-1/2} (symmetric), m the mean: x' has covariance 1
    crosscoder    A = s_l on the columns of site l, so that E‖x_l‖ = √D_l at every site

Training then holds an inner SAE that sees x', and folds it into the user's after every step, so that the user's always
takes raw activations:

    W_enc = A W'_enc     W_dec = W'_dec A⁻¹     b_dec = m + b'_dec A⁻¹

Where x and y differ (transcoders), A and m of the input act on the encoder, those of the output on the decoder, and what
the input's m adds to pre-activations and skip comes off the encoder's bias and b_dec.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.sae import SAE

SHRINKAGE = (
    1e-3  # of the mean eigenvalue, added to each: directions with hardly any variance are not blown up
)
LEAST_ROWS = 2  # per dimension, to estimate a covariance from


@dataclass(frozen=True)
class Affine:
    """x' = (x − mean) matrix, and the way back. Both matrices are symmetric; of a diagonal one, the diagonal is held."""

    mean: Tensor  # [D]
    matrix: Tensor  # [D, D] or [D]
    inverse: Tensor  # [D, D] or [D]

    def __call__(self, x: Tensor) -> Tensor:
        return _times(x - self.mean, self.matrix)


@dataclass(frozen=True)
class Frame:
    """The maps of input and output; the same one but for transcoders."""

    input: Affine
    output: Affine

    def inward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch and its target in this frame; mapped once where they are one tensor."""
        mapped = self.input(x)
        return mapped, mapped if y is x else self.output(y)

    @torch.no_grad()
    def fold(self, inner: SAE, sae: SAE) -> None:
        """Make `sae` on raw activations do what `inner` does on those of this frame."""
        sae.W_enc.copy_(_times(inner.W_enc.t(), self.input.matrix).t())
        sae.W_dec.copy_(_times(inner.W_dec, self.output.inverse))
        sae.b_dec.copy_(self.output.mean + _times(inner.b_dec, self.output.inverse))
        for name in sae.kind.vectors:
            getattr(sae, name).copy_(getattr(inner, name))
        if sae.kind.running_threshold:
            sae.threshold.copy_(inner.threshold)
        if inner.config.skip:
            to_output = _times(_times(inner.W_skip, self.input.matrix).t(), self.output.inverse).t()
            sae.W_skip.copy_(to_output)
            sae.b_dec.sub_(sae.W_skip @ self.input.mean)
        if inner.shift is None:
            moved = self.input.mean @ sae.W_enc
            for name, factor in _biases(sae).items():
                getattr(sae, name).sub_(moved * factor)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, each with memory of its own (safetensors wants it so; both ends may be one map)."""
        return {
            f"{end}.{name}": getattr(getattr(self, end), name).clone()
            for end in ("input", "output")
            for name in ("mean", "matrix", "inverse")
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Frame:
        """The inverse of `tensors`."""
        ends = (
            Affine(*(tensors[f"{end}.{name}"] for name in ("mean", "matrix", "inverse")))
            for end in ("input", "output")
        )
        return cls(*ends)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


def _biases(sae: SAE) -> dict[str, Tensor | float]:
    """The vectors that a shift of the input moves, and how many times."""
    if sae.architecture == "gated":
        return {"b_gate": 1.0, "b_mag": sae.r_mag.exp()}
    return {sae.kind.bias: 1.0}


def whitening(x: Tensor) -> Affine:
    """Symmetric whitening of x [n, D]. Raises `InvalidInput` for too few rows to tell a covariance."""
    n, D = x.shape
    if n < LEAST_ROWS * D:
        raise InvalidInput(
            f"normalize: whiten needs a first batch of at least {LEAST_ROWS * D:,} rows at width {D}, got {n:,}"
        )
    mean = x.double().mean(0)
    centred = x.double() - mean
    values, vectors = torch.linalg.eigh(centred.t() @ centred / n)
    values = values.clamp_min(0) + SHRINKAGE * values.mean()
    matrix, inverse = (vectors * values.pow(power) @ vectors.t() for power in (-0.5, 0.5))
    return Affine(mean.to(x), matrix.to(x), inverse.to(x))


def scaling(x: Tensor, widths: tuple[int, ...]) -> Affine:
    """One scale for each block of columns, E‖s_l x_l‖ = √D_l."""
    parts = zip(widths, x.split(list(widths), 1), strict=True)
    scales = torch.cat([x.new_full((width,), scale(part)) for width, part in parts])
    return Affine(torch.zeros_like(scales), scales, 1 / scales)


def scale(x: Tensor) -> float:
    """√D / E‖x‖ of x [n, D]."""
    norm = x.norm(dim=1).mean().item()
    if norm == 0:
        raise InvalidInput("step: every activation in the first batch is zero")
    return math.sqrt(x.shape[1]) / norm
