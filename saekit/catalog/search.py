"""Search over a catalog: words against top tokens, raised logits and explanations, in SQLite's FTS5, in memory.

A feature's relevance adds up, over the words of the query,
    the share of its activation that falls on matching tokens,
    ¼ / (1 + rank) of the best matching token among those its direction raises,
    1 for each explanation that matches,
so that a feature which fires on hardly anything but " Jedi" comes before one that merely mentions it.
"""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

Sort = Literal["relevance", "density", "max_activation", "score", "index"]
Floats = NDArray[np.float64]

MATCHING = "tokenize='unicode61 remove_diacritics 2'"


class Index:
    """Built when words are first searched for: vocabulary and explanations as text, token ids joined to features by
    the tables as they lie."""

    def __init__(self, catalog: Catalog) -> None:
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute(f"CREATE VIRTUAL TABLE words USING fts5(token, {MATCHING})")
        self._db.execute(f"CREATE VIRTUAL TABLE sayings USING fts5(text, feature UNINDEXED, {MATCHING})")
        tokens, logits = catalog.table("tokens"), catalog.table("logits")
        logits = logits.filter(logits["raised"])
        self._fires = [tokens[name].to_numpy() for name in ("token_id", "feature", "share")]
        self._raises = [logits[name].to_numpy() for name in ("token_id", "feature", "rank")]
        vocabulary = catalog.table("vocabulary")
        ids = vocabulary["token_id"].to_numpy()
        self._V, self._S = int(ids.max(initial=-1)) + 1, len(catalog)
        rows = zip(ids.tolist(), vocabulary["token"].to_pylist(), strict=True)
        self._db.executemany("INSERT INTO words(rowid, token) VALUES (?, ?)", rows)
        # Those made of a feature's own tokens say nothing that the tokens do not: they would count twice.
        said = catalog._said.beyond_tables()
        self._db.executemany("INSERT INTO sayings(feature, text) VALUES (?, ?)", said)

    def relevance(self, query: str) -> Floats:
        """[S], 0 where nothing matches. Raises `InvalidInput` for a query without a word in it."""
        words = re.findall(r"\w+", query)
        if not words:
            raise InvalidInput(f"search: {query!r} has no word to look for")
        scores = np.zeros(self._S)
        for word in words:
            # A quoted phrase is data to FTS5, whatever is in it; the star makes it match word beginnings.
            phrase = (f'"{word}"*',)
            matching = np.zeros(self._V, bool)
            matching[
                [i for (i,) in self._db.execute("SELECT rowid FROM words WHERE words MATCH ?", phrase)]
            ] = True
            token, feature, share = self._fires
            here = matching[token]
            scores += np.bincount(feature[here], share[here], minlength=self._S)
            token, feature, rank = self._raises
            here = matching[token]
            best = np.full(self._S, np.inf)
            np.minimum.at(best, feature[here], rank[here])
            scores += 0.25 / (1 + best)
            said = self._db.execute("SELECT feature FROM sayings WHERE sayings MATCH ?", phrase)
            scores += np.bincount(np.array([i for (i,) in said], np.int64), minlength=self._S)
        return scores


def search(
    catalog: Catalog,
    query: str,
    *,
    limit: int,
    min_density: float | None,
    max_density: float | None,
    min_max_activation: float | None,
    max_max_activation: float | None,
    min_score: float | None,
    sort: Sort,
    reverse: bool,
) -> list[int]:
    """Feature indices; see `Catalog.search`."""
    if sort not in get_args(Sort):
        raise InvalidInput(f"search: sort {sort!r} is not one of {', '.join(get_args(Sort))}")
    if limit < 1:
        raise InvalidInput(f"search: limit starts at 1, got {limit}")
    bounds = [
        (catalog.density, min_density, max_density),
        (catalog.max_activation, min_max_activation, max_max_activation),
        *([(catalog.score, min_score, None)] if min_score is not None else []),
    ]
    kept = np.ones(len(catalog), bool)
    for values, low, high in bounds:
        if low is not None:
            kept &= values >= low
        if high is not None:
            kept &= values <= high
    relevance = np.zeros(len(catalog))
    if query:
        relevance = catalog._index.relevance(query)
        kept &= relevance > 0
    elif sort == "relevance" and all(low is None and high is None for _, low, high in bounds):
        raise InvalidInput("search: '' has no word to look for; give words, a filter, or another sort")
    found = np.flatnonzero(kept)
    if sort == "index":
        return (found[::-1] if reverse else found)[:limit].tolist()
    figures = {
        "relevance": lambda: relevance,
        "density": lambda: catalog.density,
        "max_activation": lambda: catalog.max_activation,
        "score": lambda: catalog.score,
    }
    key = np.asarray(figures[sort](), np.float64)[found]
    key = np.where(np.isnan(key), np.inf, key if reverse else -key)  # what has no score comes last either way
    return found[np.lexsort((found, key))][:limit].tolist()
