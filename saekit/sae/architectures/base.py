"""What every architecture says of itself: its vectors, its activation function, its objective.

Architectures hold no state: the weights are the SAE's, the schedules are the trainer's. Adding one is a file that
reads like its paper, and a line in `architectures/__init__.py`.

B tokens, D = d_in, E = d_out, S = d_sae. y [B, E] is what is to be reconstructed: x itself, or a transcoder's target.
s is the scale that brings E‖s y‖ to √E, so that coefficients mean the same on every site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saekit.sae import choosing
from saekit.sae.pairs import At
from saekit.sae.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from saekit.sae.model import SAE

ALL = slice(None)
Constraint = Literal["unit", "free"]
DeadLatents = Literal["auxk", "resample", "none"]
Penalty = Literal["l1", "l0"]


class Terms(NamedTuple):
    """What the recipe and its schedules say for one step."""

    scale: float  # s
    sparsity: Tensor | float = 0.0  # λ, as warmed up or controlled
    k: int = 0  # latents kept per token
    dead: Tensor | None = (
        None  # [m] the latents that AuxK is to revive, −1 for none; None where there are none at all
    )
    aux: float = 0.0  # weight of AuxK
    aux_k: int = 1
    bandwidth: float = 0.05  # ε of JumpReLU's estimator, in scaled units
    l0_penalty: Literal["step", "tanh"] = "step"
    tanh_scale: float = 4.0  # c of the tanh penalty
    preact: float = 0.0  # weight of the pre-activation loss
    dtype: torch.dtype | None = None  # operands of the dense products; None: as the weights are
    rows: int | None = None  # of the whole batch, of which x may be this process's part; None: x is all of it
    ranks: Ranks = ALONE  # the processes that share the batch and the latents

    def tokens(self, x: Tensor) -> int:
        """What means over the batch that x [B, D] belongs to divide by."""
        return len(x) if self.rows is None else self.rows


class Objective(NamedTuple):
    """What one batch gave. Everything stays a tensor; nothing here waits for the device.

    Of processes that share a batch each has its summands of loss, mse, sparsity, aux and l0; of those that share the latents,
    each its own latents' summands of sparsity and l0, and of the loss the sparsity in it. `variance` is the whole batch's.
    """

    loss: Tensor  # [] to differentiate
    mse: Tensor  # [] mean ‖y − x̂‖², in raw units
    variance: Tensor  # [] mean ‖y − ȳ‖², in raw units, ȳ the batch mean
    sparsity: Tensor  # [] the sparsity term, weighted; 0 where there is none
    aux: Tensor  # [] AuxK, or the gated SAE's auxiliary reconstruction, unweighted; 0 where there is none
    l0: Tensor  # [] mean number of non-zero latents
    fired: Tensor  # [S] bool: which latents fired
    error: Tensor  # [B, E] y − x̂, without a graph
    smallest: Tensor | None = None  # [] the smallest latent kept, which BatchTopK's threshold follows


class Architecture:
    """One kind of sparse autoencoder."""

    name: ClassVar[str]
    vectors: ClassVar[Mapping[str, float]] = {"b_enc": 0.0}  # trained [S] vectors and their first values
    bias: ClassVar[str] = "b_enc"  # the one that is added to x W_enc
    row_norm: ClassVar[float] = 0.1  # of fresh decoder rows, in scaled units (Anthropic, April 2024)
    takes_k: ClassVar[bool] = False
    running_threshold: ClassVar[bool] = False  # a buffer that training updates and `encode` uses
    penalty: ClassVar[Penalty | None] = None  # which coefficient its objective reads
    decoder: ClassVar[Constraint] = "free"
    dead_latents: ClassVar[DeadLatents] = "none"

    def activate(self, sae: SAE, p: Tensor, at: slice | Sequence[int] = ALL) -> Tensor:
        """Latents [.., n] of pre-activations p [.., n] of the latents `at`; all S of them where `takes_k`."""
        raise NotImplementedError

    def active(self, sae: SAE, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, latents, values) of the non-zero latents of p [n, S], sorted by token."""
        f = self.activate(sae, p)
        tokens, latents = f.nonzero(as_tuple=True)
        return tokens, latents, f[tokens, latents]

    def objective(self, sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Objective:
        """The loss on x [B, D] and its target y [B, E], with a graph."""
        raise NotImplementedError


def objective(
    sae: SAE,
    x: Tensor,
    y: Tensor,
    f: Tensor,
    at: At,
    terms: Terms,
    *,
    counts: Tensor,
    sparsity: Tensor,
) -> Objective:
    """s² mean‖y − x̂‖² + sparsity + α s² mean‖e − ê‖² of latents f, which lie `at` pairs or everywhere.

    counts [S]: on how many tokens each latent fires.
    """
    rest = without_affine(sae, x, y, terms)
    total, error = at.squared_error(f, sae.W_dec, rest)
    mse, error = total / terms.tokens(x), error.detach()
    loss, aux = terms.scale**2 * mse + sparsity, torch.zeros_like(mse)
    if terms.dead is not None:
        aux = terms.scale**2 * auxk(sae, x, error, terms) / terms.tokens(x)
        loss = loss + terms.aux * aux
    return report(loss, mse, aux, counts, error, variance(sae, y, rest, terms), terms, sparsity)


def without_affine(sae: SAE, x: Tensor, y: Tensor, terms: Terms) -> Tensor:
    """[B, E] y less the part of x̂ that no latent carries.

    Of processes that share the latents one differentiates that part, so that their gradients of b_dec and W_skip add up.
    """
    affine = sae.affine(x)
    if terms.ranks.latents.rank > 0:
        affine = affine.detach()
    return _Less.apply(y, affine) if affine.ndim == 1 else y - affine


class _Less(Function):
    """y − b of data y [B, E] and b [E]; the gradient is summed and then negated, which autograd does the other way round."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, b: Tensor) -> Tensor:
        return y - b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g.sum(0).neg_()


def report(
    loss: Tensor,
    mse: Tensor,
    aux: Tensor,
    counts: Tensor,
    error: Tensor,
    spread: Tensor,
    terms: Terms,
    sparsity: Tensor | None = None,
) -> Objective:
    """What a batch gave, as figures without a graph beside the loss. counts [S]: on how many tokens each latent fires."""
    counts = counts.detach()
    return Objective(
        loss=loss,
        mse=mse.detach(),
        variance=spread,
        sparsity=torch.zeros_like(spread) if sparsity is None else sparsity.detach(),
        aux=aux.detach(),
        l0=counts.sum() / terms.tokens(error),
        fired=counts > 0,
        error=error,
    )


def auxk(sae: SAE, x: Tensor, error: Tensor, terms: Terms) -> Tensor:
    """Σ‖e − ê‖²: what is left of the error when the aux_k largest dead latents of each token reconstruct it.

    AuxK, Gao 2024, section A.2. x [B, D] and error [B, E] without a graph.
    """
    assert terms.dead is not None
    pairs, p = choosing.at_latents(sae, x, terms.dead, terms.aux_k, terms.dtype or x.dtype, terms.ranks)
    # Of all processes' latents; a GPU is not asked whether there are any.
    some = terms.ranks.latents.sum((terms.dead >= 0).any().to(error.dtype)) > 0
    return pairs.squared_error(p.relu(), sae.W_dec, error)[0] * some


def variance(sae: SAE, y: Tensor, rest: Tensor, terms: Terms) -> Tensor:
    """mean ‖y − ȳ‖² about the batch mean, from squares about b_dec, which lies near the mean."""
    centred = (y - sae.b_dec if sae.config.skip else rest).detach()
    squares, sums = (terms.ranks.data.sum(part) for part in (centred.norm().square(), centred.sum(0)))
    rows = terms.tokens(y)
    return (squares / rows - (sums / rows).square().sum()).clamp_min(0)
