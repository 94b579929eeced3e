"""Edits: small values that say what is added to the activations x at a site.

    kind          delta                        strength
    add           c·d                          c: raw; "max": c·m; "norm": c·median‖x‖ / ‖d‖
    clamp         (t − f)·d                    t: raw; "max": t·m     equals replacing SAE(x) by the reconstruction with
                                                                      the feature clamped and the error term put back
                                                                      (Templeton 2024, Scaling Monosemanticity)
    min_clamp     (max(f, t) − f)·d            t, as for clamp
    ablate        −f·d                         none
    scale         (s − 1)·f·d                  s
    project_out   −(x·d̂)·d̂                     none                   direction ablation (Arditi 2024, arXiv 2406.11717)
    rescale       (c − 1)(x·d̂)·d̂               c                      Neuronpedia's ORTHOGONAL_DECOMP
    cap           (min(x·d̂, c) − x·d̂)·d̂        c: raw; "norm": c·median‖x‖
    swap          QᵀQ·(v − x)                  none                   interchange: what another prompt's run had

d is the decoder row or the bare direction, d̂ = d/‖d‖, f the feature's activation on the un-edited x, m its maximum in
the catalog, v [D] the other run's activation, the rows of Q an orthonormal basis of the subspace that is swapped. Every
edit is a delta, so leaving a position out is leaving its delta out, several add up from the same un-edited x, and one
that changes nothing (add 0, scale 1, rescale 1) is no edit. f is read where the SAE reads: a transcoder's at its input
site, a crosscoder's at all of its sites, in the same forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import finite_number
from saekit.sites import capture
from saekit.steering.kinds import KINDS, OF_A_FEATURE, UNITS, WITHOUT_STRENGTH, Kind, Unit
from saekit.steering.positions import Positions, check_positions

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

DEPENDENT = 1e-5  # of the longest: what is left of a direction once the others' span is taken off


@dataclass(frozen=True, eq=False)
class Condition:
    """Where an edit acts: positions at which a feature's f, or else x·d̂, on the un-edited x, is above a threshold."""

    site: str
    direction: Tensor = field(repr=False)  # [D]
    above: float
    label: str
    latent: int | None = None
    sae: SAE | None = field(default=None, repr=False)  # gives f; without it the projection counts

    def __post_init__(self) -> None:
        finite_number(self.above, "above")

    def __str__(self) -> str:
        return f"{self.label} > {self.above:g}"


@dataclass(frozen=True, eq=False)
class Source:
    """What another run had at the site, for swap."""

    values: Tensor = field(
        repr=False
    )  # [D]: one state, put at every position; [T, D]: position t's at position t
    basis: Tensor | None = field(default=None, repr=False)  # Q [k, D], orthonormal rows; None: all of x

    def __post_init__(self) -> None:
        D = self.values.shape[-1]
        if self.values.ndim not in (1, 2) or not self.values.numel():
            raise InvalidInput(f"swap: expected a state [D] or states [T, D], got {tuple(self.values.shape)}")
        if self.basis is not None and (self.basis.ndim != 2 or self.basis.shape[1] != D):
            raise InvalidInput(f"swap: expected basis rows of width {D}, got {tuple(self.basis.shape)}")


@dataclass(frozen=True, eq=False)
class Edit:
    """One intervention. Made by `Feature`, `Direction` and `swap`; given to `steer` and `compare`."""

    kind: Kind
    site: str
    direction: Tensor = field(repr=False)  # d [D]; of a swap what it is about, its subspace is in `source`
    strength: float
    unit: Unit = "raw"
    label: str = "direction"
    latent: int | None = None
    sae: SAE | None = field(default=None, repr=False)  # gives f, for the kinds that need it
    max_activation: float | None = field(default=None, repr=False)  # m
    norm: float | None = field(default=None, repr=False)  # median ‖x‖ at the site, where it is known
    source: Source | None = field(default=None, repr=False)  # swap's
    condition: Condition | None = None
    positions: Positions | None = None  # of this edit; None: those that `steer` is given
    model_hash: str | None = field(default=None, repr=False)  # of the model it is for, where that is known

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.unit not in UNITS[self.kind]:
            raise InvalidInput(f"unit: {self.kind} takes {' or '.join(UNITS[self.kind])}, not {self.unit!r}")
        finite_number(self.strength, "strength")
        if self.direction.ndim != 1:
            raise InvalidInput(f"{self.label}: expected a direction [D], got {tuple(self.direction.shape)}")
        if self.needs_activation and (self.sae is None or self.latent is None):
            raise InvalidInput(
                f"{self.kind} needs a feature of an SAE; a bare direction has no activation, use add, project_out, "
                "rescale or cap"
            )
        if self.unit == "max" and not self.max_activation:
            raise InvalidInput(
                f"{self.label}: no maximum activation is known (it never fired), use unit='raw'"
            )
        if (self.needs_projection or self.unit == "norm") and not bool(self.direction.any()):
            raise InvalidInput(
                f"{self.label}: a direction of zeros points nowhere, so {self.kind} cannot use it"
            )
        if (self.kind == "swap") != (self.source is not None):
            raise InvalidInput(
                "swap needs what another prompt's run had: direction.swap(model, 'another prompt')"
                if self.kind == "swap"
                else f"source: only swap takes one, not {self.kind}"
            )
        if self.source is not None and self.source.values.shape[-1] != len(self.direction):
            raise InvalidInput(
                f"swap: states of width {self.source.values.shape[-1]} for a direction of width {len(self.direction)}"
            )

    @property
    def needs_activation(self) -> bool:
        """Whether its delta depends on f."""
        return self.kind in OF_A_FEATURE

    @property
    def needs_projection(self) -> bool:
        """Whether its delta depends on x·d̂."""
        return self.kind in ("project_out", "rescale", "cap")

    @property
    def is_nothing(self) -> bool:
        """Whether it cannot change anything, so that steering with it is the plain model bit for bit."""
        return (self.kind == "add" and self.strength == 0) or (
            self.kind in ("scale", "rescale") and self.strength == 1
        )

    @property
    def amount(self) -> float:
        """The strength in raw units, but for unit `"norm"`, which depends on x where `norm` is not known."""
        if self.unit == "max":
            assert self.max_activation is not None
            return self.strength * self.max_activation
        if self.unit == "norm" and self.norm is not None:
            return self.strength * self.norm / (float(self.direction.norm()) if self.kind == "add" else 1.0)
        return self.strength

    def when(self, what: Steerable, *, above: float) -> Edit:
        """The same edit, only where a feature's activation, or a bare direction's x·d̂, exceeds `above`.

        It is read on the un-edited activations of the same position, at `what`'s own site, which has to come before the
        edit's or be the same.
        """
        probe = what.edit("add")
        sae = probe.sae if probe.latent is not None else None
        site = probe.site if sae is None else sae.sites[-1]
        return replace(
            self, condition=Condition(site, probe.direction, above, probe.label, probe.latent, sae)
        )

    def at(self, positions: Positions) -> Edit:
        """The same edit at positions of its own, whatever `steer` is given for the others."""
        return replace(self, positions=check_positions(positions))

    def __str__(self) -> str:
        strength = (
            ""
            if self.kind in WITHOUT_STRENGTH
            else f" {self.strength:g}" + ("" if self.unit == "raw" else f" × {self.unit}")
        )
        where = "" if self.condition is None else f" where {self.condition}"
        at = "" if self.positions is None else f", positions {self.positions}"
        return f"{self.kind}{strength} {self.label} at {self.site}{where}{at}"


class Steerable(ABC):
    """What edits can be made from: a catalog's feature, an SAE's latent, a bare direction (which has no activation)."""

    @abstractmethod
    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        """An edit of any kind but swap; raises `InvalidInput` for a strength or unit that the kind does not take."""

    def add(self, strength: float, *, unit: Unit = "raw") -> Edit:
        """Add strength · d. unit `"max"`: in multiples of the maximum activation; `"norm"`: strength times the median
        residual norm, along d."""
        return self.edit("add", strength, unit)

    def clamp(self, target: float, *, unit: Unit = "raw") -> Edit:
        """Hold the feature at `target` (unit `"max"`: times its maximum), the SAE's error kept."""
        return self.edit("clamp", target, unit)

    def min_clamp(self, target: float, *, unit: Unit = "raw") -> Edit:
        """Raise the feature to `target` where it is below, and leave it where it is above."""
        return self.edit("min_clamp", target, unit)

    def ablate(self) -> Edit:
        """Take the feature's contribution out."""
        return self.edit("ablate")

    def scale(self, factor: float) -> Edit:
        """Multiply the feature's activation by `factor`."""
        return self.edit("scale", factor)

    def project_out(self) -> Edit:
        """Take the activations' component along d out. Needs no SAE."""
        return self.edit("project_out")

    def rescale(self, factor: float) -> Edit:
        """Multiply the activations' component along d by `factor`. Needs no SAE."""
        return self.edit("rescale", factor)

    def cap(self, limit: float, *, unit: Unit = "raw") -> Edit:
        """Hold x·d̂ at `limit` at most (unit `"norm"`: times the median residual norm). Needs no SAE."""
        return self.edit("cap", limit, unit)

    def swap(self, model: TransformerBridge, text: str, *, position: int | None = None) -> Edit:
        """Give the activations the component along d that they have in another text's run.

        position: of one token of the text (BOS is 0, −1 is the last), whose component goes everywhere; None gives
        position t that of the text's position t, as far as the text goes. Several directions at once: `swap`.
        """
        return swap(model, text, self, position=position)


def swap(
    model: TransformerBridge,
    text: str,
    *directions: Steerable,
    site: str | None = None,
    position: int | None = None,
) -> Edit:
    """Replace the part of x in the span of `directions` by what it is in another text's run (interchange).

    Without directions the whole of x at `site` is replaced (with `position=-1`: by a task vector, Hendel 2023).
    position: as in `Steerable.swap`.

    Raises `InvalidInput` for an empty text, a position it does not have, directions of different sites or linearly
    dependent ones; `UnknownName` for a site the model lacks.
    """
    probes = [direction.edit("add") for direction in directions]
    sites = list(dict.fromkeys([probe.site for probe in probes] + ([site] if site else [])))
    if len(sites) != 1:
        raise InvalidInput(
            f"swap: expected directions of one site, got {', '.join(sites)}"
            if sites
            else "swap: expected directions, or site=… to swap all of it"
        )
    if not isinstance(text, str) or not text:
        raise InvalidInput(f"swap: expected another text, got {text!r}")
    states = capture(model, sites, model.to_tokens(text))[sites[0]][0].float().cpu()
    if position is not None and not -len(states) <= position < len(states):
        raise InvalidInput(f"swap: position {position} of a text of {len(states)} tokens")
    values = states if position is None else states[position].clone()
    basis = orthonormal([probe.direction for probe in probes]) if probes else None
    about = " & ".join(probe.label for probe in probes) or "everything"
    direction = probes[0].direction if probes else states[-1 if position is None else position].clone()
    where = "" if position is None else f"[{position}]"
    return Edit(
        "swap", sites[0], direction, 0.0, label=f"{about} from {text!r}{where}", source=Source(values, basis)
    )


def orthonormal(directions: Sequence[Tensor]) -> Tensor:
    """Q [k, D], float32: orthonormal rows that span the directions [D]. Raises `InvalidInput` for dependent ones."""
    rows = torch.stack([direction.double().cpu() for direction in directions])
    q, r = torch.linalg.qr(rows.t())
    left = r.diagonal().abs()
    if len(rows) > rows.shape[1] or bool((left <= DEPENDENT * rows.norm(dim=1).max()).any()):
        raise InvalidInput(f"swap: the {len(rows)} directions are linearly dependent; leave some out")
    return q.t().float().contiguous()
