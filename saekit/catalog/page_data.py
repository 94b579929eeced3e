"""What the page shows, as JavaScript that a `<script src>` can load: `receive("features", {…});`.

    overview     what the catalog is
    features     one entry per feature and column: what the list needs
    search       word by word, the features that a query finds
    shard-<n>    the full records of `SHARD` features

Scripts, because a page opened from disk may load scripts but not fetch files. They are ASCII without `<`, so that
no token of any corpus can end a script element, start another one, or be read in a wrong encoding.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from saekit import embedded
from saekit.errors import FileMissing, UnknownName

if TYPE_CHECKING:
    from saekit.catalog.feature import Band, Context, Feature
    from saekit.catalog.store import Catalog

SHARD = 64  # features per file: some 400 kB at 20 contexts of 64 tokens, and 20 of bands
AROUND = 24  # tokens of a band's context that the page shows


class PageData:
    """The data scripts of one catalog, each made when asked for."""

    def __init__(self, catalog: Catalog, *, live: bool = False) -> None:
        self.catalog = catalog
        self.live = live  # whether a server with the model answers beside the page

    def names(self) -> list[str]:
        shards = math.ceil(len(self.catalog) / SHARD)
        return ["overview", "features", "search", *(f"shard-{n}" for n in range(shards))]

    def script(self, name: str) -> str:
        """The text of `data/<name>.js`. Raises `UnknownName` for one that is not among `names()`."""
        if name not in self.names():
            raise UnknownName(f"the page has no data file {name!r}")
        if name == "overview":
            value = self._overview()
        elif name == "features":
            value = self._features()
        elif name == "search":
            value = self._search()
        else:
            value = self._shard(int(name.removeprefix("shard-")))
        return f"receive({json.dumps(name)}, {_literal(value)});\n"

    def _overview(self) -> dict[str, Any]:
        catalog, info = self.catalog, self.catalog.info
        return {
            "name": _name(catalog),
            "model": catalog.model_name,
            "site": catalog.site,
            "sae": {name: info["sae"].get(name) for name in ("architecture", "d_in", "d_sae", "k")},
            "corpus": info["corpus"]["label"],
            "tokens": info["corpus"]["tokens"],
            "alive": int((catalog.density > 0).sum()),
            "excluded": list(info["excluded"]),
            "definitions": info["definitions"],
            "shard": SHARD,
            "live": self.live,
        }

    def _features(self) -> dict[str, list[Any]]:
        return {
            "label": [feature.explanation or "" for feature in self.catalog],
            "density": [_short(x) for x in self.catalog.density.tolist()],
            "max": [_short(x) for x in self.catalog.max_activation.tolist()],
        }

    def _search(self) -> dict[str, Any]:
        """Per token, flat pairs (feature, share) where features fire on it and (feature, rank) where they raise it."""
        tokens, logits = self.catalog.table("tokens"), self.catalog.table("logits")
        fires = _by_token(tokens, [_short(x) for x in tokens["share"].to_pylist()])
        logits = logits.filter(logits["raised"])
        raised = _by_token(logits, logits["rank"].to_pylist())
        words = [
            [self.catalog.token(i), fires.get(i, []), raised.get(i, [])] for i in sorted({*fires, *raised})
        ]
        return {"words": words, "said": self.catalog._said.beyond_tables()}

    def _shard(self, n: int) -> dict[str, Any]:
        """Records of features n · SHARD and up; contexts hold indices into the shard's own list of tokens."""
        catalog = self.catalog
        here = [catalog[i] for i in range(n * SHARD, min((n + 1) * SHARD, len(catalog)))]
        bands = [feature.bands for feature in here]
        shown = [context for feature in here for context in feature.contexts]
        shown += [context for found in bands for band in found for context in band.contexts]
        ids = sorted({i for context in shown for i in context.token_ids})
        place = {token_id: i for i, token_id in enumerate(ids)}
        return {
            "tokens": [catalog.token(i) for i in ids],
            "features": [self._record(*both, place) for both in zip(here, bands, strict=True)],
        }

    def _record(self, feature: Feature, bands: list[Band], place: dict[int, int]) -> dict[str, Any]:
        return {
            "mean": _short(feature.mean_activation),
            "contexts": [_context(context, place) for context in feature.contexts],
            "bands": [
                [
                    *(_short(x) for x in (band.low, band.high, band.share)),
                    [_context(context, place, AROUND) for context in band.contexts],
                ]
                for band in bands
            ],
            "histogram": [[_short(b.low), _short(b.high), b.count] for b in feature.histogram],
            "tokens": [
                [t.token, _short(t.mean_activation), t.count, _short(t.share)] for t in feature.top_tokens
            ],
            "raised": [[t.token, _short(t.effect)] for t in feature.logits_top],
            "lowered": [[t.token, _short(t.effect)] for t in feature.logits_bottom],
            "neighbours": [[n.feature, _short(n.similarity)] for n in feature.neighbours],
            "coactive": [[n.feature, _short(n.similarity)] for n in feature.coactive],
            "explanations": [[e.method, e.text, _short_or_null(e.score)] for e in feature.explanations],
        }


def _by_token(table: pa.Table, figures: list[Any]) -> dict[int, list[Any]]:
    """Token id → [feature, figure, feature, figure, …]."""
    found: dict[int, list[Any]] = defaultdict(list)
    for token, feature, figure in zip(
        table["token_id"].to_pylist(), table["feature"].to_pylist(), figures, strict=True
    ):
        found[token] += (feature, figure)
    return found


def _context(context: Context, place: dict[int, int], around: int | None = None) -> dict[str, Any]:
    """Token indices; flat pairs (offset, activation) where the feature fires. around: keep so many tokens at the peak."""
    n = len(context.tokens)
    start = 0 if around is None else max(0, min(context.peak - around * 5 // 8, n - around))
    end = n if around is None else min(n, start + around)
    firings = [x for i, a in enumerate(context.activations[start:end]) if a for x in (i, _short(a))]
    return {
        "document": context.document,
        "peak": context.peak - start,
        "tokens": [place[i] for i in context.token_ids[start:end]],
        "firings": firings,
        **({"sink": True} if context.sink else {}),
    }


def _name(catalog: Catalog) -> str:
    """What a reader would type to open it: `tiny`, or the folder's own name without where it lies."""
    try:
        if catalog.path.samefile(embedded.folder("catalog")):
            return embedded.NAME
    except FileMissing:
        pass
    return catalog.path.resolve().name


def _short(number: float) -> float | None:
    """Three significant digits; null for NaN, which JSON lacks."""
    return float(f"{number:.3g}") if math.isfinite(number) else None


def _short_or_null(number: float | None) -> float | None:
    return None if number is None else _short(number)


def _literal(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
