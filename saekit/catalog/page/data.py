"""What the page shows, as JavaScript that a `<script src>` can load: `receive("features", {…});`.

    overview     what the catalog is
    features     one entry per feature and column: what the list needs
    search       word by word, the features that a query finds
    map          where each feature lies in the plane
    prompts      texts token by token, with what fires
    shard-<n>    the full records of a few features

Scripts, because a page opened from disk may load scripts but not fetch files. They are ASCII without `<`, so that
no token of any corpus can end a script element, start another one, or be read in a wrong encoding.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saekit.catalog.card import public
from saekit.catalog.page.overview import (
    EXAMPLES,
    blocks_of,
    examples,
    explained,
    figures,
    is_embedded,
    place,
    shown_name,
)
from saekit.catalog.page.prompts import given, sampled
from saekit.catalog.page.records import Records, short
from saekit.errors import UnknownName

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog.store import Catalog

SHARD = 10  # features per file: at 20 contexts of 64 tokens and 20 of bands some 80 kB


class PageData:
    """The data scripts of one catalog, each made when asked for; those that every visit asks for are kept.

    live: what the server beside the page takes at most, by name; None for a page without one. prompts: texts to show what
    fires on, by the model. only: the features of a page that holds no others. Safe to ask from several threads.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        live: Mapping[str, int] | None = None,
        prompts: Sequence[str] = (),
        model: TransformerBridge | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        self.catalog = catalog
        self._live = live
        self._only = None if only is None else list(only)
        self._shard = SHARD if only is None else 1  # features per shard
        self._records = Records(catalog)
        self._given = given(catalog, prompts, model)
        self._kept: dict[
            str, tuple[Any, str]
        ] = {}  # name → what was said of features when it was made, its text
        self._makers: dict[str, Callable[[], Any]] = {
            "overview": self._overview,
            "features": self._features,
            "search": self._search,
        }
        if only is None:
            self._makers |= {"map": self._map, "prompts": lambda: self._prompts}
        self._making = {name: threading.Lock() for name in self._makers}

    def names(self) -> list[str]:
        """Of all scripts."""
        shards = range(math.ceil(len(self.catalog) / self._shard)) if self._only is None else self._only
        return [*self._makers, *(f"shard-{n}" for n in shards)]

    def script(self, name: str) -> str:
        """The text of `data/<name>.js`. Raises `UnknownName` for one that is not among `names()`."""
        if name in self._makers:
            return self._whole(name)
        found = re.fullmatch(r"shard-(0|[1-9][0-9]{0,8})", name)
        start = int(found[1]) * self._shard if found else len(self.catalog)
        if start >= len(self.catalog) or (self._only is not None and start not in self._only):
            raise UnknownName(f"the page has no data file {name!r}")
        return _script(name, self._records.stretch(start, min(start + self._shard, len(self.catalog))))

    def _whole(self, name: str) -> str:
        said = self.catalog._said if name in ("overview", "features", "search") else None
        kept = self._kept.get(name)
        if kept is None or kept[0] is not said:
            with self._making[
                name
            ]:  # two visitors who come at once make it once; the slow map keeps no other waiting
                kept = self._kept.get(name)
                if kept is None or kept[0] is not said:
                    kept = self._kept[name] = (said, _script(name, self._makers[name]()))
        return kept[1]

    def _overview(self) -> dict[str, Any]:
        catalog = self.catalog
        # A page is handed on, without paths of the machine it was made on; who serves one steers with them.
        info = public(catalog.info) if self._live is None else catalog.info
        corpus, score = info["corpus"], catalog.score
        scored = ~np.isnan(score)
        alive = int((catalog.density > 0).sum())
        first = examples(catalog) if self._only is None else self._only[:EXAMPLES]
        return {
            "name": shown_name(catalog),
            "embedded": is_embedded(catalog),
            "model": info["model"]["name"],
            "site": catalog.site,
            "place": place(catalog.site, blocks_of(catalog)),
            "sae": {name: info["sae"].get(name) for name in ("architecture", "d_in", "d_sae", "k")},
            "corpus": corpus["label"],
            "licence": corpus.get("licence"),
            "tokens": corpus["tokens"],
            "alive": alive,
            "excluded": list(info["excluded"]),
            "definitions": info["definitions"],
            "figures": figures(catalog),
            "explained": explained(catalog),
            "scored": int(scored.sum()),
            "median_score": round(float(np.median(score[scored])), 2) if scored.any() else None,
            "examples": first,
            "shard": self._shard,
            "only": self._only,
            "map": self._only is None and alive > 1,
            "prompts": len(self._prompts) if self._only is None else 0,
            "live": self._live is not None,
            **({} if self._live is None else {"limits": dict(self._live)}),
        }

    def _features(self) -> dict[str, Any]:
        """Columns: lists, or of a page with some features only, objects by the index of these and of those near them."""
        catalog, said = self.catalog, self.catalog._said
        columns = {
            "density": short(catalog.density),
            "max": short(catalog.max_activation),
            "score": short(np.round(said.score, 2)),
        }
        labels = catalog._features["label"]
        if self._only is None:
            return {"label": [said.best(i) or label for i, label in enumerate(labels)], **columns}
        near = {i for feature in self._only for i in self._records.near(feature)}
        told = sorted({*self._only, *near})
        return {
            "label": {i: said.best(i) or labels[i] for i in told},
            **{name: {i: column[i] for i in told} for name, column in columns.items()},
        }

    def _search(self) -> dict[str, Any]:
        """Per token, flat pairs (feature, share) where features fire on it and (feature, rank) where they raise it."""
        tokens, logits = self._told("tokens"), self._told("logits")
        fires = _by_token(tokens, short(tokens["share"].to_numpy()))
        logits = logits.filter(logits["raised"])
        raised = _by_token(logits, logits["rank"].to_pylist())
        words = [
            [self.catalog.token(i), fires.get(i, []), raised.get(i, [])] for i in sorted({*fires, *raised})
        ]
        said = self.catalog._said.beyond_tables()
        return {"words": words, "said": [row for row in said if self._only is None or row[0] in self._only]}

    def _told(self, name: str) -> pa.Table:
        """A table's rows of the features that the page holds."""
        table = self.catalog.table(name)
        return table if self._only is None else table.filter(np.isin(table["feature"].to_numpy(), self._only))

    def _map(self) -> dict[str, list[int | None]]:
        from saekit.catalog.page.layout import layout_of

        x, y = layout_of(self.catalog)
        return {"x": x, "y": y}

    @cached_property
    def _prompts(self) -> list[dict[str, Any]]:
        return [*self._given, *sampled(self.catalog)]


def _by_token(table: pa.Table, figures: list[Any]) -> dict[int, list[Any]]:
    """Token id → [feature, figure, feature, figure, …]."""
    found: dict[int, list[Any]] = defaultdict(list)
    for token, feature, figure in zip(
        table["token_id"].to_pylist(), table["feature"].to_pylist(), figures, strict=True
    ):
        found[token] += (feature, figure)
    return found


def _script(name: str, value: Any) -> str:
    literal = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"receive({json.dumps(name)}, {literal});\n"
