"""A sweep as it shows itself: curves beside their random controls, a table, the strength it suggests, and the texts."""

from __future__ import annotations

import math

from rich.console import Group
from rich.text import Text

from saekit.console import table
from saekit.display import html, svg
from saekit.display.terminal import SOFT, STRONG, line
from saekit.steering.figures import COLOURS, panels
from saekit.steering.sweep import EFFECTS, Figures, SteeringSweep, SweepRow


def _columns(sweep: SteeringSweep) -> tuple[str, ...]:
    return ("place", "strength", EFFECTS[sweep.effect], "random", "perplexity", "random", "KL, nats", "rep-3")


def _cells(sweep: SteeringSweep, row: SweepRow) -> tuple[str, ...]:
    least, most = getattr(row.control_least, sweep.effect), getattr(row.control_most, sweep.effect)
    return (
        f"{row.strength:g}",
        _number(row.steered, sweep.effect),
        f"{least:.3f} … {most:.3f}",
        f"{row.steered.perplexity:.1f}",
        f"{row.control.perplexity:.1f}",
        f"{row.steered.kl:.2f}",
        f"{row.steered.repetition:.2f}",
    )


def _plain(sweep: SteeringSweep) -> tuple[str, ...]:
    plain = sweep.plain
    return (
        "",
        _number(plain, sweep.effect),
        "",
        f"{plain.perplexity:.1f}",
        "",
        f"{plain.kl:.2f}",
        f"{plain.repetition:.2f}",
    )


def _number(figures: Figures, name: str) -> str:
    value = getattr(figures, name)
    return "" if value is None else f"{value:.3f}"


# A notebook


def sweep_html(sweep: SteeringSweep) -> str:
    """A panel for each figure that is known, every row with its control, and the texts."""
    knee = sweep.knee()
    drawn = "".join(
        svg.curves(
            label,
            _curves(sweep, name),
            getattr(sweep.plain, name),
            knee.strength if knee else None,
            logarithmic,
        )
        for name, label, logarithmic in panels(sweep)
    )
    rows = [("plain", *_plain(sweep)), *((html.text(row.place), *_cells(sweep, row)) for row in sweep)]
    chosen = None if knee is None else 1 + next(i for i, row in enumerate(sweep) if row is knee)
    texts = [("plain", "", html.text(sweep.plain_text), "")] + [
        (html.text(row.place), f"{row.strength:g}", html.text(row.text), html.text(row.control_text))
        for row in sweep
    ]
    return html.whole(
        f'<div class="say">{html.text(sweep.suggestion)}</div>',
        f'<div class="soft">{html.text(_legend(sweep))}</div>',
        f'<div class="panels">{drawn}</div>',
        html.table(_columns(sweep), rows, chosen=chosen),
        html.folded("texts", html.table(("place", "strength", "steered", "random"), texts, (0, 2, 3))),
    )


def _legend(sweep: SteeringSweep) -> str:
    return (
        "grey band: random directions of the same norm; dotted: the plain model; upright: the suggested strength"
        f"; the effect is {EFFECTS[sweep.effect]}"
    )


def _curves(sweep: SteeringSweep, name: str) -> list[svg.Curve]:
    places = list(dict.fromkeys(row.place for row in sweep))
    made = []
    for i, place in enumerate(places):
        rows = sorted((row for row in sweep if row.place == place), key=lambda row: row.strength)

        def of(which: str, rows: list[SweepRow] = rows) -> list[float]:
            found = (getattr(getattr(row, which), name) for row in rows)
            return [math.nan if value is None else value for value in found]

        made.append(
            svg.Curve(
                place,
                COLOURS[i % len(COLOURS)],
                [r.strength for r in rows],
                of("steered"),
                of("control_least"),
                of("control_most"),
            )
        )
    return made


# A terminal


def sweep_text(sweep: SteeringSweep) -> Group:
    """The table and the texts, as coloured text; the suggested row stands out. One place for all rows is told once."""
    knee = sweep.knee()
    places = {row.place for row in sweep}
    alone = len(places) == 1
    rows = [[Text(cell, SOFT) for cell in ("plain", *_plain(sweep)[alone:])]]
    for row in sweep:
        style = "bold green" if row is knee else ""
        rows.append([line(cell, style) for cell in (row.place, *_cells(sweep, row))[alone:]])
    made = table(_columns(sweep)[alone:], rows)
    for column in made.columns[1:]:
        column.justify = "right"
    told = [
        ("plain", "", line(sweep.plain_text, SOFT)),
        *((row.place, f"{row.strength:g}", line(row.text, "green" if row is knee else "")) for row in sweep),
    ]
    texts = table(
        ("strength", "text") if alone else ("place", "strength", "text"),
        [(strength or place, text) if alone else (place, strength, text) for place, strength, text in told],
    )
    head = [line(f"at {place}", SOFT) for place in places if alone]
    return Group(*head, made, line(sweep.suggestion, STRONG), Text(""), texts)
