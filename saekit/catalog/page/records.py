"""The full records of features as the page reads them, cut out of the tables' columns a stretch of features at a time.

A page of tens of thousands of features is written from here, so nothing is read row by row: each table becomes arrays
once, and numbers are shortened to three significant digits a column at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from saekit.catalog.feature import shares
from saekit.catalog.said import CORRELATIONS, HALVES, Score
from saekit.catalog.tables import TOP

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

AROUND = 24  # tokens of a band's context that the page shows
ALPHABET = "".join(
    chr(i) for i in range(33, 127) if chr(i) not in "\"'\\<"
)  # also in data.js, which reads it
HOW = {
    "pearson": "predicts the activations in {texts} it was not made from",
    "auc": "predicts where it fires in {texts} it was not made from",
    "simulation": "{who} guessed the activations in {texts} from these words alone",
    "detection": "{who} told from these words alone in which of {texts} it fires",
    "fuzzing": "{who} told from these words alone whether {texts} have the tokens marked that it fires on",
}
FIRST = {  # of tables whose rows a record shows in two parts: whether a row belongs to the first
    "histograms": lambda table: pc.equal(table["of"], "activation"),
    "neighbours": lambda table: pc.equal(table["by"], "decoder"),
    "logits": lambda table: table["raised"],
}

Columns = dict[str, NDArray[Any]]


class Rows(NamedTuple):
    """The rows of one table that belong to a stretch of features, those of a feature's first part before the second's."""

    columns: Columns
    bounds: list[int]  # where the parts of each feature begin, and the end

    def of(self, rows: list[Any], i: int, part: int = 0) -> list[Any]:
        """Those of a part of the i-th feature, of a list with an entry per row."""
        return rows[self.bounds[2 * i + part] : self.bounds[2 * i + part + 1]]


class Records:
    """Reads a table when the first stretch asks for it. Safe to ask from several threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._tables: dict[str, Columns] = {}

    def stretch(self, start: int, end: int) -> dict[str, Any]:
        """The records of features start … end − 1: {tokens: texts, width: letters a token, features: one record each}.

        A context is [document, peak, sink, tokens, offsets, activations]: tokens as `packed` places among the texts, the
        others where the feature fires. A band is [low, high, share, contexts], weakest first; a bar [low, high, count];
        a token [text, mean activation, count, share], or [text, effect]; a neighbour or neuron [index, similarity]; an
        explanation [method, text, score, how it was scored]. The bars of effects are `even` ones.
        """
        catalog = self._catalog
        texts, width, contexts = self._contexts(start, end)
        bars, tokens, logits, near, neurons = (
            self._rows(name, start, end)
            for name in ("histograms", "tokens", "logits", "neighbours", "neurons")
        )
        bins = _zipped(bars, "low", "high", "count")
        stats = _zipped(tokens, "token_id", "mean_activation", "count", "share", text=catalog.vocabulary)
        effects = _zipped(logits, "token_id", "effect", text=catalog.vocabulary)
        others = _zipped(near, "neighbour", "similarity")
        along = _zipped(neurons, "neuron", "cosine")
        mean = short(catalog._features["mean_activation"][start:end])
        exact = list(zip(*(bars.columns[x].tolist() for x in ("low", "high", "count")), strict=True))
        said, bands = self._explanations(start, end), self._bands(start, end, bars)
        made = []
        for i, feature in enumerate(range(start, end)):
            made.append(
                {
                    "mean": mean[i],
                    "contexts": contexts.get((feature, TOP), []),
                    "bands": [[*band, contexts.get((feature, b), [])] for b, band in enumerate(bands[i], 1)],
                    "histogram": bars.of(bins, i),
                    "effects": even(bars.of(exact, i, 1)),
                    "tokens": tokens.of(stats, i),
                    "raised": logits.of(effects, i),
                    "lowered": logits.of(effects, i, 1),
                    "neighbours": near.of(others, i),
                    "coactive": near.of(others, i, 1),
                    "neurons": neurons.of(along, i),
                    "explanations": said[i],
                }
            )
        return {"tokens": texts, "width": width, "features": made}

    def near(self, feature: int) -> list[int]:
        """The features that its record names."""
        return self._rows("neighbours", feature, feature + 1).columns["neighbour"].tolist()

    def _explanations(self, start: int, end: int) -> list[list[list[Any]]]:
        """Of each feature."""
        return [
            [
                [e.method, e.text, None if e.score is None else round(e.score, 2), how_scored(e.scores)]
                for e in own
            ]
            for own in self._catalog._said.stretch(start, end)
        ]

    def _bands(self, start: int, end: int, bars: Rows) -> list[list[tuple[float, float, float]]]:
        """(low, high, share) of the bands of each feature, as `Feature.bands` has them. bars: of `histograms`."""
        n = int(self._catalog.info["contexts"]["bands"])
        tops = self._catalog.max_activation[start:end].astype(float)
        edges = short(tops[:, None] * np.arange(n + 1) / n)
        own = bars.columns["part"] % 2 == 0
        low, high, count = (bars.columns[name][own] for name in ("low", "high", "count"))
        found = shares(low, high, count, np.diff(bars.bounds)[::2], tops, n)
        return [
            list(zip(low[:-1], low[1:], share, strict=True)) if share[0] is not None else []
            for low, share in zip(edges, short(found), strict=True)
        ]

    def _contexts(self, start: int, end: int) -> tuple[list[str], int, dict[tuple[int, int], list[Any]]]:
        """(texts of the tokens, commonest first, letters a token, contexts of each (feature, band))."""
        catalog, rows = self._catalog, self._rows("contexts", start, end).columns
        ids, row_starts = catalog._corpus
        length, peak, top = (
            rows["length"].astype(np.int64),
            rows["peak"].astype(np.int64),
            rows["band"] == TOP,
        )
        cut = np.where(top, 0, np.clip(peak - AROUND * 5 // 8, 0, np.maximum(0, length - AROUND)))
        size = np.where(top, length, np.minimum(length, AROUND))
        begin = row_starts[rows["row"]] + rows["start"] + cut
        ends = np.cumsum(size)
        flat = ids[np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - ends + size, size)]
        counts = np.bincount(flat, minlength=len(catalog.vocabulary))
        known = np.flatnonzero(counts)
        known = known[np.argsort(-counts[known], kind="stable")]  # the commonest have the shortest numbers
        place = np.empty(len(counts), np.int64)
        place[known] = np.arange(len(known))
        tokens, width = packed(place[flat], len(known))

        firing = self._rows("activations", start, end).columns
        key, wanted = _key(rows), _key(firing)
        order = np.argsort(key, kind="stable")
        context = order[np.searchsorted(key, wanted, sorter=order)]
        offset = firing["offset"] - cut[context]
        seen = (offset >= 0) & (offset < size[context])
        context, offset, value = context[seen], offset[seen], firing["activation"][seen]
        order = np.lexsort((offset, context))
        bounds = np.searchsorted(context[order], np.arange(len(key) + 1)).tolist()
        offsets, values = offset[order].tolist(), short(value[order])

        found: dict[tuple[int, int], list[Any]] = {}
        sink = (rows["norm"] > catalog.sink_norm).astype(int).tolist()
        last = [0, *(ends * width).tolist()]
        columns = (
            rows["feature"].tolist(),
            rows["band"].tolist(),
            rows["document"].tolist(),
            (peak - cut).tolist(),
        )
        for i, (feature, band, document, at) in enumerate(zip(*columns, strict=True)):
            own = slice(bounds[i], bounds[i + 1])
            found.setdefault((feature, band), []).append(
                [document, at, sink[i], tokens[last[i] : last[i + 1]], offsets[own], values[own]]
            )
        vocabulary = catalog.vocabulary
        return [vocabulary[i] for i in known.tolist()], width, found

    def _rows(self, name: str, start: int, end: int) -> Rows:
        if name not in self._tables:
            self._tables[name] = self._read(name)
        columns = self._tables[name]
        part = columns["part"]
        bounds = np.searchsorted(part, np.arange(2 * start, 2 * end + 1, dtype=part.dtype))
        cut = slice(int(bounds[0]), int(bounds[-1]))
        return Rows({name: column[cut] for name, column in columns.items()}, (bounds - bounds[0]).tolist())

    def _read(self, name: str) -> Columns:
        """A table's numbers as arrays, and `part`: twice the feature, and one more in its second part; sorted by it."""
        table = self._catalog.table(name)
        columns = {
            field.name: table[field.name].to_numpy()
            for field in table.schema
            if not pa.types.is_string(field.type)
        }
        part = 2 * columns["feature"].astype(np.int32)
        if name in FIRST:
            part += ~FIRST[name](table).to_numpy()
        columns["part"] = part
        if (np.diff(part) < 0).any():
            order = np.argsort(part, kind="stable")
            columns = {name: column[order] for name, column in columns.items()}
        return columns


def _key(rows: Columns) -> NDArray[np.int64]:
    """One number for (feature, band, rank), in their order."""
    return (rows["feature"].astype(np.int64) << 32) + (rows["band"].astype(np.int64) << 16) + rows["rank"]


def _zipped(rows: Rows, *names: str, text: list[str] | None = None) -> list[tuple[Any, ...]]:
    """Row by row, fractions short; the first column as texts where `text` says them."""
    columns = [
        short(column) if column.dtype.kind == "f" else column.tolist()
        for column in (rows.columns[name] for name in names)
    ]
    if text is not None:
        columns[0] = [text[i] for i in columns[0]]
    return list(zip(*columns, strict=True))


def even(bars: list[tuple[float, float, int]]) -> list[Any]:
    """Bars of one width, the empty ones left out → [low, high, counts of all]; empty where there are none."""
    if not bars:
        return []
    low, high = bars[0][0], bars[-1][1]
    n = round((high - low) / (bars[0][1] - low))
    counts = [0] * n
    for start, _, count in bars:
        counts[min(n - 1, round((start - low) / (high - low) * n))] += count
    return [*short([low, high]), counts]


def packed(places: NDArray[np.int64], n: int) -> tuple[str, int]:
    """(numbers below n as text, how many letters each has): half as long as JSON, and written and read at once."""
    base, width = len(ALPHABET), 1
    while base**width < n:
        width += 1
    digits = places[:, None] // base ** np.arange(width)[::-1] % base
    return np.frombuffer(ALPHABET.encode(), np.uint8)[digits].tobytes().decode(), width


def short(numbers: ArrayLike) -> list[Any]:
    """Numbers of three significant digits; None for NaN and infinities, which JSON lacks."""
    x = np.asarray(numbers, np.float64)
    finite = np.isfinite(x)
    known = np.where(finite & (x != 0), x, 1.0)
    digits = 2 - np.floor(np.log10(np.abs(known)))  # after the point
    # Of two exact numbers a quotient is the double nearest to the decimal, so that it is written as briefly as can be.
    scale = 10.0 ** np.abs(digits)
    shortened = np.where(digits >= 0, np.round(known * scale) / scale, np.round(known / scale) * scale)
    shortened[x == 0] = 0.0
    if not finite.all():
        shortened = np.where(finite, shortened, np.array(None, object))
    written: list[Any] = shortened.tolist()
    return written


def how_scored(scores: list[Score]) -> str:
    """In words, where the score of an explanation is from (see `Explanation.score`): "" where it has none."""
    known = [(score.score, score) for score in scores if score.score is not None]
    found = [pair for pair in known if pair[1].scorer in CORRELATIONS] or [
        pair for pair in known if pair[1].scorer in HALVES
    ]
    if not found:
        return ""
    value, best = max(found, key=lambda pair: pair[0])
    texts = f"{best.n:,} text{'' if best.n == 1 else 's'}"
    how = HOW[best.scorer.removesuffix("_auc")].format(who=best.judge or "a model", texts=texts)
    if best.scorer in CORRELATIONS:
        measure, chance = "correlation", ""
    else:
        measure = "area under the ROC curve" if best.scorer.endswith("auc") else "balanced accuracy"
        chance = " (chance: 0.50)"
    failed = f", {best.failures:,} without an answer" if best.failures else ""
    control = "" if best.control is None else f"; another feature's words reach {_signed(best.control)}"
    return f"{how}{failed}: {measure} {_signed(value)}{chance}{control}"


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "\N{MINUS SIGN}")
