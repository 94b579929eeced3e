"""Small inline pictures for a notebook: bars, and curves over strengths. Texts in them are harmless, and nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saekit.display.html import text

WIDE, HIGH = 230.0, 120.0  # of a panel of curves
LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 6.0, 18.0
GREY = "#8c8c8c"


def bars(
    edges: Sequence[tuple[float, float]], counts: Sequence[int], titles: Sequence[str], about: str
) -> str:
    """A histogram as wide as its place: edges are positions along the axis, bars stand on 0. Nothing for no counts."""
    most = max(counts, default=0)
    if most == 0:
        return ""
    start, end = min(low for low, _ in edges), max(high for _, high in edges)
    scale = 1000 / (end - start)
    drawn = []
    for (low, high), count, title in zip(edges, counts, titles, strict=True):
        if count:
            tall = max(0.6, 100 * count / most)  # one of a million is still seen
            x, wide = (low - start) * scale, max(1.0, (high - low) * scale - 1.5)
            drawn.append(
                f'<rect x="{x:.0f}" y="{100 - tall:.1f}" width="{wide:.0f}" height="{tall:.1f}">'
                f"<title>{text(title)}</title></rect>"
            )
    return (
        f'<svg class="bars" viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{text(about)}">'
        f"{''.join(drawn)}</svg>"
    )


def axis(*labels: str) -> str:
    """What stands under bars, from left to right."""
    return f'<div class="axis">{"".join(f"<span>{text(label)}</span>" for label in labels)}</div>'


@dataclass(frozen=True)
class Curve:
    """A line over x, and the range of its random controls."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def curves(
    title: str, lines: Sequence[Curve], plain: float | None, chosen: float | None, logarithmic: bool
) -> str:
    """A panel: a line for each curve, its controls as a band, the plain value dotted, the chosen strength upright.

    A logarithmic axis leaves out what is not above 0.
    """
    values = [v for line in lines for v in (*line.y, *line.low, *line.high)] + (
        [] if plain is None else [plain]
    )
    values = [v for v in values if math.isfinite(v) and (v > 0 or not logarithmic)]
    xs = [x for line in lines for x in line.x]
    if not values or not xs:
        return ""
    least, most = (min(values), max(values)) if logarithmic else (min(0.0, *values), max(values))
    if least == most:
        most = least + 1 if not logarithmic else least * 10

    def across(x: float) -> float:
        span = max(xs) - min(xs)
        return LEFT + (WIDE - LEFT - RIGHT) * ((x - min(xs)) / span if span else 0.5)

    def up(y: float) -> float:
        share = math.log(y / least) / math.log(most / least) if logarithmic else (y - least) / (most - least)
        return TOP + (HIGH - TOP - BOTTOM) * (1 - share)

    def path(points: Sequence[tuple[float, float]]) -> str:
        kept = ((x, y) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic))
        return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in kept)

    floor = HIGH - BOTTOM
    parts = [f'<path class="frame" d="M{LEFT},{TOP}V{floor}H{WIDE - RIGHT}"/>']
    if chosen is not None:
        parts.append(
            f'<path class="frame" d="M{across(chosen):.1f},{TOP}V{floor}"><title>suggested: {chosen:g}</title></path>'
        )
    if plain is not None and (plain > 0 or not logarithmic):
        parts.append(
            f'<path class="frame" stroke-dasharray="2 3" d="M{LEFT},{up(plain):.1f}H{WIDE - RIGHT}">'
            f"<title>plain: {plain:.3g}</title></path>"
        )
    for line in lines:
        band = [*zip(line.x, line.low, strict=True), *reversed([*zip(line.x, line.high, strict=True)])]
        parts.append(
            f'<polygon points="{path(band)}" fill="{GREY}" fill-opacity="0.35"><title>random</title></polygon>'
        )
        drawn = list(zip(line.x, line.y, strict=True))
        parts.append(
            f'<polyline points="{path(drawn)}" fill="none" stroke="{line.colour}" stroke-width="1.6"/>'
        )
        parts += [
            f'<circle cx="{at.split(",")[0]}" cy="{at.split(",")[1]}" r="2.6" fill="{line.colour}">'
            f"<title>{text(line.name)} {x:g}: {y:.3g}</title></circle>"
            for x, y in drawn
            if (at := path([(x, y)]))
        ]
    parts += [
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{_short(most)}</text>',
        f'<text x="{LEFT - 4}" y="{floor}" text-anchor="end">{_short(least)}</text>',
        *(
            f'<text x="{across(x):.1f}" y="{HIGH - 5}" text-anchor="{anchor}">{x:g}</text>'
            for x, anchor in {min(xs): "start", max(xs): "end"}.items()
        ),
        f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 5}" text-anchor="middle" fill-opacity="0.7">strength</text>',
    ]
    return (
        f'<div><div class="name">{text(title)}</div><svg viewBox="0 0 {WIDE:g} {HIGH:g}" '
        f'role="img" aria-label="{text(title)} against strength">{"".join(parts)}</svg></div>'
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
