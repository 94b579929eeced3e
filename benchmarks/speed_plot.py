"""The picture of `benchmarks.speed`: how many times saekit's seconds every contender takes, a line for each row.

Colour says the library, the mark how it was run; the bar goes from the least of the rounds to the most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {
    "step": "step",
    "lm": "forward",
    "end": "from tokens",
    "catalog": "catalog",
    "steer": "steered generation",
}
COLOURS = {
    "saekit": "#1b7f5c",
    "SAELens": "#c4482e",
    "TransformerLens": "#c4482e",
    "dictionary_learning": "#7a5aa8",
    "sparsify": "#2b6cb0",
    "SAEDashboard": "#b7791f",
}
MARKS = {
    "compile": "D",
    "autocast": "s",
    "bf16": "s",
    "two SAEs": "P",
    "plain": "x",
    "fp32": "v",
}  # else a disc
TICKS = (0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
LINE = 0.34  # inches


def colour(name: str) -> str:
    return next((value for start, value in COLOURS.items() if name.startswith(start)), "#777777")


def mark(name: str) -> str:
    return next((value for word, value in MARKS.items() if word in name), "o")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of all rows that hold ratios; nothing where there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        (clock, row["name"], [entry for entry in row["entries"] if "ratio" in entry])
        for clock in TITLES
        for row in report["clocks"].get(clock, {"rows": []})["rows"]
    ]
    rows = [row for row in rows if row[2]]
    if not rows:
        return
    names = list(dict.fromkeys(entry["name"] for _, _, timed in rows for entry in timed))
    head = 0.1 + 0.2 * -(-len(names) // 3)
    height = LINE * len(rows) + head + 0.65
    figure = Figure(figsize=(10, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.36, 0.6 / height, 0.61, LINE * len(rows) / height))
    for y, (_, _, timed) in enumerate(rows):
        for i, entry in enumerate(timed):
            ratio = entry["ratio"]
            at = y + 0.44 * ((i + 0.5) / len(timed) - 0.5)  # side by side, so that bars stay apart
            axes.plot(
                [ratio["least"], ratio["most"]], [at, at], color=colour(entry["name"]), lw=1.6, alpha=0.5
            )
            axes.plot(ratio["median"], at, mark(entry["name"]), color=colour(entry["name"]), ms=4.5)
    axes.axvline(1, color=COLOURS["saekit"], lw=1.2)
    axes.set_xscale("log")
    least = min(0.8, *(entry["ratio"]["least"] for _, _, timed in rows for entry in timed)) * 0.9
    most = max(2.0, *(entry["ratio"]["most"] for _, _, timed in rows for entry in timed)) * 1.15
    shown = [tick for tick in TICKS if least <= tick <= most]
    axes.set_xlim(least, most)
    axes.set_xticks(shown, ["saekit" if tick == 1 else f"{tick:g} ×" for tick in shown])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [f"{TITLES[clock]}: {name}" for clock, name, _ in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for y in range(1, len(rows)):
        axes.axhline(y - 0.5, color="#eeeeee", lw=0.8)
    axes.grid(axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time taken, as a multiple of saekit's in the same run", fontsize=9)
    keys = [axes.plot([], [], mark(name), color=colour(name), ms=5, label=name)[0] for name in names]
    figure.legend(handles=keys, loc="upper center", ncol=3, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")
