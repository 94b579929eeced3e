"""The stretches of text in which features are looked at, read from a catalog's tables.

Documents are split once and for all (`draws.explains`): what a feature means is read off one half, and tried on the other.
A window lies in one document, so windows that explain and windows that test never share one. Random windows are cut from
the sampled rows, all of whose activations are known, so what is silent there is silent, not assumed to be.

F features first … last − 1, n windows, W tokens in the longest, P windows of the sample in documents that do not explain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.draws import draw, explains
from saekit.catalog.tables import CATALOG, SCHEMA_VERSION, read_table
from saekit.errors import InvalidInput, UnknownFeature
from saekit.files import existing, read_json

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

RANDOM = 0xA11  # sets the draw of random windows apart from other draws
BANDS, RANKS = 1 << 8, 1 << 16  # more than int8 and int16 can number


def folder_of(catalog: Any) -> Path:
    """The folder of a `Catalog`, or the folder itself."""
    folder = Path(getattr(catalog, "path", catalog))
    existing(folder / CATALOG, "catalog")
    return folder


def check_feature(feature: Any, d_sae: int) -> int:
    """The number of a feature. Raises `UnknownFeature`."""
    whole = isinstance(feature, (int, np.integer)) and not isinstance(feature, bool)
    if not whole or not 0 <= feature < d_sae:
        raise UnknownFeature(f"feature {feature!r}: this catalog has features 0 … {d_sae - 1}")
    return int(feature)


class Windows(NamedTuple):
    """n stretches of text, each looked at for one feature."""

    feature: Ints  # [n]
    band: Ints  # [n] 0: the strongest; −1: drawn whatever fires there
    document: Ints  # [n]
    start: Ints  # [n] in the corpus, as one list of tokens
    length: Ints  # [n]
    peak: Ints  # [n] from the start
    activations: Floats  # [n, W], 0 beyond the length

    def take(self, index: NDArray[Any]) -> Windows:
        return Windows(*(column[index] for column in self))

    @property
    def inside(self) -> NDArray[np.bool_]:
        """[n, W] whether a token belongs to the window."""
        return np.arange(self.activations.shape[1]) < self.length[:, None]


class Excerpts:
    """A catalog's text, cut for its features. Raises `InvalidInput` for a catalog of another schema or without a field."""

    def __init__(self, folder: Path) -> None:
        info = read_json(folder / CATALOG)
        if info.get("schema") != SCHEMA_VERSION:
            raise InvalidInput(
                f"{folder / CATALOG}: schema {info.get('schema')!r}; explanations are made from schema {SCHEMA_VERSION}"
            )
        try:
            excluded = [int(i) for i in info["excluded"].values()]
            sampled = np.array(info["sample"]["rows"], np.int64)
            self.window = int(info["contexts"]["window"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{folder / CATALOG}: field {error} is missing or wrong") from error
        corpus = _columns(folder, "corpus")
        self.ids, self.documents, self._rows = corpus["token_id"], corpus["document"], corpus["row"]
        self._starts = np.searchsorted(self._rows, np.arange(self._rows[-1] + 2 if len(self._rows) else 1))
        self._evaluated = ~np.isin(self.ids, excluded) & (self.documents >= 0)
        self.tokens: list[str] = read_table(folder, "vocabulary")["token"].to_pylist()
        self.count = _columns(folder, "features")["count"]
        self._contexts, self._activations = _columns(folder, "contexts"), _columns(folder, "activations")
        self._sample = _columns(folder, "sample")
        self._pool_start, self._pool_length = self._cut(sampled)
        self._owner = np.full(len(self.ids), -1)  # of a token: the window of the sample it lies in
        for i, (start, length) in enumerate(zip(self._pool_start, self._pool_length, strict=True)):
            self._owner[start : start + length] = i

    @property
    def d_sae(self) -> int:
        return len(self.count)

    def _cut(self, rows: Ints) -> tuple[Ints, Ints]:
        """Starts and lengths [P]: evaluated stretches of documents that do not explain, in pieces of up to a window."""
        at = np.concatenate([np.arange(*self._starts[row : row + 2]) for row in np.sort(rows)] or [rows])
        at = at[self._evaluated[at] & ~explains(self.documents[at])]
        if not len(at):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        apart = (np.diff(at) != 1) | (np.diff(self.documents[at]) != 0) | (np.diff(self._rows[at]) != 0)
        pieces = []
        for stretch in np.split(at, np.flatnonzero(apart) + 1):
            if len(stretch) >= max(1, self.window // 8):  # a word or two say nothing
                pieces += np.array_split(stretch, -(-len(stretch) // self.window))
        return np.array([p[0] for p in pieces], np.int64), np.array([len(p) for p in pieces], np.int64)

    def contexts(self, first: int, last: int) -> Windows:
        """All contexts of the features, by feature, band and rank."""
        table = _between(self._contexts, first, last)
        key = _key(table, first)
        order = np.argsort(key, kind="stable")
        key = key[order]
        row, start, length, document, peak, feature, band = (
            table[name][order].astype(np.int64)
            for name in ("row", "start", "length", "document", "peak", "feature", "band")
        )
        activations = np.zeros((len(key), max(self.window, length.max(initial=0))), np.float32)
        firings = _between(self._activations, first, last)
        if len(key):
            at = np.searchsorted(key, _key(firings, first)).clip(max=len(key) - 1)
            there = key[at] == _key(firings, first)
            activations[at[there], firings["offset"][there]] = firings["activation"][there]
        return Windows(feature, band, document, self._starts[row] + start, length, peak, activations)

    def random(
        self, first: int, last: int, wanted: Ints, apart_from: Windows, *, silent: bool = False
    ) -> Windows:
        """Windows of the sample for each feature, up to `wanted` [F], in the order of their draw.

        None overlaps one of `apart_from` of the same feature. silent: only such as the feature does not fire in.
        """
        F, P = last - first, len(self._pool_start)
        firings = _between(self._sample, first, last)
        place = self._starts[firings["row"]] + firings["position"]
        owner, row = self._owner[place], firings["feature"] - first
        known = owner >= 0
        taken = np.zeros((F, P), bool)
        begin = np.searchsorted(self._pool_start + self._pool_length, apart_from.start, "right")
        end = np.searchsorted(self._pool_start, apart_from.start + apart_from.length, "left")
        for step in range(int((end - begin).max(initial=0))):
            here = begin + step < end
            taken[(apart_from.feature - first)[here], (begin + step)[here]] = True
        if silent:
            taken[row[known], owner[known]] = True
        drawn = draw(RANDOM, np.arange(first, last)[:, None], self._pool_start[None, :])
        order = np.where(taken, np.uint64(2**64 - 1), drawn).argsort(axis=1, kind="stable")
        given = np.minimum(wanted, (~taken).sum(axis=1))
        which, nth = np.nonzero(np.arange(P) < given[:, None])
        window = order[which, nth]
        activations = np.zeros((len(which), self.window), np.float32)
        slot = np.full((F, P), -1)
        slot[which, window] = np.arange(len(which))
        to = np.where(known, slot[row, owner] if P else -1, -1)
        chosen = to >= 0
        activations[to[chosen], (place - self._pool_start[owner] if P else place)[chosen]] = firings[
            "activation"
        ][chosen]
        start = self._pool_start[window]
        return Windows(
            which + first, np.full(len(which), -1), self.documents[start], start, self._pool_length[window],
            activations.argmax(axis=1) if len(which) else which, activations,
        )  # fmt: skip

    def ids_of(self, windows: Windows, ahead: int = 0) -> Ints:
        """[n, W] token ids, or those of the token `ahead`; −1 beyond the window, and where that token is another document's."""
        at = windows.start[:, None] + np.arange(windows.activations.shape[1])
        there = windows.inside & (at + ahead < len(self.ids))
        at = np.where(there, at, 0)
        to = np.where(there, at + ahead, 0)
        there &= (self._rows[to] == self._rows[at]) & (self.documents[to] == self.documents[at])
        return np.where(there & self._evaluated[to], self.ids[to], -1)

    def words(self, windows: Windows, i: int) -> list[str]:
        """The tokens of one window as text, spaces kept."""
        start = int(windows.start[i])
        return [self.tokens[t] for t in self.ids[start : start + int(windows.length[i])].tolist()]


def _columns(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """The columns of numbers of a table."""
    table = read_table(folder, name)
    return {
        field.name: table[field.name].to_numpy()
        for field in table.schema
        if str(field.type) not in ("string", "bool")
    }


def _between(table: dict[str, NDArray[Any]], first: int, last: int) -> dict[str, NDArray[Any]]:
    begin, end = np.searchsorted(table["feature"], [first, last])
    return {name: column[begin:end] for name, column in table.items()}


def _key(table: dict[str, NDArray[Any]], first: int) -> Ints:
    band, rank = table["band"].astype(np.int64), table["rank"].astype(np.int64)
    return ((table["feature"].astype(np.int64) - first) * BANDS + band) * RANKS + rank
