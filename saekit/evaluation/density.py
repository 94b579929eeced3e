"""How often latents fire, as a picture: the histogram of log10 firing rates, which shows dead and dense latents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS_PER_DECADE = 5
COLUMNS = 3


def density_figure(densities: Mapping[str, Tensor]) -> Figure:
    """A panel for each SAE, over one common axis. densities: name → [S] share of tokens on which each latent fired."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(densities))
    rows = math.ceil(len(densities) / columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.6 + 2.6 * rows), layout="constrained")
    edges = bin_edges(densities.values())
    for place, (name, density) in enumerate(densities.items(), 1):
        panel = figure.add_subplot(rows, columns, place)
        silent = draw_density(panel, density, edges, color="#4878a8")
        panel.margins(y=0.18)
        panel.set_xlim(edges[0] - 0.2, 0.2)
        panel.set_title(name.replace("$", r"\$"), fontsize=9)
        dead = f"{silent:,} of {len(density):,} never fired"
        panel.text(0.02, 0.97, dead, transform=panel.transAxes, fontsize=8, va="top")
    figure.supxlabel("log10 of the share of tokens it fires on", fontsize=9)
    figure.supylabel("latents", fontsize=9)
    return figure


def bin_edges(densities: Iterable[Tensor]) -> list[float]:
    """Edges in log10 of the share of tokens, over the whole decades up to 1 that hold every latent that fired."""
    decades = max(map(_decades, densities))
    return [i / BINS_PER_DECADE - decades for i in range(decades * BINS_PER_DECADE + 1)]


def draw_density(axes: Axes, density: Tensor, edges: list[float], **look: Any) -> int:
    """The histogram of the latents that fired, in matplotlib's `look`; returns how many never did. density: [S]."""
    fired = density[density > 0].log10().tolist()
    axes.hist(fired, edges, **look)
    return len(density) - len(fired)


def _decades(density: Tensor) -> int:
    fired = density[density > 0]
    return max(1, math.ceil(-float(fired.min().log10()) - 1e-9)) if len(fired) else 1
