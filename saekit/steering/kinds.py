"""The kinds of edit and the units each takes: plain names, so that the command line need not import torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["add", "clamp", "min_clamp", "ablate", "scale", "project_out", "rescale", "cap", "swap"]
Unit = Literal["raw", "max", "norm"]

UNITS: dict[Kind, tuple[Unit, ...]] = {
    "add": ("raw", "max", "norm"),
    "clamp": ("raw", "max"),
    "min_clamp": ("raw", "max"),
    "ablate": ("raw",),
    "scale": ("raw",),
    "project_out": ("raw",),
    "rescale": ("raw",),
    "cap": ("raw", "norm"),
    "swap": ("raw",),
}
KINDS: tuple[Kind, ...] = tuple(UNITS)
OF_A_FEATURE: tuple[Kind, ...] = ("clamp", "min_clamp", "ablate", "scale")  # their delta depends on f
WITHOUT_STRENGTH: tuple[Kind, ...] = ("ablate", "project_out", "swap")
