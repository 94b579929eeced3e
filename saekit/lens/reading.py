"""Directions and features read token by token over a text.

    feature      f(x) at each token
    direction    x · d̂ at each token, in units of the activations

Activations all share a large part, so nearly every projection lies on one side of 0: colours turn at the text's median, and
`values` are the projections themselves.

T tokens, D the site's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lens.drawing import drawable, drawable_token
from saekit.lens.tokens import visible
from saekit.lm import special_ids, token_strings
from saekit.sites import capture
from saekit.steering.directions import Direction
from saekit.steering.directions.states import text_ids
from saekit.steering.edits import Steerable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Track:
    """What one feature or direction says of each token."""

    label: str
    site: str
    kind: Literal["activation", "projection"]
    values: tuple[float, ...]
    zero: float  # where colours turn: 0 for activations, the text's median for projections
    scale: float  # distance from zero that has the full colour

    def level(self, position: int) -> float:
        """From −1 to 1: which colour a token has; 0 for what is no number."""
        level = (self.values[position] - self.zero) / self.scale if self.scale else 0.0
        return 0.0 if math.isnan(level) else max(-1.0, min(1.0, level))

    @property
    def title(self) -> str:
        about = f"{self.label} at {self.site}, {self.kind}"
        return f"{about}, full colour ±{self.scale:.3g}" + (
            f" around {self.zero:.3g}" if self.kind == "projection" else ""
        )


@dataclass(frozen=True)
class Reading:
    """A text read by one or more features and directions."""

    tokens: tuple[str, ...]  # as the model reads them, spaces kept
    special: tuple[bool, ...]  # BOS, EOS and pad: shown without colour, and no part of any scale
    tracks: tuple[Track, ...] = field(repr=False)

    def _repr_html_(self) -> str:
        from saekit.display.reading import reading_html

        return reading_html(self)

    def __rich__(self) -> RenderableType:
        from saekit.display.reading import reading_text

        return reading_text(self)

    def _repr_pretty_(self, p: Any, cycle: bool) -> None:
        """IPython's."""
        p.text(str(self))

    def __str__(self) -> str:
        """Coloured text on a terminal, a table with a line for each token elsewhere."""
        from saekit.display.terminal import in_colour

        return in_colour(self) or self.table()

    def table(self) -> str:
        """Every value, a line for each token."""
        names = [repr(visible(token)) for token in self.tokens]
        wide = max(len(name) for name in names)
        lines = [f"[{i}] {visible(track.title)}" for i, track in enumerate(self.tracks)]
        lines.append(" " * (wide + 6) + " ".join(f"{f'[{i}]':>10}" for i in range(len(self.tracks))))
        for t, name in enumerate(names):
            values = " ".join(f"{track.values[t]:>10.4g}" for track in self.tracks)
            lines.append(f"{t:>4}  {name:<{wide}}{values}")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """A matplotlib figure: a row of bars for each track, from its zero."""
        from matplotlib.figure import Figure

        width = min(40.0, max(5.0, 0.24 * len(self.tokens)))
        figure = Figure(figsize=(width, 0.8 + 1.5 * len(self.tracks)), layout="constrained")
        rows = figure.subplots(len(self.tracks), 1, squeeze=False, sharex=True)[:, 0]
        for axes, track in zip(rows, self.tracks, strict=True):
            heights = [
                0.0 if special else value - track.zero
                for value, special in zip(track.values, self.special, strict=True)
            ]
            axes.bar(range(len(heights)), heights, bottom=track.zero, color="#4878a8")
            axes.axhline(track.zero, color="black", linewidth=0.6)
            axes.set_title(drawable(track.title), fontsize=8)
            axes.set_ylabel(track.kind, fontsize=8)
        rows[-1].set_xticks(
            range(len(self.tokens)), [drawable_token(token) for token in self.tokens], rotation=90, fontsize=7
        )
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tracks = [
            {
                "label": track.label,
                "site": track.site,
                "kind": track.kind,
                "zero": track.zero,
                "values": list(track.values),
            }
            for track in self.tracks
        ]
        return {"tokens": list(self.tokens), "tracks": tracks}

    def levels(self, track: Track) -> list[tuple[str, float]]:
        """(token, level from −1 to 1) of the text."""
        return [
            (token, 0.0 if special else track.level(t))
            for t, (token, special) in enumerate(zip(self.tokens, self.special, strict=True))
        ]


def read(model: TransformerBridge, text: str, what: Steerable | Sequence[Steerable]) -> Reading:
    """Read a text by a direction, a feature, or several of both, in one forward.

    Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty text, one longer than the context, or a
    direction or SAE of another model or width.
    """
    wanted = [what] if isinstance(what, Steerable) else list(what)
    for item in wanted:
        if not isinstance(item, Steerable):
            raise InvalidInput(f"read: expected a direction or a feature, got {type(item).__name__}")
        if isinstance(item, Direction):
            item.check_fits(model)
    if not wanted:
        raise InvalidInput("read: expected a direction, a feature, or a list of them, got none")
    ids = text_ids(model, text)
    special = torch.isin(ids, torch.tensor(special_ids(model), dtype=torch.long))
    edits = [item.edit("add", 0.0) for item in wanted]
    saes = [edit.sae if edit.latent is not None else None for edit in edits]
    for sae in saes:
        if sae is not None:
            sae.check_fits(model)
    sites = [
        site for edit, sae in zip(edits, saes, strict=True) for site in (sae.sites if sae else [edit.site])
    ]
    seen = {site: x[0].float().cpu() for site, x in capture(model, sites, ids[None]).items()}

    tracks = []
    for edit, sae in zip(edits, saes, strict=True):
        if sae is not None and edit.latent is not None:
            x = torch.cat([seen[site] for site in sae.sites], -1)
            with torch.no_grad():
                values = sae.encode_some(x, [edit.latent])[:, 0].float().cpu()
            zero, scale = 0.0, edit.max_activation or _largest(values[~special])
            tracks.append(Track(edit.label, ", ".join(sae.sites), "activation", _plain(values), zero, scale))
            continue
        axis = edit.direction.float().cpu()
        values = seen[edit.site] @ (axis / axis.norm().clamp_min(torch.finfo(axis.dtype).tiny))
        zero = float(values[~special].median()) if bool((~special).any()) else 0.0
        ordinary = (values[~special] - zero).abs()
        scale = _largest(ordinary)
        tracks.append(Track(edit.label, edit.site, "projection", _plain(values), zero, scale))
    tokens = token_strings(model.tokenizer, ids.tolist())
    return Reading(tuple(tokens), tuple(special.tolist()), tuple(tracks))


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0
