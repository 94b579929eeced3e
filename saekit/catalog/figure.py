"""A feature, and a catalog, as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saekit.catalog.feature import Feature
    from saekit.catalog.store import Catalog

BLUE, ORANGE, GREEN = "#4878a8", "#c87838", "#589858"


def feature_figure(feature: Feature, tokens: int = 8) -> Figure:
    """Histogram of activations, strongest tokens, and the logits that the direction moves."""
    from matplotlib.figure import Figure

    from saekit.lens.drawing import drawable

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    histogram, strongest, logits = figure.subplots(1, 3)
    figure.suptitle(drawable(f"feature {feature.index}: {feature.explanation or 'never fired'}"), fontsize=10)

    bins = feature.histogram
    histogram.bar(
        [b.low for b in bins],
        [b.count for b in bins],
        [b.high - b.low for b in bins],
        align="edge",
        color=BLUE,
    )
    if bins:
        histogram.set_xscale("log")
    histogram.set(
        title=f"activations ({feature.density:.2%} of tokens)", xlabel="activation", ylabel="tokens"
    )

    _bars(strongest, [(t.token, t.mean_activation) for t in feature.top_tokens[:tokens]], ORANGE)
    strongest.set(title="mean activation on token", xlabel="activation")

    raised = [(t.token, t.effect) for t in feature.logits_top[: tokens // 2]]
    lowered = [(t.token, t.effect) for t in feature.logits_bottom[: tokens // 2]]
    _bars(logits, raised + lowered[::-1], GREEN)
    logits.set(title="logits raised and lowered", xlabel="effect on the logit")
    return figure


def catalog_figure(catalog: Catalog) -> Figure:
    """How often the features fire, and how well the explanation shown of each predicts it."""
    from matplotlib.figure import Figure

    from saekit.lens.drawing import drawable

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    density, score = figure.subplots(1, 2)
    figure.suptitle(
        drawable(f"{len(catalog):,} features of {catalog.model_name} at {catalog.site}"), fontsize=10
    )
    fired = catalog.density[catalog.density > 0]
    if len(fired):
        edges = np.histogram_bin_edges(np.log10(fired), 40)
        density.hist(fired, 10**edges, color=BLUE)
        density.set_xscale("log")
    density.set(
        title=f"how often they fire ({len(catalog) - len(fired):,} never)",
        xlabel="share of tokens",
        ylabel="features",
    )
    known = catalog.score[~np.isnan(catalog.score)]
    score.hist(known.clip(0, 1), 40, range=(0.0, 1.0), color=GREEN)
    score.set(
        title=f"how well they are explained ({len(catalog) - len(known):,} without a score)",
        xlabel="score (0 chance, 1 perfect)",
        ylabel="features",
    )
    for axes in (density, score):
        axes.title.set_fontsize(9)
    return figure


def _bars(axes: Any, rows: list[tuple[str, float]], colour: str) -> None:
    from saekit.lens.drawing import drawable_token

    axes.barh(range(len(rows)), [value for _, value in rows], color=colour)
    axes.set_yticks(range(len(rows)), [drawable_token(token) for token, _ in rows], fontsize=8)
    axes.invert_yaxis()
