"""One optimizer step per batch of activations [B, D]; nothing here knows of language models or files.

The step, in the order of the papers:

    objective → gradients → Adam, clipped, decoder rows kept at norm 1 (`training.optimizer`) → who is dead

**Scale.** The recipes are written for data with E‖x‖ = √D. Instead of scaling the data, and then having to fold the
scale into the weights, the weights stay in raw units and the optimizer works in the scaled ones: with s = √D / E‖x‖,
W_enc moves s times as far as its learning rate says, W_dec and b_dec 1/s times. That is the same trajectory (Adam is
equivariant under scaling of a parameter), and the SAE takes raw activations at any moment. Where one scale will not do
(whitening, crosscoders), training has a frame of its own and folds after every step (`training.frame`).

**Several processes** may share each batch and the latents (`sae.ranks`). Losses are sums over rows and latents, so gradients
are added up once they are there, and everything before and after that is each process's own.

B tokens, D = d_in, E = d_out, S = d_sae.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from saekit.errors import InvalidInput
from saekit.lm import DTYPES, fast_dtype
from saekit.sae import SAE
from saekit.sae.architectures import Objective, Terms
from saekit.sae.ranks import ALONE, Part, Ranks
from saekit.training.config import TrainingConfig
from saekit.training.control import Controller
from saekit.training.frame import Frame, scale, scaling, whitening
from saekit.training.optimizer import Optimizer
from saekit.training.parallel import add_up
from saekit.training.resample import resample
from saekit.training.schedules import due, k_at, learning_rate, warmed

FIRST_RATE, FIRST_ROWS = (
    0.05,
    1024,
)  # share of the first rows on which a fresh latent fires, after Anthropic, January 2025
THRESHOLD_PACE = 10.0  # times the learning rate, for log θ: Adam moves a weight of 0.01 by far more of itself
SPARSITY_WARMUP = {"l1": 0.0, "l0": 0.05}
BANDWIDTH = {"step": 0.05, "tanh": 2.0}  # SAELens's default; Anthropic, January 2025
THRESHOLD_MEMORY = 20  # batches over which BatchTopK's running threshold is averaged


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

    sae: changed in place, and always ready for raw activations. The keywords are the `training` section of a recipe, see
    `TrainingConfig`: lr, batch_size, tokens, l1_coefficient, target_l0, …
    ranks: the processes that train it together; where they share the latents, `sae` is this one's (`training.parallel`).

    Raises `InvalidInput` for unknown or impossible keywords.
    """

    def __init__(self, sae: SAE, *, ranks: Ranks = ALONE, **training: Any) -> None:
        try:
            self.config = config = TrainingConfig(**training)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise InvalidInput("training: " + "; ".join(lines)) from None
        kind = sae.kind
        if sae.config.center_input or sae.config.rescale_acts_by_decoder_norm:
            raise InvalidInput("training goes on plain activations: start from SAE.new")
        if config.target_l0 is not None and kind.penalty is None:
            raise InvalidInput(f"target_l0: {sae.architecture} is told its L0 by k, not by a coefficient")
        self.sae, self.ranks = sae.requires_grad_(True), ranks
        self.steps_taken = 0
        self.tokens_seen = 0
        self.scale = self.scale_in = 1.0  # s of the target and of the input, set by the first batch
        self.frame: Frame | None = None  # likewise, where one scale will not do
        self.tokens_since_fired = torch.zeros(len(sae.W_dec), dtype=torch.int64, device=sae.W_dec.device)
        self._framed = config.normalize == "whiten" or (
            config.normalize == "expected_norm" and sae.is_crosscoder
        )
        self._inner = self._copy_of(sae) if self._framed else sae
        self._trained = dict(self._inner.named_parameters())
        self._log_threshold: nn.Parameter | None = None
        if "threshold" in self._trained:  # moves in log θ, which keeps it positive (Rajamanoharan 2024)
            self._trained["threshold"] = self._log_threshold = nn.Parameter(
                self._inner.threshold.detach().log()
            )
        self._unit_rows = (config.decoder or kind.decoder) == "unit"
        self._dead_latents = config.dead_latents or kind.dead_latents
        self._control: Controller | None = None
        if config.target_l0 is not None:
            start = config.l1_coefficient if kind.penalty == "l1" else config.l0_coefficient
            self._control = Controller(
                config.target_l0,
                start,
                steps=config.steps,
                device=sae.W_dec.device,
            )
        self._optimizer = Optimizer(self._trained, betas=config.adam_betas, eps=config.adam_eps, ranks=ranks)
        self._dtype = self._operands()

    def step(self, x: Tensor, target: Tensor | None = None, *, part: Part | None = None) -> StepOutput:
        """One optimizer step on x [B, D], float32 or bfloat16; target [B, E]: what a transcoder is to predict.

        part: which rows of the batch x holds, where processes share it.
        Raises `InvalidInput` on a wrong shape, a missing target, or a first batch that holds NaN.
        """
        x, y = self._checked(x, target)
        if self.steps_taken == 0:
            self._start_from(*self._whole(part, x, y))
        if self.frame is not None:
            x, y = self.frame.inward(x, y)
        inner = self._inner

        objective = inner.kind.objective(inner, x, y, self._terms(part))
        inner.zero_grad()
        objective.loss.backward()
        if not self.ranks.alone:
            objective = add_up(objective, dict(inner.named_parameters()), self.ranks)
        if self._log_threshold is not None:
            self._log_threshold.grad = inner.threshold.grad * inner.threshold.detach()  # type: ignore[operator]
        self._optimizer.step(
            self.learning_rate,
            self._units(),
            clip=self.config.clip_grad_norm,
            row_norm=1 / self.scale if self._unit_rows else None,
        )
        output = self._account(objective, len(x) if part is None else part.size)
        if self._dead_latents == "resample" and due(
            self.steps_taken, self.config.steps, self.config.resample_at
        ):
            self._resample(*self._whole(part, x, y, objective.error))
        self._constrain(objective)
        return output

    def _whole(self, part: Part | None, *of: Tensor) -> list[Tensor]:
        """The whole batch, in its order, that all processes start from alike; one tensor stays one."""
        whole = {id(rows): self.ranks.data.rows(rows, part) for rows in of}
        return [whole[id(rows)] for rows in of]

    def _checked(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        sae = self.sae
        if x.ndim != 2 or x.shape[1] != sae.d_in or (len(x) == 0 and self.ranks.data.size == 1):
            raise InvalidInput(f"step: expected activations [B, {sae.d_in}], got {tuple(x.shape)}")
        x = x.to(sae.W_dec.device, torch.float32)
        if not sae.is_transcoder:
            if target is not None:
                raise InvalidInput("step: only a transcoder takes a target; this SAE reconstructs x")
            return x, x
        if target is None or target.shape != (len(x), sae.d_out):
            got = "none" if target is None else str(tuple(target.shape))
            raise InvalidInput(f"step: a transcoder needs a target [{len(x)}, {sae.d_out}], got {got}")
        return x, target.to(x)

    def _terms(self, part: Part | None) -> Terms:
        config, sae, step = self.config, self.sae, self.steps_taken
        dead = None
        # Nobody can be dead before `dead_after` tokens were seen: no need to look, which waits for the device.
        if (
            self._dead_latents == "auxk"
            and config.aux_coefficient > 0
            and self.tokens_seen >= config.dead_after
        ):
            if (
                self.dead.is_cuda
            ):  # as many as there are latents, −1 for the living: nobody waits for their number
                dead = torch.nonzero_static(self.dead, size=len(self.dead), fill_value=-1).squeeze(1)
            else:
                latents = self.dead.nonzero().squeeze(1)
                dead = latents if self.ranks.latents.any(len(latents) > 0) else None
        return Terms(
            scale=self.scale,
            sparsity=self.coefficient,
            k=k_at(step, config.steps, k=sae.k, start=config.k_start, warmup=config.k_warmup) if sae.k else 0,
            dead=dead,
            aux=config.aux_coefficient,
            aux_k=config.aux_k or max(1, sae.d_out // 2),
            bandwidth=config.bandwidth or BANDWIDTH[config.l0_penalty],
            l0_penalty=config.l0_penalty,
            tanh_scale=config.tanh_scale,
            preact=config.preact_coefficient,
            dtype=self._dtype,
            rows=None if part is None else part.size,
            ranks=self.ranks,
        )

    @property
    def coefficient(self) -> Tensor | float:
        """λ at this step, warmed up or controlled; 0 where k does its work."""
        config, penalty = self.config, self.sae.kind.penalty
        if penalty is None:
            return 0.0
        fixed = config.l1_coefficient if penalty == "l1" else config.l0_coefficient
        value = fixed if self._control is None else self._control.coefficient
        warmup = SPARSITY_WARMUP[penalty] if config.sparsity_warmup is None else config.sparsity_warmup
        return value * warmed(self.steps_taken, config.steps, warmup)

    @property
    def dead(self) -> Tensor:
        """[S] bool: latents of this process that have not fired for `dead_after` tokens."""
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

    @torch.no_grad()
    def _account(self, objective: Objective, tokens: int) -> StepOutput:
        if self._control is not None:
            self._control.update(objective.l0, self.steps_taken)
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
            dead=self.ranks.latents.mean(self.dead.float().mean()),
        )

    @torch.no_grad()
    def _constrain(self, objective: Objective) -> None:
        """What has to hold after each step: θ = e^{log θ}, the running threshold, the folded weights."""
        inner = self._inner
        if self._log_threshold is not None:
            inner.threshold.copy_(self._log_threshold.exp())
        if inner.kind.running_threshold and objective.smallest is not None:
            share = 1 / min(self.steps_taken, THRESHOLD_MEMORY)
            moved = inner.threshold.lerp(objective.smallest, share)
            inner.threshold.copy_(torch.where(objective.smallest.isfinite(), moved, inner.threshold))
        if self.frame is not None:
            self.frame.fold(inner, self.sae)

    @torch.no_grad()
    def _resample(self, x: Tensor, y: Tensor, error: Tensor) -> None:
        """New rows for dead latents, and no memory of the old ones in Adam."""
        latents = resample(self._inner, self.dead, x, y, error, seed=self.steps_taken, ranks=self.ranks)
        if self._log_threshold is not None:
            self._log_threshold.copy_(self._inner.threshold.log())
        self.tokens_since_fired[latents] = 0
        self._optimizer.forget(latents)

    # The optimizer, in scaled units

    def _units(self) -> dict[str, float]:
        """How far each parameter moves in raw units for one unit in scaled ones."""
        known = {
            "W_enc": self.scale_in,
            "W_dec": 1 / self.scale,
            "b_dec": 1 / self.scale,
            "W_skip": self.scale_in / self.scale,
            "threshold": THRESHOLD_PACE,
        }
        return {name: known.get(name, 1.0) for name in self._trained}

    def _operands(self) -> torch.dtype | None:
        """What the encoder's product rounds its operands to; None: nothing, where the SAE is not float32."""
        device, dtype = self.sae.W_dec.device, self.sae.W_dec.dtype
        if dtype != torch.float32:
            return None
        native: str = self.ranks.first(lambda: str(fast_dtype(str(device))).removeprefix("torch."))
        return DTYPES[self.config.precision or native]

    # The start

    @torch.no_grad()
    def _start_from(self, x: Tensor, y: Tensor) -> None:
        """Fit the fresh SAE to its first batch: the scale, the origin, and how often latents fire at first.

        The April 2024 recipe starts all biases at 0, which a long run forgives and a short one does not: b_dec may lie
        hundreds of steps away at Adam's rate, and L0 starts at half of d_sae. A transcoder's encoder is centred likewise.
        """
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise InvalidInput("step: the first batch holds NaN or infinite activations")
        inner = self._inner
        if self._framed:
            self.frame = self._make_frame(x, y)
            x, y = self.frame.inward(x, y)
        elif self.config.normalize == "expected_norm":
            self.scale_in, self.scale = scale(x), scale(y)
        inner.W_enc.mul_(self.scale_in)
        inner.W_dec.div_(self.scale)
        if self._unit_rows:
            inner.W_dec.div_(self.scale * inner.W_dec.norm(dim=1, keepdim=True))
        inner.b_dec.copy_(origin(y))
        if inner.shift is None:
            inner.encoder_bias.sub_(origin(x) @ inner.W_enc)
        if not inner.kind.takes_k:  # else k says how many fire
            p = inner.preactivations(x[:FIRST_ROWS])
            highest = p.topk(math.ceil(FIRST_RATE * len(p)), dim=0).values[-1]
            inner.encoder_bias.add_((inner.threshold if inner.kind.penalty == "l0" else 0) - highest)

    def _make_frame(self, x: Tensor, y: Tensor) -> Frame:
        if self.config.normalize == "expected_norm":
            maps = scaling(x, self.sae.widths)
            return Frame(maps, maps)
        maps = whitening(x)
        return Frame(maps, whitening(y) if self.sae.is_transcoder else maps)

    def _copy_of(self, sae: SAE) -> SAE:
        return copy.deepcopy(sae)

    # Exact state, for checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a resumed run needs; safe to hold only until the next step."""
        state = {f"sae.{name}": tensor for name, tensor in self._inner.state_dict().items()}
        state |= {f"adam.{name}": tensor for name, tensor in self._optimizer.tensors().items()}
        state["tokens_since_fired"] = self.tokens_since_fired
        if self._log_threshold is not None:
            state["log_threshold"] = self._log_threshold
        if self.frame is not None:
            state |= {f"frame.{name}": tensor for name, tensor in self.frame.tensors().items()}
        if self._control is not None:
            state["control"] = self._control.state
        return state

    def counters(self) -> dict[str, Any]:
        return {
            "steps_taken": self.steps_taken,
            "tokens_seen": self.tokens_seen,
            "scale": self.scale,
            "scale_in": self.scale_in,
        }

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """The inverse of `tensors` and `counters`."""
        device = self.tokens_since_fired.device
        for name, tensor in self._inner.state_dict().items():
            tensor.copy_(tensors[f"sae.{name}"])
        self._optimizer.restore({name.removeprefix("adam."): tensor for name, tensor in tensors.items()})
        self.tokens_since_fired = tensors["tokens_since_fired"].to(device)
        if self._log_threshold is not None:
            self._log_threshold.copy_(tensors["log_threshold"])
        self.steps_taken, self.tokens_seen = counters["steps_taken"], counters["tokens_seen"]
        self.scale, self.scale_in = counters["scale"], counters["scale_in"]
        if self._control is not None:
            self._control.state = tensors["control"].to(device)
        if self._framed:
            parts = {
                name.removeprefix("frame."): t for name, t in tensors.items() if name.startswith("frame.")
            }
            self.frame = Frame.of({name: tensor.to(device) for name, tensor in parts.items()})
            self.frame.fold(self._inner, self.sae)


@torch.no_grad()
def origin(x: Tensor) -> Tensor:
    """Where b_dec starts: the geometric median m of x [B, D] (Bricken 2023; Gao 2024), shrunk coordinate by coordinate.

    Latents only add, so b_dec should be the point from which they add, where all are off, and not the middle of the data.
    A coordinate whose mean is far above its spread v is an offset and stays; in the others the mean is the latents' own
    doing: m² / (m² + v) of it is kept. (Measured: LOG.md, November 2026.)
    """
    median = geometric_median(x)
    spread = (x - median).square().mean(0)
    return median * median.square() / (median.square() + spread).clamp_min(torch.finfo(x.dtype).tiny)


@torch.no_grad()
def geometric_median(x: Tensor, rounds: int = 20) -> Tensor:
    """The point with the least summed distance to the rows of x [B, D], by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(rounds):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-8)
        median = (weights @ x) / weights.sum()
    return median
