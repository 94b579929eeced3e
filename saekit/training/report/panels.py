"""The report's pictures. Each is drawn by one function of axes, into its own SVG for the page and together into a PNG.

An SVG in the page takes its colours from the page's style, so that it is read in light and in dark: where matplotlib has
written one of `COLOURS`, the variable of that name is put.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from saekit.evaluation import Evaluation
from saekit.evaluation.density import bin_edges, draw_density
from saekit.lens.tokens import visible
from saekit.members import Member
from saekit.training.report.features import Example, Excerpt
from saekit.training.report.rows import Curve, History
from saekit.training.report.words import HEADLINE, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # variable of the page's style → its value in light
    "ink": "#1c1b19",
    "soft": "#6b6862",
    "line": "#e4e1db",
    "accent": "#1f5fae",
    "warm": "#b8530a",
    "up": "#2e8b57",
    "plum": "#8a4fa3",
}
LOSS_COLOURS = ("accent", "warm", "up", "plum")
HEAT = (1.0, 0.54, 0.08)
STYLE: dict[Any, Any] = {  # of matplotlib
    "svg.fonttype": "none",  # text stays text: it can be read aloud, selected and found
    "svg.hashsalt": "saekit",  # ids by content, not by chance
    "font.size": 9,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["soft"],
    "ytick.color": COLOURS["soft"],
    "grid.color": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.unicode_minus": False,
}
# The PNG: inches, and for the lines of features points and characters
WIDTH, HEIGHT, MARGIN, POINT = 11.0, 0.2, 0.25, 8.0
CHARACTER = 0.602  # width of one of DejaVu Sans Mono, which comes with matplotlib, in its size
START, CHARACTERS = 18, 136  # where the text of a line starts, and how long it may be
Draw = Callable[["Axes"], None]


def losses(axes: Axes, history: History) -> None:
    """Each term over tokens; logarithmic where all are positive and they span more than a factor of ten."""
    for (name, curve), colour in zip(history.losses.items(), LOSS_COLOURS, strict=False):
        _line(axes, curve, COLOURS[colour], name)
    values = [value for curve in history.losses.values() for value in curve.low]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="tokens", ylabel="loss")
    if len(history.losses) > 1:
        axes.legend(loc="upper right")
    _tokens(axes, history)


def sparsity(axes: Axes, history: History, evaluation: Evaluation) -> None:
    """The way that (L0, explained variance) took, from faint at the start to full at the end; a cross: the last evaluation.

    What is below 0, worse than telling the mean, is not shown; a cross there stands at the lower edge.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    l0, ev = history.l0.mean, history.explained_variance.mean
    points = np.array([*zip(l0, ev, strict=True)], float).reshape(-1, 1, 2)
    shares = np.linspace(0.15, 1.0, max(1, len(points) - 1)).tolist()
    if len(points) > 1:
        pieces = np.concatenate([points[:-1], points[1:]], axis=1)
        axes.add_collection(
            LineCollection(list(pieces), colors=COLOURS["accent"], alpha=shares, linewidths=1.4, zorder=2)
        )
    faint_to_full = [to_rgba(COLOURS["accent"], share) for share in [*shares[:1], *shares][: len(l0)]]
    axes.scatter(l0, ev, s=9, color=faint_to_full, linewidths=0)
    end, quality = evaluation.figures["l0"], evaluation.figures["explained_variance"]
    low, high = max(0.0, min([*ev, quality])), max([*ev, quality, 0.0])
    pad = max(0.02, 0.12 * (high - low))
    axes.set_ylim(low - pad, high + pad)
    on_the_way = history.held_out["l0"][:-1], history.held_out["explained_variance"][:-1]
    axes.scatter(*on_the_way, s=22, marker="o", facecolors="none", edgecolors=COLOURS["warm"], zorder=3,
                 label="held out, on the way" if on_the_way[0] else None)  # fmt: skip
    axes.scatter([end], [max(quality, low)], s=60, marker="X", color=COLOURS["warm"], linewidths=0, zorder=4,
                 label=f"held out: {quality:.3f} at L0 {end:.1f}")  # fmt: skip
    axes.legend(loc="lower left")
    shown = [*l0, end]
    if min(shown) > 0 and max(shown) > 10 * min(shown):
        axes.set_xscale("log")
        _plain_log(axes)
    else:
        middle, half = (min(shown) + max(shown)) / 2, (max(shown) - min(shown)) / 2
        half = max(half * 1.15, middle * 0.25, 0.5)
        axes.set_xlim(max(0.0, middle - half), middle + half)
    axes.set(xlabel="L0: latents that fire on a token", ylabel="explained variance")


def density(axes: Axes, share: Tensor) -> None:
    """How many latents fire how often. share: [S] of the tokens of the last evaluation."""
    edges = bin_edges([share])
    draw_density(axes, share, edges, color=COLOURS["accent"], rwidth=0.9)
    axes.set_xlim(edges[0] - 0.1, 0.1)
    ticks = range(round(edges[0]), 1)
    axes.set_xticks(list(ticks), [_share(10.0**tick) for tick in ticks])
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="share of tokens on which it fires", ylabel="latents")


def dead(axes: Axes, history: History, d_sae: int) -> None:
    """Latents counted as dead while training, over tokens."""
    from matplotlib.ticker import MaxNLocator

    _line(axes, history.dead, COLOURS["accent"], None)
    top = max(max(history.dead.high, default=0.0), 1.0)
    axes.set_ylim(-0.03 * top, 1.12 * top)  # a line at 0 is to be seen
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if not any(history.dead.high):
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=COLOURS["soft"])
    axes.set(xlabel="tokens", ylabel=f"dead latents, of {d_sae:,}")
    _tokens(axes, history)


def svg(draw: Draw, name: str) -> str:
    """One picture as an SVG element in the page's colours. name: sets its ids apart from those of the others."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip()


def save_picture(
    path: Path, name: str, member: Member, history: History, evaluation: Evaluation, shown: Sequence[Example]
) -> None:
    """Write all panels, and a line for each feature, as one PNG. name: the run's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # boxes stand for what no font here has
        below = HEIGHT * (len(shown) + 2) if shown else 0.0
        figure = Figure(figsize=(WIDTH, 7.0 + below), layout="constrained", facecolor="white")
        share = below / (7.0 + below)
        figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))  # type: ignore[union-attr, call-arg]
        panels: dict[str, Draw] = {
            "losses": lambda axes: losses(axes, history),
            "L0 against explained variance": lambda axes: sparsity(axes, history, evaluation),
            "how often latents fire": lambda axes: density(axes, evaluation.density),
            "dead latents": lambda axes: dead(axes, history, member.section.d_sae),
        }
        for axes, (title, draw) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            draw(axes)
            axes.set_title(title, fontsize=10, loc="left")
        if shown:
            _features(figure, share, shown)
        said = "   ".join(
            f"{one.name} {one.value}" for one in measured(evaluation.figures) if one.name in HEADLINE
        )
        title = " · ".join(filter(None, (name, member.name)))
        figure.suptitle(f"{title}   held out: {said}", fontsize=12, x=0.02, ha="left", parse_math=False)
        figure.savefig(path, format="png", dpi=150)


def _features(figure: Figure, share: float, shown: Sequence[Example]) -> None:
    """A line for each: its number, its rate, and its strongest context with the tokens on grounds as strong as they fire.

    share: of the figure's height, at its foot. One unit along is one character, one unit down one line.
    """
    axes = figure.add_axes((MARGIN / WIDTH, 0.0, 1 - 2 * MARGIN / WIDTH, share))
    axes.set_in_layout(False)
    axes.axis("off")
    axes.set(xlim=(0, (WIDTH - 2 * MARGIN) * 72 / (POINT * CHARACTER)), ylim=(len(shown) + 0.2, -1.8))
    own: dict[str, Any] = {"fontsize": POINT, "va": "center", "parse_math": False}
    axes.text(0, -1, f"{len(shown)} features, drawn by number and not by beauty, each where it fires most",
              **own | {"fontsize": 10})  # fmt: skip
    for row, example in enumerate(shown):
        head = f"{example.index:>7} {_share(example.density):>8}"
        axes.text(0, row, head, family="monospace", color=COLOURS["soft"], **own)
        line = _one_line(example.excerpts[0])
        axes.text(START, row, "".join(token for token, _ in line), family="monospace", **own)
        column = START
        for token, level in line:
            if level > 0.03:
                axes.barh(row, len(token), 0.84, left=column, color=HEAT, alpha=0.8 * level, linewidth=0)
            column += len(token)


def _one_line(excerpt: Excerpt) -> list[tuple[str, float]]:
    """(token, level 0 … 1) of what fits into a line, the peak in its middle where there is so much text."""
    shown = [visible(token).replace("\n", "↵") for token in excerpt.tokens]
    first = last = excerpt.peak
    length = len(shown[first])
    while True:
        before = length + len(shown[first - 1]) if first > 0 else math.inf
        after = length + len(shown[last + 1]) if last + 1 < len(shown) else math.inf
        left = first > 0 and (excerpt.peak - first <= last - excerpt.peak or after > CHARACTERS)
        if left and before <= CHARACTERS:
            first, length = first - 1, int(before)
        elif after <= CHARACTERS:
            last, length = last + 1, int(after)
        else:
            break
    top, room, line = excerpt.activations[excerpt.peak], CHARACTERS, []
    for token, activation in zip(shown[first : last + 1], excerpt.activations[first : last + 1], strict=True):
        line.append((token[:room], activation / top))
        room -= len(token[:room])
    return line


def _line(axes: Axes, curve: Curve, colour: str, name: str | None) -> None:
    axes.fill_between(curve.tokens, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    one = len(curve.tokens) == 1  # a line of one point is not seen
    axes.plot(curve.tokens, curve.mean, color=colour, linewidth=1.4, label=name, marker="o" if one else None)


def _tokens(axes: Axes, history: History) -> None:
    """Tokens along the axis, as 200k and 1.4M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlim(0, max(1, history.tokens) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _plain_log(axes: Axes) -> None:
    """Ticks of a logarithmic axis as 20 and 500."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _share(share: float) -> str:
    """A share as a percentage of few digits: 12%, 0.34%, 0.001%."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.0%}"
