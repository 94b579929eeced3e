"""Several evaluated SAEs in one picture: how sparse each is against how much it keeps, and which none beats.

Left explained variance, right CE recovered, over L0 on a log axis; bars are the 95 % intervals. The line joins the
SAEs that are not dominated: none is both sparser (or as sparse) and better (or as good), and one of the two strictly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import FileMissing, InvalidInput
from saekit.evaluation.placing import Line, place_labels
from saekit.files import existing, fsync, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Evaluations = Mapping[str, Mapping[str, float]]  # name → what `evaluate` returned

PANELS = {"explained_variance": "explained variance", "ce_recovered": "CE recovered"}
FILE = "pareto.png"
FRONT, BEHIND = "#c87838", "#4878a8"


def pareto_front(evaluations: Evaluations, quality: str = "explained_variance") -> list[str]:
    """The names that no other dominates in (l0 ↓, quality ↑), from the sparsest on."""
    points = {name: (made["l0"], -made[quality]) for name, made in evaluations.items()}

    def dominated(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return sorted((name for name in points if not dominated(name)), key=points.__getitem__)


def pareto(evaluations: Evaluations) -> Figure:
    """The picture, as a matplotlib figure. A panel whose figure no SAE has (CE without faithfulness) is left out.

    Raises `InvalidInput` when there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [quality for quality in PANELS if any(quality in made for made in evaluations.values())]
    if not panels:
        raise InvalidInput(
            f"pareto: expected figures of evaluated SAEs with l0 and {' or '.join(PANELS)}, got {dict(evaluations)!r:.100}"
        )
    figure = Figure(figsize=(6.2 * len(panels), 4.8), layout="constrained")
    drawn = []
    for axes, quality in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        shown = {
            name: made for name, made in evaluations.items() if quality in made and made.get("l0", 0) > 0
        }
        drawn.append(
            (
                axes,
                {name: (made["l0"], made[quality]) for name, made in shown.items()},
                _panel(axes, shown, quality),
            )
        )
    FigureCanvasAgg(figure).draw()  # the layout has to stand before labels can be placed in it
    figure.set_layout_engine("none")
    for axes, points, lines in drawn:
        place_labels(axes, points, lines)
    return figure


def pareto_of_sweep(run: str | Path) -> Path:
    """Draw the SAEs of a finished sweep, `<run>/*/final/metrics.json`, into `<run>/pareto.png`. Returns its path."""
    path = Path(run) / FILE
    save_figure(pareto(sweep_evaluations(run)), path)
    return path


def sweep_evaluations(run: str | Path) -> dict[str, dict[str, Any]]:
    """The evaluations in a run's folder by the name of each SAE. Raises `FileMissing` when there is none."""
    files = sorted(existing(run, "sweep").glob("*/final/metrics.json"))
    if not files:
        raise FileMissing(
            f"sweep {run}: no */final/metrics.json; has a recipe with a list of SAEs been trained here?"
        )
    return {file.parts[-3]: read_json(file) for file in files}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    building = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(building, format="png", dpi=150)
        fsync(building)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def _panel(axes: Axes, evaluations: Evaluations, quality: str) -> list[Line]:
    """Draws the points, their bars and the front; returns the lines that no name should lie on."""
    from matplotlib.ticker import LogFormatter, LogLocator, NullFormatter

    front = pareto_front(evaluations, quality)
    corners = [(evaluations[name]["l0"], evaluations[name][quality]) for name in front]
    axes.plot(
        [x for x, _ in corners],
        [y for _, y in corners],
        color=FRONT,
        linewidth=1.2,
        zorder=1,
        label="not dominated",
    )
    lines = list(pairwise(corners))
    for name, made in evaluations.items():
        x, y = made["l0"], made[quality]
        left, right = _interval(made, "l0")
        low, high = _interval(made, quality)
        lines += [((left, y), (right, y)), ((x, low), (x, high))]
        axes.errorbar(
            x,
            y,
            xerr=[[x - left], [right - x]],
            yerr=[[y - low], [high - y]],
            fmt="o",
            markersize=5,
            color=FRONT if name in front else BEHIND,
            elinewidth=1,
            capsize=2,
            zorder=2,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(10, 10)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.16, 0.14)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set(xlabel="L0 (mean latents per token)", ylabel=PANELS[quality])
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return lines


def _interval(made: Mapping[str, float], name: str) -> tuple[float, float]:
    """A figure's interval, widened to hold the figure; without one, the figure twice."""
    value = made[name]
    return min(value, made.get(f"{name}_low", value)), max(value, made.get(f"{name}_high", value))
