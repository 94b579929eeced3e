"""What every architecture says of itself: its vectors, its activation function, its objective.

Architectures hold no state: the weights are the SAE's, the schedules are the trainer's. Adding one is a file that
reads like its paper, and a line in `architectures/__init__.py`.

B tokens, D = d_in, E = d_out, S = d_sae. y [B, E] is what is to be reconstructed: x itself, or a transcoder's target.
s is the scale that brings E‖s y‖ to √E, so that coefficients mean the same on every site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from saekit.sae.kernels import Pairs, decode_at, preacts_at

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
    dead: Tensor | None = None  # [S] bool where AuxK is to revive latents; None where there are none
    aux: float = 0.0  # weight of AuxK
    aux_k: int = 1
    bandwidth: float = 0.05  # ε of JumpReLU's estimator, in scaled units
    l0_penalty: Literal["step", "tanh"] = "step"
    tanh_scale: float = 4.0  # c of the tanh penalty
    preact: float = 0.0  # weight of the pre-activation loss


class Objective(NamedTuple):
    """What one batch gave. Everything stays a tensor; nothing here waits for the device."""

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


def dense_objective(
    sae: SAE, x: Tensor, y: Tensor, p: Tensor, f: Tensor, sparsity: Tensor, terms: Terms
) -> Objective:
    """s² mean‖y − x̂‖² + sparsity + AuxK, of latents f [B, S] that were computed densely."""
    error = y - sae.reconstruct(f, x)
    mse = error.square().sum(1).mean()
    loss, aux = terms.scale**2 * mse + sparsity, torch.zeros_like(mse)
    if terms.dead is not None:
        left = auxk(sae, x, p.detach(), error.detach(), terms.dead, terms.aux_k)
        aux = terms.scale**2 * left.square().sum(1).mean()
        loss = loss + terms.aux * aux
    active = f.detach() > 0
    return Objective(
        loss=loss,
        mse=mse.detach(),
        variance=variance(y),
        sparsity=sparsity.detach(),
        aux=aux.detach(),
        l0=active.sum() / len(x),
        fired=active.any(0),
        error=error.detach(),
    )


def auxk(sae: SAE, x: Tensor, p: Tensor, error: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """e − ê [B, E]: what is left of the error when the aux_k largest dead latents of each token reconstruct it.

    AuxK, Gao 2024, section A.2. x [B, D], p [B, S] and error [B, E] without a graph; dead [S] bool, not all false.
    """
    dead_latents = dead.nonzero().squeeze(1)
    chosen = p[:, dead_latents].topk(min(aux_k, len(dead_latents)), dim=1, sorted=False).indices
    pairs = Pairs.of_rows(dead_latents[chosen], sae.d_sae)
    f = preacts_at(p, x, sae.W_enc, sae.encoder_bias, sae.shift, pairs).relu()
    return error - decode_at(f, sae.W_dec, pairs)


def variance(y: Tensor) -> Tensor:
    """mean ‖y − ȳ‖² about the batch mean."""
    return (y - y.mean(0)).square().sum(1).mean()
