"""Steering the sparsity coefficient until L0 is the wanted one.

    e = log L0 + H · d log L0 / dt − log target, clipped to ±1
    log λ ← log λ + G e dt                                          t: share of the run

An integral controller that looks ahead, in logarithms because L0 answers to ratios of λ. At a constant λ the L0 of a
young SAE keeps falling for most of the run; a controller that saw only where L0 is would push on a door that is opening,
and kill latents that are still to be useful. This one acts where L0, at its present pace, would miss its target. Times are
shares of the run: a long run, whose small learning rate makes L0 answer slowly, is steered as calmly as a short one. The
state stays on the device; nothing waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HOLD = 0.1  # share of the run before the first correction: a fresh encoder's L0 says nothing of where it is going
AHEAD, GAIN = 0.15, 10.0  # H and G
SMOOTHED = 0.02  # share of the run over which L0 is averaged to see its slope


class Controller:
    """target: the wanted L0. start: the coefficient to begin with. steps: of the run."""

    def __init__(self, target: float, start: float, *, steps: int, device: torch.device) -> None:
        self._log_target, self._steps = math.log(target), steps
        self._memory = max(1.0, SMOOTHED * steps)  # steps
        # log λ, and the running mean of log L0
        self.state = torch.tensor([math.log(max(start, 1e-8)), 0.0], dtype=torch.float64, device=device)

    @property
    def coefficient(self) -> Tensor:
        """λ [], float32."""
        return self.state[0].exp().float()

    def update(self, l0: Tensor, step: int) -> None:
        """Take in the L0 [] of a step (0-based)."""
        log_l0 = l0.double().clamp_min(1e-3).log()
        mean = log_l0 if step == 0 else self.state[1].lerp(log_l0, 1 / self._memory)
        log_lambda = self.state[0]
        if step >= HOLD * self._steps:
            per_step = (log_l0 - mean) / self._memory  # a mean lags a ramp by its memory
            error = log_l0 + AHEAD * self._steps * per_step - self._log_target
            log_lambda = log_lambda + GAIN / self._steps * error.clamp(-1, 1)
        self.state = torch.stack([log_lambda, mean])
