"""One optimizer step per batch of activations [B, D]; nothing here knows of language models or files.

The step, in the order of the papers:

    objective → gradients → parallel part of ∂W_dec removed → clip → Adam → unit decoder rows → who is dead

**Scale.** The recipes are written for data with E‖x‖ = √D. Instead of scaling the data, and then having to fold the
scale into the weights, the weights stay in raw units and the optimizer works in the scaled ones: with s = √D / E‖x‖,
W_enc moves s times as far as its learning rate says, W_dec and b_dec 1/s times. That is the same trajectory (Adam is
equivariant under scaling of a parameter), and the SAE takes raw activations at any moment.

B tokens, D = d_in, S = d_sae.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.sae import SAE, objectives
from saekit.sae.objectives import Objective
from saekit.training.config import TrainingConfig
from saekit.training.schedules import learning_rate, warmed


class StepOutput(NamedTuple):
    """One step's figures, as tensors until they are read."""

    loss: Tensor  # [] what was minimised
    mse: Tensor  # [] mean ‖x − x̂‖²
    explained_variance: Tensor  # [] 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² on this batch
    l0: Tensor  # [] mean number of active latents
    sparsity: Tensor  # [] weighted L1 term
    aux: Tensor  # [] AuxK term
    dead: Tensor  # [] share of latents that are dead


class Trainer:
    """Trains an SAE on batches of activations.

    sae: changed in place. The keywords are the `training` section of a recipe, see `TrainingConfig`:
    lr, batch_size, tokens, l1_coefficient, …

    Raises `InvalidInput` for unknown or impossible keywords.
    """

    def __init__(self, sae: SAE, **training: Any) -> None:
        try:
            self.config = TrainingConfig(**training)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise InvalidInput("training: " + "; ".join(lines)) from None
        if sae.config.center_input or sae.config.rescale_acts_by_decoder_norm:
            raise InvalidInput("training goes on plain activations: start from SAE.new")
        self.sae = sae.requires_grad_(True)
        self.steps_taken = 0
        self.tokens_seen = 0
        self.scale = 1.0  # s, set by the first batch
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_enc.device)
        self._unit_rows = sae.architecture == "topk"
        self._optimizer = self._make_optimizer()

    def step(self, x: Tensor) -> StepOutput:
        """One optimizer step on x [B, D], float32 or bfloat16. Raises `InvalidInput` on a wrong shape or NaN loss."""
        if x.ndim != 2 or x.shape[1] != self.sae.d_in or len(x) == 0:
            raise InvalidInput(f"step: expected activations [B, {self.sae.d_in}], got {tuple(x.shape)}")
        x = x.to(self.sae.W_dec.device, torch.float32)
        if self.steps_taken == 0:
            self._start_from(x)

        objective = self._objective(x)
        self._optimizer.zero_grad()
        objective.loss.backward()
        if self._unit_rows:
            remove_parallel(self.sae.W_dec, self.sae.W_dec.grad)
        self._clip()
        self._set_learning_rate()
        self._optimizer.step()
        if self._unit_rows:
            with torch.no_grad():
                self.sae.W_dec.mul_(1 / (self.scale * self.sae.W_dec.norm(dim=1, keepdim=True)))
        return self._account(objective, len(x))

    def _objective(self, x: Tensor) -> Objective:
        config = self.config
        if self.sae.architecture == "standard":
            l1 = config.l1_coefficient * warmed(self.steps_taken, config.steps, config.l1_warmup)
            return objectives.standard(self.sae, x, scale=self.scale, l1_coefficient=l1)
        dead = self.dead
        return objectives.topk(
            self.sae,
            x,
            dead=dead if bool(dead.any()) else None,
            aux_coefficient=config.aux_coefficient,
            aux_k=config.aux_k or max(1, self.sae.d_in // 2),
        )

    @property
    def dead(self) -> Tensor:
        """[S] bool: latents that have not fired for `dead_after` tokens."""
        return self.tokens_since_fired >= self.config.dead_after

    @property
    def learning_rate(self) -> float:
        config = self.config
        return config.lr * learning_rate(
            self.steps_taken,
            config.steps,
            shape=config.lr_schedule,
            warmup=config.lr_warmup,
            decay=config.lr_decay,
        )

    def _account(self, objective: Objective, tokens: int) -> StepOutput:
        self.steps_taken += 1
        self.tokens_seen += tokens
        self.tokens_since_fired = torch.where(objective.fired, 0, self.tokens_since_fired + tokens)
        return StepOutput(
            loss=objective.loss.detach(),
            mse=objective.mse,
            explained_variance=1 - objective.mse / objective.variance,
            l0=objective.l0,
            sparsity=objective.sparsity,
            aux=objective.aux,
            dead=self.dead.float().mean(),
        )

    # The optimizer, in scaled units

    def _units(self) -> dict[str, float]:
        """How far each parameter moves in raw units for one unit in scaled ones."""
        return {"W_enc": self.scale, "W_dec": 1 / self.scale, "b_enc": 1.0, "b_dec": 1 / self.scale}

    def _make_optimizer(self) -> torch.optim.Adam:
        groups = [{"params": [getattr(self.sae, name)], "name": name} for name in self._units()]
        return torch.optim.Adam(
            groups, lr=self.config.lr, betas=self.config.adam_betas, eps=self.config.adam_eps, fused=True
        )

    def _set_learning_rate(self) -> None:
        units, rate = self._units(), self.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate * units[group["name"]]
            group["eps"] = self.config.adam_eps / units[group["name"]]

    @torch.no_grad()
    def _clip(self) -> None:
        """Gradient clipping by the global norm, in scaled units."""
        if self.config.clip_grad_norm is None:
            return
        pairs = [(getattr(self.sae, name).grad, unit) for name, unit in self._units().items()]
        norm = torch.stack([grad.norm() * unit for grad, unit in pairs]).norm()
        factor = (self.config.clip_grad_norm / norm).clamp_max(1.0)
        for grad, _ in pairs:
            grad.mul_(factor)

    @torch.no_grad()
    def _start_from(self, x: Tensor) -> None:
        """Fit the fresh SAE to its first batch: the scale, and b_dec at the geometric median (Bricken 2023; Gao 2024).

        The April 2024 recipe starts b_dec at 0, which a long run forgives and a short one does not: in scaled units the
        mean's coordinates are near 1, hundreds of steps away at Adam's rate.
        """
        if not bool(torch.isfinite(x).all()):
            raise InvalidInput("step: the first batch holds NaN or infinite activations")
        if self.config.normalize == "expected_norm":
            norm = x.norm(dim=1).mean().item()
            if norm == 0:
                raise InvalidInput("step: every activation in the first batch is zero")
            self.scale = math.sqrt(self.sae.d_in) / norm
        sae = self.sae
        sae.W_enc.mul_(self.scale)
        sae.W_dec.div_(self.scale)
        sae.b_dec.copy_(geometric_median(x))

    # Exact state, for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs; safe to hold only until the next step."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for group in self._optimizer.param_groups:
            for name, tensor in self._optimizer.state[group["params"][0]].items():
                state[f"adam.{group['name']}.{name}"] = tensor
        return state | {"tokens_since_fired": self.tokens_since_fired}

    def counters(self) -> dict[str, Any]:
        return {"steps_taken": self.steps_taken, "tokens_seen": self.tokens_seen, "scale": self.scale}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `tensors` and `counters`."""
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(tensors[f"sae.{name}"])
        for group in self._optimizer.param_groups:
            parameter = group["params"][0]
            prefix = f"adam.{group['name']}."
            # Fused Adam walks memory linearly: its state has to lie as the parameter lies.
            self._optimizer.state[parameter] = {
                name.removeprefix(prefix): (
                    torch.empty_like(parameter).copy_(tensor) if tensor.ndim else tensor.clone()
                )
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.tokens_since_fired.device)
        self.steps_taken, self.tokens_seen = counters["steps_taken"], counters["tokens_seen"]
        self.scale = counters["scale"]


@torch.no_grad()
def remove_parallel(rows: Tensor, grad: Tensor | None) -> None:
    """Take out of each row's gradient the part along the row, which renormalising would undo (Bricken 2023).

    rows, grad: [S, D].
    """
    assert grad is not None
    along = (grad * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    grad.addcmul_(rows, along, value=-1)


@torch.no_grad()
def geometric_median(x: Tensor, rounds: int = 20) -> Tensor:
    """The point with the least summed distance to the rows of x [B, D], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(rounds):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        median = (weights @ x) / weights.sum()
    return median
