"""Learning-rate, coefficient and K schedules as functions of the step alone, so that a resume needs no state."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, shape: str, warmup: float, decay: float) -> float:
    """The factor on the learning rate at `step` (0-based) of `steps`.

    Linear warm-up over the first `warmup` share, flat, then linear or cosine decay to 0 over the last `decay`.
    """
    risen = warmed(step, steps, warmup)
    if shape == "constant" or decay == 0:
        return risen
    left = max(0.0, min(1.0, (steps - step) / (decay * steps)))
    return risen * (left if shape == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def warmed(step: int, steps: int, warmup: float) -> float:
    """The factor of a coefficient that rises linearly over the first `warmup` share of the run."""
    return min(1.0, (step + 1) / (warmup * steps)) if warmup > 0 else 1.0


def k_at(step: int, steps: int, *, k: int, start: int | None, warmup: float) -> int:
    """Latents kept per token: from `start` to k, linearly over the first `warmup` share, then k."""
    if start is None or warmup == 0:
        return k
    return round(start + (k - start) * min(1.0, step / (warmup * steps)))


def due(step: int, steps: int, shares: tuple[float, ...]) -> bool:
    """Whether `step` (counted from 1) is the one at which a share of the run is reached."""
    return any(step == max(1, round(share * steps)) for share in shares)
