"""The kinds of edit and the units each takes: plain names, so that the command line need not import torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["add", "clamp", "scale", "ablate"]
Unit = Literal["raw", "max", "norm"]

KINDS: tuple[Kind, ...] = ("add", "clamp", "scale", "ablate")
UNITS: dict[Kind, tuple[Unit, ...]] = {
    "add": ("raw", "max", "norm"),
    "clamp": ("raw", "max"),
    "scale": ("raw",),
    "ablate": ("raw",),
}
