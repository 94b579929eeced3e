"""Adam over an SAE's parameters, with what has to hold for decoder rows, in as few passes over memory as may be.

    the part of ∂W_dec along its row removed → all gradients clipped at one norm → Adam → W_dec's rows back to one length

Each parameter moves in units of its own (`training.trainer`): its gradient counts `unit` times in the norm, its rate is
`unit` times the rate, its ε 1/unit of ε. Where the compiled kernels are at hand, each weight matrix is read twice and
written once; plain torch does the same in a pass for every arrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from saekit.sae import native
from saekit.sae.ranks import ALONE, Ranks

STATE = ("exp_avg", "exp_avg_sq", "step")
MATRICES = ("W_enc", "W_dec")  # those with a row in memory for each latent
SHARED = ("b_dec", "W_skip")  # those that belong to no latent


class _Products(NamedTuple):
    """Of a gradient g and the rows w it belongs to, [S] each."""

    gg: Tensor
    along: Tensor | None  # g · w / w · w, what is to be removed


class Optimizer:
    """parameters: by name; W_enc [D, S] and W_dec [S, E] lie in memory as rows per latent. ranks: of which each has some."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        ranks: Ranks = ALONE,
    ) -> None:
        self._parameters, self._betas, self._eps = dict(parameters), betas, eps
        self._ranks = ranks
        self.state = {
            name: {
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
                "step": torch.zeros((), device=p.device),
            }
            for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def step(
        self, rate: float, units: Mapping[str, float], *, clip: float | None, row_norm: float | None
    ) -> None:
        """One update from the parameters' `.grad`, which it uses up.

        rate: of parameters whose unit is 1. clip: the norm of all gradients together, None for no clipping. row_norm: the
        length of W_dec's rows, None where they are free.
        """
        given = {name: p for name, p in self._parameters.items() if p.grad is not None}
        products = {name: self._products(name, row_norm is not None and name == "W_dec") for name in given}
        factor = None if clip is None else self._factor(products, units, clip)
        for name in given:
            norm = row_norm if name == "W_dec" else None
            self._update(
                name, rate * units[name], self._eps / units[name], factor, products[name].along, norm
            )

    def _products(self, name: str, removing: bool) -> _Products:
        rows, grad = self._rows(name)
        if name in MATRICES and native.usable(rows, grad):
            gg, gw, ww = (rows.new_empty(len(rows)) for _ in range(3))
            S, W = rows.shape
            if not removing:
                native.call("row_products", rows, grad, S, W, gg, None, None)
                return _Products(gg, None)
            native.call("row_products", rows, grad, S, W, gg, gw, ww)
            return _Products(gg - gw.square() / ww, gw / ww)
        if not removing:
            return _Products(grad.square().sum(-1), None)
        along = (grad * rows).sum(-1) / rows.square().sum(-1)
        return _Products((grad - along[:, None] * rows).square().sum(-1), along)

    def _factor(self, products: Mapping[str, _Products], units: Mapping[str, float], clip: float) -> Tensor:
        """What all gradients are to be multiplied by, [], at most 1."""
        squares = torch.stack([p.gg.double().sum() * units[name] ** 2 for name, p in products.items()])
        if (group := self._ranks.latents).size > 1:
            shared = torch.tensor([name in SHARED for name in products], device=squares.device)
            squares = torch.where(shared, squares, group.sum(squares))
        return (clip / squares.sum().sqrt()).clamp_max(1.0).float()

    def _update(
        self,
        name: str,
        rate: float,
        eps: float,
        factor: Tensor | None,
        along: Tensor | None,
        norm: float | None,
    ) -> None:
        rows, grad = self._rows(name)
        mean, square, step = self.state[name].values()
        (mean_rows, square_rows), (beta1, beta2) = (
            (self._as_rows(name, t) for t in (mean, square)),
            self._betas,
        )
        if name in MATRICES and native.usable(rows, grad, mean_rows, square_rows):
            step += 1
            taken = float(step)
            native.call(
                "adam_rows", rows, grad, mean_rows, square_rows, along, *rows.shape,
                1.0 if factor is None else float(factor), 1 - beta1, 1 - beta2, rate / (1 - beta1**taken),
                math.sqrt(1 - beta2**taken), eps, norm or 0.0,
            )  # fmt: skip
        else:
            if along is not None:
                grad = grad.addcmul(rows, along[:, None], value=-1)
            if factor is not None:
                grad = grad * factor.to(grad)
            adam(
                [rows], [grad], [mean_rows], [square_rows], [], [step], fused=True, amsgrad=False, beta1=beta1,
                beta2=beta2, lr=rate, weight_decay=0.0, eps=eps, maximize=False,
            )  # fmt: skip
            if norm is not None:
                rows.mul_(norm / rows.norm(dim=1, keepdim=True))
        self._parameters[name].grad = None

    def _rows(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter and its gradient, both contiguous, weight matrices as [S, width]."""
        parameter = self._parameters[name]
        assert parameter.grad is not None
        return self._as_rows(name, parameter.detach()), self._as_rows(name, parameter.grad).contiguous()

    def _as_rows(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t() if name == "W_enc" else tensor

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """Lose all memory of some latents [n], which start anew."""
        for name, state in self.state.items():
            if name not in SHARED:
                for key in ("exp_avg", "exp_avg_sq"):
                    self._as_rows(name, state[key])[latents] = 0

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, own in self.state.items() for key, tensor in own.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`. State lies in memory as the parameter lies."""
        for name, own in self.state.items():
            for key in STATE:
                own[key].copy_(tensors[f"{name}.{key}"])
