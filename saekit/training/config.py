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
    clip_grad_norm: Positive | None = 1.0

    normalize: Literal["expected_norm", "none"] = (
        "expected_norm"  # scale so that E‖x‖ = √d_in; folded on export
    )
    l1_coefficient: NonNegative = 5.0  # standard
    l1_warmup: Share = 0.05  # share of the run
    aux_coefficient: NonNegative = 1 / 32  # topk: weight of AuxK
    aux_k: Count | None = None  # topk: dead latents used by AuxK; d_in / 2 by default
    dead_after: Count = 1_000_000  # a latent is dead after this many tokens without firing

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
