"""A sweep as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saekit.steering.sweep import Figures, SteeringSweep

COLOURS = ["#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974", "#64b5cd"]
GREY = "#8c8c8c"
PANELS: list[tuple[str, str, bool]] = [  # name, axis label, logarithmic
    ("keywords", "texts with a keyword", False),
    ("keyword_p", "P(keyword) next", False),
    ("reactivation", "feature when read again", False),
    ("perplexity", "perplexity under the plain model", True),
    ("kl", "KL of the next token, nats", False),
    ("repetition", "repeated 3-grams", False),
]


def sweep_figure(sweep: SteeringSweep) -> Figure:
    """Each figure that is known against strength: a line for each place, and the range of its random controls as a band."""
    from matplotlib.figure import Figure

    panels = [
        panel for panel in PANELS if getattr(sweep.plain, panel[0]) is not None or panel[0] == "reactivation"
    ]
    panels = [p for p in panels if all(getattr(row.steered, p[0]) is not None for row in sweep)]
    figure = Figure(figsize=(3.3 * len(panels), 3.1), layout="constrained")
    places = list(dict.fromkeys(row.place for row in sweep))
    for axes, (name, label, logarithmic) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for place, colour in zip(places, COLOURS * (1 + len(places) // len(COLOURS)), strict=False):
            _curve(axes, sweep, place, name, colour if len(places) > 1 else COLOURS[0])
        plain = getattr(sweep.plain, name)
        if plain is not None:
            axes.axhline(plain, color=GREY, linestyle=":", linewidth=1, label="plain")
        axes.set(xlabel="strength", title=label)
        axes.title.set_fontsize(9)
        if logarithmic:
            axes.set_yscale("log")
        knee = sweep.knee()
        if knee is not None:
            axes.axvline(knee.strength, color=GREY, linewidth=0.8, alpha=0.5)
    figure.axes[0].legend(fontsize=7)
    return figure


def _curve(axes: Any, sweep: SteeringSweep, place: str, name: str, colour: str) -> None:
    rows = sorted((row for row in sweep if row.place == place), key=lambda row: row.strength)
    x = [row.strength for row in rows]

    def of(which: Callable[[Any], Figures]) -> list[float]:
        return [getattr(which(row), name) for row in rows]

    axes.plot(
        x, of(lambda r: r.steered), color=colour, marker="o", markersize=3, label=place.replace("$", r"\$")
    )
    known = getattr(rows[0].control, name) is not None
    if known:
        low, high = of(lambda r: r.control_least), of(lambda r: r.control_most)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, of(lambda r: r.control), color=colour, linewidth=0.8, linestyle="--", label="random")
