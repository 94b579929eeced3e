"""A sweep, and a comparison, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saekit.steering.compare import Comparison, Odds
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


def panels(sweep: SteeringSweep) -> list[tuple[str, str, bool]]:
    """(name, label, whether logarithmic) of the figures that every row has; a plain text is never read again."""
    known = [p for p in PANELS if getattr(sweep.plain, p[0]) is not None or p[0] == "reactivation"]
    return [p for p in known if all(getattr(row.steered, p[0]) is not None for row in sweep)]


def sweep_figure(sweep: SteeringSweep) -> Figure:
    """Each figure that is known against strength: a line for each place, and the range of its random controls as a band."""
    from matplotlib.figure import Figure

    shown = panels(sweep)
    figure = Figure(figsize=(3.3 * len(shown), 3.1), layout="constrained")
    places = list(dict.fromkeys(row.place for row in sweep))
    for axes, (name, label, logarithmic) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
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
    from saekit.lens.drawing import drawable

    rows = sorted((row for row in sweep if row.place == place), key=lambda row: row.strength)
    x = [row.strength for row in rows]

    def of(which: Callable[[Any], Figures]) -> list[float]:
        return [getattr(which(row), name) for row in rows]

    axes.plot(x, of(lambda r: r.steered), color=colour, marker="o", markersize=3, label=drawable(place))
    known = getattr(rows[0].control, name) is not None
    if known:
        low, high = of(lambda r: r.control_least), of(lambda r: r.control_most)
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, of(lambda r: r.control), color=colour, linewidth=0.8, linestyle="--", label="random")


def comparison_figure(side: Comparison) -> Figure:
    """The probabilities that moved, and the log-probability of each token of both texts under both models."""
    from matplotlib.figure import Figure

    from saekit.lens.drawing import drawable, drawable_token

    longest = max(len(side.plain_odds), len(side.steered_odds), 1)
    figure = Figure(figsize=(4.5 + min(30.0, max(4.5, 0.26 * longest)), 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[4.0, figure.get_figwidth() - 4.5])
    edits = "; ".join(str(edit) for edit in side.edits)
    figure.suptitle(
        drawable(f"{edits}: KL {side.kl:.2f} nats, perplexity {side.perplexity:.3g}"), fontsize=10
    )

    moved = figure.add_subplot(grid[:, 0])
    at = range(len(side.top_tokens))
    moved.barh([i - 0.2 for i in at], [p for _, p, _ in side.top_tokens], 0.38, color=GREY, label="plain")
    moved.barh(
        [i + 0.2 for i in at], [q for *_, q in side.top_tokens], 0.38, color=COLOURS[0], label="steered"
    )
    moved.set_yticks(list(at), [drawable_token(token) for token, *_ in side.top_tokens], fontsize=8)
    moved.invert_yaxis()
    moved.set(xlabel="probability of the next token")
    moved.set_title("what moved most", fontsize=9)
    moved.legend(fontsize=7)
    for row, (name, odds) in enumerate([("plain", side.plain_odds), ("steered", side.steered_odds)]):
        _odds(figure.add_subplot(grid[row, 1]), name, odds)
    return figure


def _odds(axes: Any, name: str, odds: Sequence[Odds]) -> None:
    from saekit.lens.drawing import drawable_token

    at = range(len(odds))
    axes.plot(at, [o.plain for o in odds], color=GREY, marker="o", markersize=3, label="plain model")
    axes.plot(
        at, [o.steered for o in odds], color=COLOURS[0], marker="o", markersize=3, label="steered model"
    )
    axes.set_xticks(list(at), [drawable_token(o.token) for o in odds], rotation=90, fontsize=7)
    axes.set_ylabel("log-probability, nats", fontsize=8)
    axes.set_title(f"the {name} text, token by token", fontsize=9)
    axes.legend(fontsize=7)
