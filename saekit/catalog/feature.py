"""One feature's record, and the edits that can be made with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saekit.catalog.relations import Neighbour
from saekit.catalog.said import Explanation
from saekit.catalog.tables import TOP
from saekit.lens.tokens import visible
from saekit.steering.edits import Edit, Steerable
from saekit.steering.kinds import Kind, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from saekit.catalog.store import Catalog


@dataclass(frozen=True)
class TokenStat:
    """A token that the feature fires on."""

    token: str
    mean_activation: float  # where the feature fires on it
    count: int
    share: float  # of the feature's summed activation


@dataclass(frozen=True)
class TokenEffect:
    """A token whose logit the feature's direction moves."""

    token: str
    effect: float


@dataclass(frozen=True)
class Neuron:
    """A neuron of the MLP that the feature's direction lies along."""

    neuron: int
    cosine: float


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: values in [low, high)."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Context:
    """A stretch of one document around a peak."""

    tokens: list[str]  # spaces kept
    activations: list[float]  # per token, 0 where the feature is silent
    peak: int  # index of the maximum among the tokens
    document: int  # number of the document in the corpus
    norm: float  # ‖x‖ at the peak over the median one
    sink: bool  # whether that norm is far out of the ordinary: an attention sink says little about a feature
    token_ids: list[int] = field(repr=False)

    @property
    def max_activation(self) -> float:
        return self.activations[self.peak]

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.peak]), "".join(self.tokens[self.peak + 1 :])
        return f"{before}«{self.tokens[self.peak]}»{after}"


@dataclass(frozen=True)
class Band:
    """One of the equal parts of a feature's active range, and a sample of what lies in it."""

    low: float
    high: float  # activations in (low, high]
    share: float  # of its firings, by the histogram: a bin that straddles an edge is divided evenly in log activation
    contexts: list[Context]  # in the order in which they were drawn, at most one per document


@dataclass(frozen=True, eq=False)
class Feature(Steerable):
    """What the catalog knows about one latent. Figures are floats, tables are read when first asked for."""

    index: int
    density: float  # share of evaluated tokens on which it fires
    max_activation: float
    mean_activation: float  # where it fires
    label: str
    catalog: Catalog = field(repr=False)

    @property
    def direction(self) -> Tensor:
        """[D] decoder row."""
        return self.catalog.sae.direction(self.index)

    @cached_property
    def contexts(self) -> list[Context]:
        """Top contexts, strongest first, at most one per document."""
        return self.catalog._contexts(self.index, TOP)

    @cached_property
    def bands(self) -> list[Band]:
        """The active range (0, max] in equal parts, weakest first; none for a feature that never fired."""
        if not self.histogram:
            return []
        n = int(self.catalog.info["contexts"]["bands"])
        edges = [self.max_activation * b / n for b in range(n + 1)]
        low, high, count = (
            np.array([getattr(bar, name) for bar in self.histogram]) for name in ("low", "high", "count")
        )
        bars, top = np.array([len(self.histogram)]), np.array([self.max_activation])
        [found] = shares(low, high, count, bars, top, n).tolist()
        return [
            Band(edges[b - 1], edges[b], share, self.catalog._contexts(self.index, b))
            for b, share in enumerate(found, 1)
        ]

    @cached_property
    def top_tokens(self) -> list[TokenStat]:
        """Tokens by mean activation where it fires on them, at least two occurrences."""
        rows, name = self.catalog._rows("tokens", self.index), self.catalog.token
        columns = (rows["token_id"], rows["mean_activation"], rows["count"], rows["share"])
        return [
            TokenStat(name(int(i)), float(m), int(n), float(s)) for i, m, n, s in zip(*columns, strict=True)
        ]

    @cached_property
    def logits_top(self) -> list[TokenEffect]:
        """Tokens that the direction raises most."""
        return self._logits(raised=True)

    @cached_property
    def logits_bottom(self) -> list[TokenEffect]:
        """Tokens that the direction lowers most."""
        return self._logits(raised=False)

    def _logits(self, *, raised: bool) -> list[TokenEffect]:
        rows = self.catalog._rows("logits", self.index)
        return [
            TokenEffect(self.catalog.token(int(i)), float(effect))
            for i, effect, up in zip(rows["token_id"], rows["effect"], rows["raised"], strict=True)
            if bool(up) == raised
        ]

    @cached_property
    def histogram(self) -> list[Bin]:
        """Log-spaced counts of its activations."""
        return self._bins("activation")

    @cached_property
    def effects(self) -> list[Bin]:
        """Even-spaced counts of its effects on the logits of all tokens; empty where it writes to no residual stream."""
        return self._bins("effect")

    def _bins(self, of: str) -> list[Bin]:
        rows = self.catalog._rows("histograms", self.index)
        return [
            Bin(float(a), float(b), int(n))
            for a, b, n, kind in zip(rows["low"], rows["high"], rows["count"], rows["of"], strict=True)
            if kind == of
        ]

    @cached_property
    def neighbours(self) -> list[Neighbour]:
        """Features with the nearest decoder rows, by cosine."""
        return self._near("decoder")

    @cached_property
    def coactive(self) -> list[Neighbour]:
        """Features that fire on the same tokens, by the Jaccard index, estimated from a sample of their firings."""
        return self._near("firing")

    def _near(self, by: str) -> list[Neighbour]:
        rows = self.catalog._rows("neighbours", self.index)
        return [
            Neighbour(int(i), float(s))
            for i, s, kind in zip(rows["neighbour"], rows["similarity"], rows["by"], strict=True)
            if kind == by
        ]

    @cached_property
    def neurons(self) -> list[Neuron]:
        """Neurons by |cosine| with the direction; empty where the site is not an MLP's."""
        rows = self.catalog._rows("neurons", self.index)
        return [Neuron(int(i), float(c)) for i, c in zip(rows["neuron"], rows["cosine"], strict=True)]

    @property
    def explanations(self) -> list[Explanation]:
        """All that is said about it, each with its scores."""
        return self.catalog._said.of(self.index)

    @property
    def explanation(self) -> str | None:
        """What it means: a person's note, else the best-scored explanation, else the first, else its three strongest
        tokens; None for a feature of which nothing is known."""
        return self.catalog._said.best(self.index) or self.label or None

    @property
    def score(self) -> float | None:
        """How well the explanation shown predicts it (see `Explanation.score`); None where that has no score."""
        score = float(self.catalog.score[self.index])
        return None if np.isnan(score) else score

    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        catalog = self.catalog
        return Edit(
            kind,
            catalog.target_site,
            self.direction,
            strength,
            unit,
            f"feature {self.index}",
            latent=self.index,
            sae=catalog.sae,
            max_activation=self.max_activation or None,
            norm=catalog.median_norm if catalog.target_site == catalog.site else None,
            model_hash=catalog.info["model"]["hash"],
        )

    def figure(self) -> Figure:
        """A matplotlib figure: histogram, strongest tokens, tokens raised and lowered."""
        from saekit.catalog.figure import feature_figure

        return feature_figure(self)

    def _repr_html_(self) -> str:
        from saekit.display.feature import feature_html

        return feature_html(self)

    def __rich__(self) -> RenderableType:
        from saekit.display.feature import feature_text

        return feature_text(self)

    def _repr_pretty_(self, p: Any, cycle: bool) -> None:
        """IPython's: coloured in a terminal, as `print` has it elsewhere."""
        from saekit.display.terminal import pretty

        pretty(self, p)

    def summary(self) -> str:
        """The record in a few lines, without contexts."""
        score = "" if self.score is None else f"  (score {self.score:.2f})"
        lines = [
            f"feature {self.index}: {self.explanation or 'never fired'}{score}",
            f"  fires on {self.density:.3%} of tokens, max {self.max_activation:.3g}",
            "  tokens   "
            + ", ".join(f"{t.token!r} {t.mean_activation:.3g} (×{t.count})" for t in self.top_tokens[:6]),
            "  raises   " + ", ".join(repr(t.token) for t in self.logits_top[:8]),
            "  lowers   " + ", ".join(repr(t.token) for t in self.logits_bottom[:8]),
            "  near     " + ", ".join(f"{n.feature} ({n.similarity:.2f})" for n in self.neighbours[:5]),
        ]
        if self.coactive:
            lines.append(
                "  with     " + ", ".join(f"{n.feature} ({n.similarity:.2f})" for n in self.coactive[:5])
            )
        if self.neurons:
            lines.append("  neurons  " + ", ".join(f"{n.neuron} ({n.cosine:+.2f})" for n in self.neurons[:5]))
        return "\n".join(lines)

    def __str__(self) -> str:
        """Plain text, whose control characters and bidi overrides are escapes."""
        lines = [self.summary(), *(f"  {c.max_activation:8.3g}  {c}" for c in self.contexts[:5])]
        return visible("\n".join(lines))


def shares(
    low: NDArray[Any], high: NDArray[Any], count: NDArray[Any], bars: NDArray[Any], top: NDArray[Any], n: int
) -> NDArray[np.float64]:
    """[F, n] shares of each feature's firings in the n equal parts of (0, top]; NaN for those that never fired.

    low, high, count: of the log-spaced bars of all histograms, one feature's after another's. bars: [F] how many each has.
    top: [F] the maxima. Inside a bar, firings are taken to lie evenly in log activation; the last one ends at the maximum.
    """
    has, ends = bars > 0, np.cumsum(bars)
    last = ends[has] - 1
    low, high = low.astype(float), high.astype(float)
    high[last] = np.maximum(top[has], low[last] * (1 + 1e-6))
    edges = np.log(np.maximum(top[:, None] * np.arange(n + 1) / n, np.finfo(float).tiny))
    below = np.repeat(edges, bars, axis=0) - np.log(low)[:, None]
    below = (below / np.log(high / low)[:, None]).clip(0, 1)  # [bars, n + 1] the part of each below each edge
    below[:, -1] = 1
    found = np.full((len(bars), n), np.nan)
    if has.any():
        found[has] = np.add.reduceat(np.diff(below, axis=1) * count[:, None], (ends - bars)[has])
    return found / found.sum(axis=1, keepdims=True)
