"""A feature as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saekit.catalog.feature import Feature


def feature_figure(feature: Feature, tokens: int = 8) -> Figure:
    """Histogram of activations, strongest tokens, and the logits that the direction moves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    histogram, strongest, logits = figure.subplots(1, 3)
    figure.suptitle(f"feature {feature.index}: {feature.explanation or 'never fired'}", fontsize=10)

    bins = feature.histogram
    histogram.bar(
        [b.low for b in bins],
        [b.count for b in bins],
        [b.high - b.low for b in bins],
        align="edge",
        color="#4878a8",
    )
    if bins:
        histogram.set_xscale("log")
    histogram.set(
        title=f"activations ({feature.density:.2%} of tokens)", xlabel="activation", ylabel="tokens"
    )

    _bars(strongest, [(repr(t.token), t.mean_activation) for t in feature.top_tokens[:tokens]], "#c87838")
    strongest.set(title="mean activation on token")

    raised = [(repr(t.token), t.effect) for t in feature.logits_top[: tokens // 2]]
    lowered = [(repr(t.token), t.effect) for t in feature.logits_bottom[: tokens // 2]]
    _bars(logits, raised + lowered[::-1], "#589858")
    logits.set(title="logits raised and lowered")
    return figure


def _bars(axes: object, rows: list[tuple[str, float]], colour: str) -> None:
    names = [name.replace("$", r"\$") for name, _ in rows]  # a dollar would start mathematics
    axes.barh(range(len(rows)), [value for _, value in rows], color=colour)  # type: ignore[attr-defined]
    axes.set_yticks(range(len(rows)), names, fontsize=8)  # type: ignore[attr-defined]
    axes.invert_yaxis()  # type: ignore[attr-defined]
