"""Edits: small values that say what is added to the activations x at a site.

    kind     delta                 strength
    add      c·d                   c: raw; "max": c·m; "norm": c·median‖x‖ / ‖d‖
    clamp    (t − f)·d             t: raw; "max": t·m        equals replacing SAE(x) by the reconstruction with the
                                                             feature clamped and the error term put back
                                                             (Templeton 2024, Scaling Monosemanticity)
    scale    (s − 1)·f·d           s
    ablate   −f·d                  none

d is the decoder row, f the feature's activation on the un-edited x, m its maximum in the catalog. Every edit is a
delta, so leaving a position out is leaving its delta out, and an edit of strength 0 that changes nothing is no edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import finite_number
from saekit.steering.kinds import KINDS, UNITS, Kind, Unit

if TYPE_CHECKING:
    from saekit.sae import SAE


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention. Made by `Feature` and `Direction`; given to `steer` and `compare`."""

    kind: Kind
    site: str
    direction: Tensor = field(repr=False)  # d [D]
    strength: float
    unit: Unit = "raw"
    label: str = "direction"
    latent: int | None = None
    sae: SAE | None = field(default=None, repr=False)  # gives f, for the kinds that need it
    max_activation: float | None = field(default=None, repr=False)  # m
    norm: float | None = field(default=None, repr=False)  # median ‖x‖ at the site, where it is known

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.unit not in UNITS[self.kind]:
            raise InvalidInput(f"unit: {self.kind} takes {' or '.join(UNITS[self.kind])}, not {self.unit!r}")
        finite_number(self.strength, "strength")
        if self.needs_activation and (self.sae is None or self.latent is None):
            raise InvalidInput(
                f"{self.kind} needs a feature of an SAE; a bare direction has no activation, use add"
            )
        if self.needs_activation and self.sae is not None and (self.site,) != self.sae.sites:
            raise InvalidInput(
                f"{self.kind}: this feature is read at {', '.join(self.sae.sites)} and written at {self.site}; use add"
            )
        if self.unit == "max" and not self.max_activation:
            raise InvalidInput(
                f"{self.label}: no maximum activation is known (it never fired), use unit='raw'"
            )

    @property
    def needs_activation(self) -> bool:
        return self.kind != "add"

    @property
    def is_nothing(self) -> bool:
        """Whether it cannot change anything, so that steering with it is the plain model bit for bit."""
        return (self.kind == "add" and self.strength == 0) or (self.kind == "scale" and self.strength == 1)

    def amount(self, f: Tensor | None, norm: float | None) -> Tensor | float:
        """What d is multiplied by: a number, or per position [N, T] for kinds that depend on f."""
        if self.kind == "add":
            return self._add_amount(norm)
        assert f is not None
        if self.kind == "clamp":
            m = self.max_activation if self.unit == "max" else 1.0
            assert m is not None
            return self.strength * m - f
        return (self.strength - 1) * f if self.kind == "scale" else -f

    def _add_amount(self, norm: float | None) -> float:
        if self.unit == "max":
            assert self.max_activation is not None
            return self.strength * self.max_activation
        if self.unit == "norm":
            assert norm is not None
            return self.strength * norm / float(self.direction.norm())
        return self.strength

    def __str__(self) -> str:
        strength = (
            ""
            if self.kind == "ablate"
            else f" {self.strength:g}" + ("" if self.unit == "raw" else f" × {self.unit}")
        )
        return f"{self.kind}{strength} {self.label} at {self.site}"


class Steerable(ABC):
    """What edits can be made from: a catalog's feature, an SAE's latent, a bare direction (which can only be added)."""

    @abstractmethod
    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        """An edit of any kind; raises `InvalidInput` for a strength or unit that the kind does not take."""

    def add(self, strength: float, *, unit: Unit = "raw") -> Edit:
        """Add strength · d. unit `"max"`: in multiples of the maximum activation; `"norm"`: strength times the median
        residual norm, along d."""
        return self.edit("add", strength, unit)

    def clamp(self, target: float, *, unit: Unit = "raw") -> Edit:
        """Hold the feature at `target` (unit `"max"`: times its maximum), the SAE's error kept."""
        return self.edit("clamp", target, unit)

    def ablate(self) -> Edit:
        """Take the feature's contribution out."""
        return self.edit("ablate")

    def scale(self, factor: float) -> Edit:
        """Multiply the feature's activation by `factor`."""
        return self.edit("scale", factor)
