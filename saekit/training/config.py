"""The `training` section of a recipe, which is also the keywords of `Trainer`.

Schedules are given as shares of the run, so that a longer run keeps its shape. Tokens are counted as
activations seen: one per position that is not excluded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, PositiveInt


def _whole(value: Any) -> Any:
    """`1e6` and `"1e6"` (YAML 1.1 reads it as a text) are fine where a whole number is wanted."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number, got a boolean")
    if isinstance(value, (str, float)):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


Count = Annotated[PositiveInt, BeforeValidator(_whole)]
Share = Annotated[FiniteFloat, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0.0)]
Positive = Annotated[FiniteFloat, Field(gt=0.0)]


class TrainingConfig(BaseModel):
    """How an SAE is trained. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Count = 10_000_000  # activations to train on
    batch_size: Count = 4096  # activations per step

    lr: Positive = 3e-4
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"  # the shape of the decay
    lr_warmup: Share = 0.01  # share of the run
    lr_decay: Share = 0.2  # share of the run, at its end
    adam_betas: tuple[Share, Share] = (0.9, 0.999)
    adam_eps: Positive = 6.25e-10  # Gao 2024, appendix A
    # In scaled units. It binds on nearly every step: Adam then sees gradients of one size, and the large ones of the first
    # steps do not slow all that follow (LOG.md, November 2026). None: no clipping.
    clip_grad_norm: Positive | None = 0.1

    # Operands of the encoder's product; weights, sums and all else stay float32. None: bfloat16 where this machine
    # multiplies it natively, else float32.
    precision: Literal["bfloat16", "float32"] | None = None
    # What the data is scaled by while training; saved SAEs always take raw activations.
    normalize: Literal["expected_norm", "none", "whiten"] = "expected_norm"  # E‖x‖ = √d_in; covariance 1
    decoder: Literal["unit", "free"] | None = (
        None  # rows kept at norm 1, or free; None: the architecture's own
    )

    l1_coefficient: NonNegative = 5.0  # standard, gated
    l0_coefficient: NonNegative = 1.0  # jumprelu
    # Share of the run over which the coefficient rises. None: 0 for an L1 penalty, whose full weight keeps L0 low from the first
    # step at no cost in quality (LOG.md, November 2026), 0.05 for JumpReLU's.
    sparsity_warmup: Share | None = None
    target_l0: Positive | None = (
        None  # standard, gated, jumprelu: the coefficient is steered until L0 is this
    )
    k_start: Count | None = None  # topk, batchtopk, matryoshka: K falls (or rises) from this to k …
    k_warmup: Share = 0.1  # … over this share of the run
    l0_penalty: Literal["step", "tanh"] = "step"  # jumprelu: Rajamanoharan 2024, or Anthropic, January 2025
    bandwidth: Positive | None = None  # jumprelu: width ε of the estimator; None: 0.05 for step, 2 for tanh
    tanh_scale: Positive = 4.0  # jumprelu, tanh: c
    preact_coefficient: NonNegative = 3e-6  # jumprelu, tanh: weight of the pre-activation loss

    dead_latents: Literal["auxk", "resample", "none"] | None = None  # None: the architecture's own
    dead_after: Count = 1_000_000  # a latent is dead after this many tokens without firing
    aux_coefficient: NonNegative = 1 / 32  # auxk: its weight
    aux_k: Count | None = None  # auxk: dead latents used; half the width written by default
    resample_at: tuple[Share, ...] = (
        0.2,
        0.4,
        0.6,
    )  # resample: shares of the run at which dead latents start anew

    ring: Count = 65_536  # rows held for shuffling
    contexts: Count = 32  # contexts per forward of the language model
    log_every: Count = 50  # steps
    evaluate_every: Count | None = None  # steps; always once at the end
    evaluate_tokens: Count = 65_536  # held-out tokens per evaluation
    checkpoint_every: Count | None = None  # steps; none: only `final`
    keep_checkpoints: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 2

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_size)
