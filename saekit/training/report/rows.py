"""The rows of a run as curves over tokens, thinned to what a picture can show: means of neighbours, and their range.

A long run has more rows than a plot has pixels. Neighbours are taken together in equal groups; the mean is drawn as a line
and what lies between the least and the greatest as a band, so that no spike goes unseen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saekit.training.tracking import SAMPLES

POINTS = 240  # of a curve, at most
LOSSES = {  # key of a row → what it is called; all in the units of training, as the MSE, which explained variance shows, is not
    "losses/overall_loss": "loss",
    "losses/l1_loss": "of it the L1 penalty",
    "losses/l0_loss": "of it the L0 penalty",
    "losses/auxiliary_reconstruction_loss": "auxiliary loss of dead latents",
}


@dataclass(frozen=True)
class Curve:
    """Means of neighbouring rows, oldest first, and what they range over. Lists of one length."""

    tokens: list[float]  # seen when the last row of the group was written
    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class History:
    """What the rows of one SAE tell."""

    tokens: int  # seen in all
    losses: dict[str, Curve]  # by what they are called; only those that were ever above 0
    l0: Curve
    explained_variance: Curve
    dead: Curve  # counts
    held_out: dict[str, list[float]]  # tokens, l0, explained_variance: of each evaluation

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> History:
        trained = [row for row in rows if "losses/overall_loss" in row]
        evaluated = [row for row in rows if "held_out/l0" in row]
        losses = {name: curve(trained, key) for key, name in LOSSES.items()}
        losses = {name: found for name, found in losses.items() if any(found.high)}
        return cls(
            tokens=int(max((row[SAMPLES] for row in rows), default=0)),
            losses=losses,
            l0=curve(trained, "metrics/l0"),
            explained_variance=curve(trained, "metrics/explained_variance"),
            dead=curve(trained, "sparsity/dead_features"),
            held_out={
                name: [float(row[key]) for row in evaluated]
                for name, key in {
                    "tokens": SAMPLES,
                    "l0": "held_out/l0",
                    "explained_variance": "held_out/explained_variance",
                }.items()
            },
        )


def curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """The rows that have the key, thinned to at most `POINTS` groups; empty where none has it."""
    points = [(float(row[SAMPLES]), float(row[key])) for row in rows if key in row]
    size = max(1, math.ceil(len(points) / POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[value for _, value in group] for group in groups]
    return Curve(
        tokens=[group[-1][0] for group in groups],
        mean=[math.fsum(group) / len(group) for group in values],
        low=[min(group) for group in values],
        high=[max(group) for group in values],
    )
