"""Search over a catalog: words against top tokens, raised logits and explanations, in SQLite's FTS5, in memory.

A feature's score adds up
    the share of its activation that falls on matching tokens,
    ¼ / (1 + rank) of the best matching token among those its direction raises,
    1 where an explanation matches,
so that a feature which fires on hardly anything but " Jedi" comes before one that merely mentions it.
"""

from __future__ import annotations

import re
import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog


class Index:
    """An index built when first searched: vocabulary and explanations as text, token ids joined to features."""

    def __init__(self, catalog: Catalog) -> None:
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.executescript(
            """
            CREATE VIRTUAL TABLE words USING fts5(token, tokenize='unicode61 remove_diacritics 2');
            CREATE VIRTUAL TABLE sayings USING fts5(text, feature UNINDEXED, tokenize='unicode61 remove_diacritics 2');
            """
        )
        vocabulary = catalog.table("vocabulary")
        self._insert(
            "words(rowid, token)", vocabulary["token_id"].to_pylist(), vocabulary["token"].to_pylist()
        )
        explanations = catalog.table("explanations")
        # A label made of the top tokens says nothing that the tokens do not: it would count them twice.
        said = [
            (text, feature)
            for text, feature, method in zip(
                *(explanations[name].to_pylist() for name in ("text", "feature", "method")), strict=True
            )
            if method != "top_tokens"
        ]
        self._db.executemany("INSERT INTO sayings(text, feature) VALUES (?, ?)", said)
        self._tokens = self._by_token(catalog, "tokens", "share")
        self._logits = self._by_token(catalog, "logits", "rank", raised=True)

    def _insert(self, into: str, *columns: list[object]) -> None:
        marks = ", ".join("?" * len(columns))
        self._db.executemany(f"INSERT INTO {into} VALUES ({marks})", zip(*columns, strict=True))

    @staticmethod
    def _by_token(
        catalog: Catalog, table: str, value: str, *, raised: bool = False
    ) -> dict[int, list[tuple[int, float]]]:
        columns = catalog.table(table)
        if raised:
            columns = columns.filter(columns["raised"])
        found: dict[int, list[tuple[int, float]]] = defaultdict(list)
        rows = (columns[name].to_pylist() for name in ("token_id", "feature", value))
        for token, feature, figure in zip(*rows, strict=True):
            found[token].append((feature, figure))
        return found

    def search(self, query: str, limit: int) -> list[int]:
        """Feature indices, best first."""
        words = re.findall(r"\w+", query)
        if not words:
            raise InvalidInput(f"search: {query!r} has no word to look for")
        scores: dict[int, float] = defaultdict(float)
        for word in words:
            # A quoted phrase is data to FTS5, whatever is in it; the star makes it match word beginnings.
            matching = self._db.execute("SELECT rowid FROM words WHERE words MATCH ?", (f'"{word}"*',))
            best_rank: dict[int, float] = {}
            for (token,) in matching.fetchall():
                for feature, share in self._tokens.get(token, ()):
                    scores[feature] += share
                for feature, rank in self._logits.get(token, ()):
                    best_rank[feature] = min(rank, best_rank.get(feature, rank))
            for feature, rank in best_rank.items():
                scores[feature] += 0.25 / (1 + rank)
            for (feature,) in self._db.execute(
                "SELECT feature FROM sayings WHERE sayings MATCH ?", (f'"{word}"*',)
            ):
                scores[feature] += 1
        return sorted(scores, key=lambda feature: (-scores[feature], feature))[:limit]
