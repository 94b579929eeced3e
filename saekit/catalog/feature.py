"""One feature's record, and the edits that can be made with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from saekit.steering.edits import Edit, Steerable
from saekit.steering.kinds import Kind, Unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
class Neighbour:
    """A feature whose decoder row is near."""

    feature: int
    cosine: float


@dataclass(frozen=True)
class Bin:
    """One bar of the activation histogram: activations in [low, high)."""

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
    token_ids: list[int] = field(repr=False)

    @property
    def max_activation(self) -> float:
        return self.activations[self.peak]

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.peak]), "".join(self.tokens[self.peak + 1 :])
        return f"{before}«{self.tokens[self.peak]}»{after}"


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
        return self.catalog._contexts(self.index)

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
        rows = self.catalog._rows("histograms", self.index)
        return [
            Bin(float(a), float(b), int(n))
            for a, b, n in zip(rows["low"], rows["high"], rows["count"], strict=True)
        ]

    @cached_property
    def neighbours(self) -> list[Neighbour]:
        """Features with the nearest decoder rows."""
        rows = self.catalog._rows("neighbours", self.index)
        return [Neighbour(int(i), float(c)) for i, c in zip(rows["neighbour"], rows["cosine"], strict=True)]

    @property
    def explanation(self) -> str | None:
        """What it means, by the best-scored explanation; its three strongest tokens where nobody said more."""
        rows = self.catalog._rows("explanations", self.index)
        best = sorted(
            range(len(rows["text"])),
            key=lambda i: -(rows["score"][i] if rows["score"][i] == rows["score"][i] else -1),
        )
        return rows["text"][best[0]] if best else None

    def edit(self, kind: Kind, strength: float = 0.0, unit: Unit = "raw") -> Edit:
        catalog = self.catalog
        return Edit(
            kind,
            catalog.site,
            self.direction,
            strength,
            unit,
            f"feature {self.index}",
            latent=self.index,
            sae=catalog.sae,
            max_activation=self.max_activation or None,
            norm=catalog.median_norm,
        )

    def figure(self) -> Figure:
        """A matplotlib figure: histogram, strongest tokens, tokens raised and lowered."""
        from saekit.catalog.figure import feature_figure

        return feature_figure(self)

    def summary(self) -> str:
        """The record in a few lines, without contexts."""
        lines = [
            f"feature {self.index}: {self.explanation or 'never fired'}",
            f"  fires on {self.density:.3%} of tokens, max {self.max_activation:.3g}",
            "  tokens   "
            + ", ".join(f"{t.token!r} {t.mean_activation:.3g} (×{t.count})" for t in self.top_tokens[:6]),
            "  raises   " + ", ".join(repr(t.token) for t in self.logits_top[:8]),
            "  lowers   " + ", ".join(repr(t.token) for t in self.logits_bottom[:8]),
            "  near     " + ", ".join(f"{n.feature} ({n.cosine:.2f})" for n in self.neighbours[:5]),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  {c.max_activation:8.3g}  {c}" for c in self.contexts[:5])])
