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

from saekit import embedded
from saekit.catalog.tables import ByFeature
from saekit.errors import FileMissing, UnknownName

if TYPE_CHECKING:
    from saekit.catalog.feature import Context, Feature
    from saekit.catalog.store import Catalog

SHARD = 64  # features per file: some 300 kB at 20 contexts of 64 tokens


class PageData:
    """The data scripts of one catalog, each made when asked for."""

    def __init__(self, catalog: Catalog, *, live: bool = False) -> None:
        self.catalog = catalog
        self.live = live  # whether a server with the model answers beside the page
        self._explanations = ByFeature(catalog.table("explanations"))

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
        fires: dict[int, list[float | None]] = defaultdict(list)
        raised: dict[int, list[int]] = defaultdict(list)
        tokens, logits = self.catalog.table("tokens"), self.catalog.table("logits")
        columns = (tokens[name].to_pylist() for name in ("token_id", "feature", "share"))
        for token, feature, share in zip(*columns, strict=True):
            fires[token] += [feature, _short(share)]
        logits = logits.filter(logits["raised"])
        columns = (logits[name].to_pylist() for name in ("token_id", "feature", "rank"))
        for token, feature, rank in zip(*columns, strict=True):
            raised[token] += [feature, rank]
        words = [
            [self.catalog.token(i), fires.get(i, []), raised.get(i, [])] for i in sorted({*fires, *raised})
        ]
        said = [
            [feature, text]
            for feature, text, method in zip(
                *(self._explanations.column(name) for name in ("feature", "text", "method")), strict=True
            )
            if method != "top_tokens"  # it repeats the tokens, which are here already
        ]
        return {"words": words, "said": [[int(feature), text] for feature, text in said]}

    def _shard(self, n: int) -> dict[str, Any]:
        """Records of features n · SHARD and up; contexts hold indices into the shard's own list of tokens."""
        catalog = self.catalog
        here = [catalog[i] for i in range(n * SHARD, min((n + 1) * SHARD, len(catalog)))]
        ids = sorted({i for feature in here for context in feature.contexts for i in context.token_ids})
        place = {token_id: i for i, token_id in enumerate(ids)}
        return {
            "tokens": [catalog.token(i) for i in ids],
            "features": [self._record(feature, place) for feature in here],
        }

    def _record(self, feature: Feature, place: dict[int, int]) -> dict[str, Any]:
        said = self._explanations.rows(feature.index)
        return {
            "mean": _short(feature.mean_activation),
            "contexts": [_context(context, place) for context in feature.contexts],
            "histogram": [[_short(b.low), _short(b.high), b.count] for b in feature.histogram],
            "tokens": [
                [t.token, _short(t.mean_activation), t.count, _short(t.share)] for t in feature.top_tokens
            ],
            "raised": [[t.token, _short(t.effect)] for t in feature.logits_top],
            "lowered": [[t.token, _short(t.effect)] for t in feature.logits_bottom],
            "neighbours": [[n.feature, _short(n.cosine)] for n in feature.neighbours],
            "explanations": [
                [method, text, _short(float(score))]
                for method, text, score in zip(said["method"], said["text"], said["score"], strict=True)
            ],
        }


def _context(context: Context, place: dict[int, int]) -> dict[str, Any]:
    """Token indices; flat pairs (offset, activation) where the feature fires."""
    firings = [x for i, a in enumerate(context.activations) if a for x in (i, _short(a))]
    return {
        "document": context.document,
        "peak": context.peak,
        "tokens": [place[i] for i in context.token_ids],
        "firings": firings,
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


def _literal(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
