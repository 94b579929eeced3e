"""One edit at several strengths, and a norm-matched random direction at the same ones beside it.

Random directions collapse a text as readily as chosen ones, so a strength says nothing without its control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from saekit.errors import InvalidInput
from saekit.steering.compare import check_prompt, compare
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.positions import Positions

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class SweepRow:
    """What one strength does."""

    strength: float
    text: str  # prompt and continuation
    kl: float  # KL(steered ‖ plain) of the next token, nats
    perplexity: float  # of the continuation under the plain model
    control_text: str
    control_kl: float
    control_perplexity: float


def sweep(
    model: TransformerBridge,
    prompt: str,
    make: Callable[[float], Edit],
    strengths: Sequence[float],
    *,
    max_new_tokens: int = 20,
    seed: int = 0,
    temperature: float = 1.0,
    positions: Positions = "all",
) -> list[SweepRow]:
    """Continue a prompt at each strength. make: strength → edit, e.g. `feature.add`.

    The control adds a random direction whose norm is that of the edit's direction, in the same amount.
    """
    if not strengths:
        raise InvalidInput("strengths: expected at least one number, e.g. 0,2,4,8")
    rows = []
    options = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "temperature": temperature,
        "positions": positions,
    }
    for strength in strengths:
        edit = make(strength)
        side = compare(model, prompt, edit, **options)  # type: ignore[arg-type]
        control = compare(model, prompt, control_of(edit, seed), **options)  # type: ignore[arg-type]
        rows.append(
            SweepRow(
                strength=strength,
                text=side.steered,
                kl=side.kl,
                perplexity=perplexity(model, prompt, side.steered),
                control_text=control.steered,
                control_kl=control.kl,
                control_perplexity=perplexity(model, prompt, control.steered),
            )
        )
    return rows


def control_of(edit: Edit, seed: int = 0) -> Edit:
    """An edit that adds as much of a random direction as `edit` adds (for clamp: as its target) of its own."""
    direction = Direction.random(edit.direction, edit.site, seed)
    unit = edit.unit
    return Edit(
        "add",
        edit.site,
        direction.vector,
        edit.strength,
        unit,
        direction.label,
        max_activation=edit.max_activation,
        norm=edit.norm,
    )


@torch.no_grad()
def perplexity(model: TransformerBridge, prompt: str, text: str) -> float:
    """exp of the mean loss of the continuation's tokens under the plain model; 1 for an empty one."""
    ids = model.to_tokens(text, truncate=False)
    start = check_prompt(model, prompt, 1).shape[1]
    if ids.shape[1] <= start:
        return 1.0
    log_p = model(ids)[0, :-1].float().log_softmax(-1)
    losses = -log_p.gather(1, ids[0, 1:, None]).squeeze(1)[start - 1 :]
    return float(losses.mean().exp())
