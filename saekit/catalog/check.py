"""Is a catalog whole, and does it agree with itself? Everything that can be seen without the model and the text.

Each finding is one line that names the file, says what is wrong with how many rows, and shows the first of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from saekit.catalog.said import KEY
from saekit.catalog.store import SAYING
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, SCHEMAS, TOP, read_table
from saekit.errors import SaekitError
from saekit.files import existing, read_json, read_tensors, sha256_of_file
from saekit.sae.files import assemble, from_cfg

CARD = "README.md"
NULLABLE = {("scores", "score"), ("scores", "control")}
UNDEFINED = {("features", "encoder_cosine")}  # NaN for a transcoder that reads and writes different widths
CLOSE = 1e-4  # relative; figures are float32, and derived ones come from exact sums
SHOWN = 5  # names in one finding

DESCRIPTION: dict[str, Any] = {
    "model": {"name": str, "hash": str, "tokenizer_hash": str, "dtype": str},
    "sae": {},
    "site": str,
    "target_site": str,
    "corpus": {"label": str, "tokens": int, "rows": int, "context_size": int},
    "excluded": {},
    "median_norm": (int, float),
    "sinks": {"norm_above": (int, float), "tokens": int},
    "contexts": {"per_feature": int, "window": int, "bands": int, "per_band": int},
    "sample": {"rows": list},
    "seeds": {},
    "definitions": {},
    "files": {},
}

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def check(folder: str | Path) -> list[str]:
    """Every inconsistency of a catalog, one line each; none for a sound one. Raises `FileMissing` without a folder."""
    return _Check(existing(Path(folder), "catalog")).run()


class _Check:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []
        self.info: dict[str, Any] = {}
        self.columns: dict[str, dict[str, Any]] = {}  # of the tables that could be read

    def run(self) -> list[str]:
        if not self._description():
            return self.found
        self._files()
        for name, schema in SCHEMAS.items():
            self._table(name, schema)
        for needs, part in (
            (("features",), self._features),
            (("vocabulary",), self._vocabulary),
            (("corpus", "vocabulary"), self._corpus),
            (("features", "contexts", "corpus"), self._contexts),
            (("features", "contexts", "activations"), self._activations),
            (("features", "sample", "corpus"), self._sample),
            (("sample", "contexts", "activations", "corpus"), self._agreement),
            (("features", "tokens", "vocabulary"), self._tokens),
            (("features", "evidence", "vocabulary"), self._evidence),
            (("logits", "vocabulary"), self._logits),
            (("features", "histograms"), self._histograms),
            (("neighbours",), self._neighbours),
            (("neurons",), self._neurons),
            (("explanations", "scores"), self._said),
            (("features",), self._directions),
        ):
            if self.columns.keys() >= set(needs):
                part()
        return self.found

    def say(self, name: str, text: str) -> None:
        self.found.append(f"{name}: {text}")

    def wrong(self, name: str, rows: Any, text: str) -> None:
        """A finding about the rows of a table that a mask, or a list of row numbers, picks."""
        at = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        if len(at) == 0:
            return
        columns, first = self.columns[name], int(at[0])
        who = f"feature {columns['feature'][first]}, " if "feature" in columns else ""
        count = "1 row" if len(at) == 1 else f"{len(at):,} rows"
        self.say(f"{name}.parquet", f"{count} {text} (first: {who}row {first})")

    # What it says it is

    def _description(self) -> bool:
        """Whether the description says enough to go on."""
        try:
            self.info = read_json(existing(self.folder / CATALOG, "catalog"))
        except SaekitError as error:
            self.found.append(str(error))
            return False
        if self.info.get("schema") != SCHEMA_VERSION:
            self.say(CATALOG, f"schema {self.info.get('schema')!r}; this saekit reads {SCHEMA_VERSION}")
            return False
        before = len(self.found)
        self._fields(self.info, DESCRIPTION, "")
        if len(self.found) > before:
            return False
        if not isinstance(self.info["sae"].get("d_sae"), int) or self.info["sae"]["d_sae"] < 1:
            self.say(
                CATALOG, f"sae.d_sae is {self.info['sae'].get('d_sae')!r}, expected a whole number from 1"
            )
            return False
        if not self.info["median_norm"] > 0:
            self.say(CATALOG, f"median_norm is {self.info['median_norm']!r}, expected a positive number")
        if any(
            not isinstance(i, int) for i in (*self.info["excluded"].values(), *self.info["sample"]["rows"])
        ):
            self.say(CATALOG, "excluded and sample.rows have to hold whole numbers")
            return False
        return True

    def _fields(self, given: dict[str, Any], expected: dict[str, Any], place: str) -> None:
        for name, kind in expected.items():
            value = given.get(name)
            wanted = dict if isinstance(kind, dict) else kind
            if not isinstance(value, wanted) or isinstance(value, bool):
                self.say(CATALOG, f"{place}{name} is {str(value)[:60]!r}, which is no {_kind(wanted)}")
            elif isinstance(kind, dict):
                self._fields(value, kind, f"{place}{name}.")

    def _files(self) -> None:
        expected = {CATALOG, DIRECTIONS, *(f"{name}.parquet" for name in SCHEMAS)}
        summed = expected - {CATALOG, *(f"{name}.parquet" for name in SAYING)}
        there = {path.name for path in self.folder.iterdir()}
        for name in sorted(expected - there):
            self.say(name, "missing")
        for name in sorted(there - expected - {CARD}):
            if not name.startswith("."):
                self.say(name, "no file of a catalog")
        sums = self.info["files"]
        for name in sorted(summed - sums.keys()):
            self.say(CATALOG, f"files has no checksum of {name}")
        for name in sorted(sums.keys() - summed):
            self.say(
                CATALOG,
                f"files has a checksum of {name}, which is none of those that stay as they were built",
            )
        for name in sorted(summed & sums.keys() & there):
            if sha256_of_file(self.folder / name) != sums[name]:
                self.say(name, "not what was built: its SHA-256 is another than in catalog.json")

    def _table(self, name: str, schema: pa.Schema) -> None:
        if not (self.folder / f"{name}.parquet").exists():
            return  # named already
        try:
            table = read_table(self.folder, name)
        except SaekitError as error:
            self.found.append(str(error).removeprefix(f"{self.folder}/"))
            return
        empty = [c for c in schema.names if table[c].null_count and (name, c) not in NULLABLE]
        if empty:
            self.say(f"{name}.parquet", f"empty values in {', '.join(empty)}")
            return
        self.columns[name] = {
            c: table[c].to_numpy() if schema.field(c).type != pa.string() else table[c].combine_chunks() for c in schema.names
        }  # fmt: skip
        for c in schema.names:
            undefined = (name, c) in UNDEFINED and self.info["site"] != self.info["target_site"]
            if pa.types.is_floating(schema.field(c).type) and (name, c) not in NULLABLE and not undefined:
                self.wrong(name, ~np.isfinite(self.columns[name][c]), f"with a {c} that is no finite number")
        if "feature" in schema.names:
            feature = self.columns[name]["feature"]
            self.wrong(name, np.flatnonzero(np.diff(feature) < 0) + 1, "out of order: sorted by feature")
            strange = (feature < 0) | (feature >= self.S)
            self.wrong(name, strange, f"of a feature outside 0 … {self.S - 1}")
            if strange.any():
                del self.columns[name]

    @property
    def S(self) -> int:
        return self.info["sae"]["d_sae"]

    # What the tables hold

    def _features(self) -> None:
        t, tokens = self.columns["features"], self.info["corpus"]["tokens"]
        if len(t["feature"]) != self.S or (t["feature"] != np.arange(self.S)).any():
            self.say("features.parquet", f"expected one row for each of the features 0 … {self.S - 1}")
            del self.columns["features"]
            return
        n, density = t["count"], t["density"].astype(float)
        self.wrong("features", (density < 0) | (density > 1), "with a density outside [0, 1]")
        self.wrong("features", (n < 0) | (n > tokens), f"with a count outside 0 … {tokens:,}")
        self.wrong(
            "features",
            ~np.isclose(density * tokens, n, rtol=CLOSE, atol=0),
            "whose density · tokens is not the count",
        )
        fired = n > 0
        self.wrong(
            "features",
            fired != (t["max_activation"] > 0),
            "where count and max_activation disagree on whether it fired",
        )
        self.wrong(
            "features",
            t["mean_activation"] > t["max_activation"] * (1 + CLOSE),
            "whose mean_activation is above the maximum",
        )
        self.wrong(
            "features",
            fired != (t["mean_activation"] > 0),
            "where count and mean_activation disagree on whether it fired",
        )
        self.wrong("features", t["std_activation"] < 0, "with a negative std_activation")
        self.wrong("features", t["decoder_norm"] < 0, "with a negative decoder_norm")
        self.wrong(
            "features", np.abs(t["encoder_cosine"]) > 1 + CLOSE, "with an encoder_cosine outside [−1, 1]"
        )

    def _vocabulary(self) -> None:
        ids = self.columns["vocabulary"]["token_id"]
        self.wrong("vocabulary", ids != np.arange(len(ids)), "whose token_id is not its place")

    def _known(self, name: str) -> None:
        ids, V = self.columns[name]["token_id"], len(self.columns["vocabulary"]["token_id"])
        self.wrong(name, (ids < 0) | (ids >= V), f"with a token_id that the vocabulary of {V:,} lacks")

    def _corpus(self) -> None:
        t = self.columns["corpus"]
        row, position = t["row"], t["position"]
        first = np.diff(row, prepend=-1) != 0
        starts = np.flatnonzero(first)
        inside = np.arange(len(row)) - np.repeat(starts, np.diff(np.r_[starts, len(row)]))
        disorder = (row != np.cumsum(first) - 1) | (position != inside)
        self.wrong("corpus", disorder, "out of order: rows 0, 1, …, and in each the positions 0, 1, …")
        self._known("corpus")
        if disorder.any():
            del self.columns["corpus"]
            return
        self.begins = np.r_[starts, len(row)]  # of each row, and the end
        self.special = np.isin(t["token_id"], list(self.info["excluded"].values()))
        drawn = np.array(self.info["sample"]["rows"], np.int64)
        if (np.diff(drawn) <= 0).any() or ((drawn < 0) | (drawn >= len(starts))).any():
            self.say(CATALOG, f"sample.rows has to name rows of the corpus, 0 … {len(starts) - 1}, ascending")
            self.columns.pop("sample", None)
        longest = int(np.diff(self.begins).max(initial=0))
        if longest > self.info["corpus"]["context_size"]:
            self.say(
                "corpus.parquet",
                f"a row of {longest} tokens; corpus.context_size is {self.info['corpus']['context_size']}",
            )

    def _contexts(self) -> None:
        t, corpus, about = self.columns["contexts"], self.columns["corpus"], self.info["contexts"]
        top = self.columns["features"]["max_activation"][t["feature"]]
        band, value = t["band"], t["max_activation"]
        strange = (band < TOP) | (band > about["bands"])
        self.wrong("contexts", strange, f"with a band outside 0 … {about['bands']}")
        self._ranked("contexts", ("feature", "band"), "max_activation", where=band == TOP)
        rank = t["rank"]
        self.wrong(
            "contexts",
            (band == TOP) & (rank >= about["per_feature"]),
            f"beyond the {about['per_feature']} of a feature",
        )
        self.wrong(
            "contexts",
            (band != TOP) & (rank >= about["per_band"]),
            f"beyond the {about['per_band']} of a band",
        )
        self.wrong(
            "contexts", _again(t["feature"], band, t["document"]), "of a document that the band has already"
        )
        self.wrong("contexts", value <= 0, "with a peak that does not fire")
        self.wrong("contexts", value > top, "with a peak above the feature's max_activation")
        self.wrong(
            "contexts",
            (band == TOP) & (rank == 0) & (value != top),
            "of rank 0 that are not the feature's maximum",
        )
        self.wrong("contexts", t["norm"] < 0, "with a negative norm")
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.ceil(value.astype(float) / top.astype(float) * about["bands"])
        self.wrong(
            "contexts",
            (band > TOP) & (value > 0) & (value <= top) & (own != band),
            "whose peak lies in another band",
        )
        shown = np.zeros(self.S, bool)
        shown[t["feature"][band == TOP]] = True
        self.wrong(
            "features",
            (self.columns["features"]["count"] > 0) != shown,
            "that fired without a context, or have one without",
        )
        row, start, length = (t[name].astype(np.int64) for name in ("row", "start", "length"))
        lost = (row < 0) | (row >= len(self.begins) - 1)
        self.wrong("contexts", lost, "of a row that the corpus lacks")
        row = np.where(lost, 0, row)
        size = np.diff(self.begins)[row] if len(self.begins) > 1 else np.zeros(len(row), np.int64)
        out = (start < 0) | (length < 1) | (start + length > size)
        self.wrong("contexts", out & ~lost, "whose window leaves its row")
        self.wrong("contexts", length > about["window"], f"longer than the window of {about['window']}")
        off = (t["peak"] < 0) | (t["peak"] >= length)
        self.wrong("contexts", off, "whose peak lies outside of its window")
        self.sound = ~(lost | out | off | strange)  # contexts whose tokens can be looked at
        here = np.flatnonzero(self.sound)
        begin = self.begins[row[here]] + start[here]
        end = begin + length[here]
        document = corpus["document"]
        change = np.cumsum(np.diff(document, prepend=document[:1]) != 0)
        mixed = (change[end - 1] != change[begin]) | (document[begin] != t["document"][here])
        self.wrong("contexts", here[mixed], "whose window leaves its document")
        seen = np.r_[0, np.cumsum(self.special)]
        self.wrong("contexts", here[seen[end] > seen[begin]], "whose window holds an excluded token")

    def _activations(self) -> None:
        t, contexts = self.columns["activations"], self.columns["contexts"]
        key, own = _context_key(t), _context_key(contexts)
        order = np.argsort(own, kind="stable")
        place = np.searchsorted(own[order], key).clip(max=max(0, len(own) - 1))
        lost = own[order][place] != key if len(own) else np.ones(len(key), bool)
        self.wrong("activations", lost, "of a context that contexts.parquet lacks")
        context = np.where(lost, 0, order[place]) if len(own) else np.zeros(len(key), np.int64)
        offset, value = t["offset"], t["activation"]
        out = ~lost & ((offset < 0) | (offset >= contexts["length"][context] if len(own) else True))
        self.wrong("activations", out, "outside of their context's window")
        self.wrong("activations", value <= 0, "that are not above 0")
        self.wrong(
            "activations",
            value > self.columns["features"]["max_activation"][t["feature"]],
            "above the feature's max_activation",
        )
        self.wrong("activations", _again(key, offset), "of a token that has one already")
        good = np.flatnonzero(~(lost | out))
        at_peak = good[offset[good] == contexts["peak"][context[good]]]
        peaks = np.zeros(len(own), np.float32)
        peaks[context[at_peak]] = value[at_peak]
        self.wrong(
            "contexts",
            peaks != contexts["max_activation"],
            "whose max_activation is not the activation at the peak",
        )
        highest = np.zeros(len(own), np.float32)
        np.maximum.at(highest, context[good], value[good])
        self.wrong(
            "contexts",
            (contexts["band"] == TOP) & (highest > contexts["max_activation"]),
            "whose peak is not the maximum of its window",
        )
        self.context_of = np.where(lost | out, -1, context)

    def _sample(self) -> None:
        t = self.columns["sample"]
        row, position = t["row"].astype(np.int64), t["position"].astype(np.int64)
        lost = ~np.isin(row, self.info["sample"]["rows"])
        self.wrong("sample", lost, "of a row that sample.rows of catalog.json does not name")
        row = np.where(lost, 0, row)
        out = ~lost & ((position < 0) | (position >= np.diff(self.begins)[row]))
        self.wrong("sample", out, "at a position outside of their row")
        good = np.flatnonzero(~(lost | out))
        self.wrong(
            "sample", good[self.special[self.begins[row[good]] + position[good]]], "on an excluded token"
        )
        self.wrong("sample", t["activation"] <= 0, "that are not above 0")
        features = self.columns["features"]
        self.wrong(
            "sample",
            t["activation"] > features["max_activation"][t["feature"]],
            "above the feature's max_activation",
        )
        key = self._token_key(t["feature"], row, position)
        self.wrong(
            "sample",
            np.flatnonzero(np.diff(key) <= 0) + 1,
            "out of order: sorted by feature, row and position, each once",
        )
        self.wrong(
            "features",
            np.bincount(t["feature"], minlength=self.S) > features["count"],
            "that fire in the sample more often than at all",
        )

    def _token_key(self, feature: Any, row: Any, position: Any) -> Ints:
        return (feature.astype(np.int64) << 44) + (row.astype(np.int64) << 15) + position

    def _agreement(self) -> None:
        """On rows of the sample, contexts hold exactly what the sample does."""
        if not hasattr(self, "sound") or not hasattr(self, "context_of"):
            return
        sample, contexts, t = self.columns["sample"], self.columns["contexts"], self.columns["activations"]
        key = self._token_key(sample["feature"], sample["row"], sample["position"])
        order = np.argsort(key, kind="stable")
        key, known = key[order], sample["activation"][order]
        drawn = self.sound & np.isin(contexts["row"], self.info["sample"]["rows"])
        context = self.context_of
        here = np.flatnonzero((context >= 0) & drawn[context]) if len(drawn) else np.zeros(0, np.int64)
        own = context[here]
        position = contexts["start"][own].astype(np.int64) + t["offset"][here]
        wanted = self._token_key(t["feature"][here], contexts["row"][own], position)
        place = np.searchsorted(key, wanted).clip(max=max(0, len(key) - 1))
        same = (
            (key[place] == wanted) & (known[place] == t["activation"][here])
            if len(key)
            else np.zeros(len(here), bool)
        )
        self.wrong("activations", here[~same], "that the sample of the same row has otherwise")
        rows = np.flatnonzero(drawn)
        begin = self._token_key(
            contexts["feature"][rows], contexts["row"][rows], contexts["start"][rows].astype(np.int64)
        )
        inside = np.searchsorted(key, begin + contexts["length"][rows]) - np.searchsorted(key, begin)
        counted = np.bincount(own, minlength=len(drawn))[rows]
        self.wrong(
            "contexts",
            rows[inside > counted],
            "that leave out activations which the sample of the same row has",
        )

    def _tokens(self) -> None:
        t, features = self.columns["tokens"], self.columns["features"]
        own = {
            name: features[name][t["feature"]].astype(float)
            for name in ("count", "mean_activation", "max_activation")
        }
        self._known("tokens")
        self._ranked("tokens", ("feature",), "mean_activation")
        self.wrong("tokens", _again(t["feature"], t["token_id"]), "of a token that the feature has already")
        self.wrong(
            "tokens", (t["count"] < 2) | (t["count"] > own["count"]), "with a count outside 2 … the feature's"
        )
        self.wrong(
            "tokens",
            (t["mean_activation"] <= 0) | (t["mean_activation"] > own["max_activation"] * (1 + CLOSE)),
            "with a mean_activation outside (0, maximum]",
        )
        self.wrong("tokens", (t["share"] < 0) | (t["share"] > 1 + CLOSE), "with a share outside [0, 1]")
        with np.errstate(divide="ignore", invalid="ignore"):
            share = t["count"] * t["mean_activation"].astype(float) / (own["count"] * own["mean_activation"])
        self.wrong(
            "tokens",
            ~np.isclose(t["share"], share, rtol=10 * CLOSE, atol=1e-6),
            "whose share is not count · mean over the feature's",
        )

    def _evidence(self) -> None:
        t, features = self.columns["evidence"], self.columns["features"]
        self._known("evidence")
        self._ranked("evidence", ("feature",))
        self.wrong("evidence", _again(t["feature"], t["token_id"]), "of a token that the feature has already")
        self.wrong(
            "evidence",
            (t["count"] < 1) | (t["count"] > features["count"][t["feature"]]),
            "with a count outside 1 … the feature's",
        )
        top = features["max_activation"][t["feature"]]
        self.wrong(
            "evidence",
            (t["expected"] <= 0) | (t["expected"] > top * (1 + CLOSE)),
            "with an expected activation outside (0, maximum]",
        )

    def _logits(self) -> None:
        t = self.columns["logits"]
        self._known("logits")
        self.wrong(
            "logits",
            _again(t["feature"], t["raised"], t["token_id"]),
            "of a token that the feature has already",
        )
        t["effect in its direction"] = np.where(t["raised"], t["effect"], -t["effect"])
        self._ranked("logits", ("feature", "raised"), "effect in its direction")

    def _histograms(self) -> None:
        t, features = self.columns["histograms"], self.columns["features"]
        of = {
            kind: pc.equal(t["of"], kind).to_numpy(zero_copy_only=False) for kind in ("activation", "effect")
        }
        self.wrong(
            "histograms", ~(of["activation"] | of["effect"]), "of something else than activation and effect"
        )
        self.wrong("histograms", t["low"] > t["high"], "whose low is above their high")
        self.wrong("histograms", t["count"] < 0, "with a negative count")
        total = {k: np.bincount(t["feature"][mask], t["count"][mask], self.S) for k, mask in of.items()}
        self.wrong(
            "features",
            total["activation"] != features["count"],
            "whose histogram of activations does not add up to the count",
        )
        if of["effect"].any() and len(sums := np.unique(total["effect"])) > 1:
            self.say(
                "histograms.parquet",
                f"those of effects count {_some(sums.astype(int))} tokens; expected all the same",
            )

    def _neighbours(self) -> None:
        t = self.columns["neighbours"]
        by = {kind: pc.equal(t["by"], kind).to_numpy(zero_copy_only=False) for kind in ("decoder", "firing")}
        self.wrong("neighbours", ~(by["decoder"] | by["firing"]), "by something else than decoder and firing")
        self.wrong(
            "neighbours",
            (t["neighbour"] < 0) | (t["neighbour"] >= self.S),
            f"with a neighbour outside 0 … {self.S - 1}",
        )
        self.wrong("neighbours", t["neighbour"] == t["feature"], "that name the feature itself")
        low = np.where(by["firing"], 0, -1) - CLOSE
        self.wrong(
            "neighbours",
            (t["similarity"] < low) | (t["similarity"] > 1 + CLOSE),
            "with a similarity that none can be",
        )
        kind = by["firing"].astype(np.int8)
        self.wrong(
            "neighbours",
            _again(t["feature"], kind, t["neighbour"]),
            "of a neighbour that the feature has already",
        )
        t["kind"] = kind
        self._ranked("neighbours", ("feature", "kind"), "similarity")

    def _neurons(self) -> None:
        t = self.columns["neurons"]
        self.wrong("neurons", t["neuron"] < 0, "with a negative neuron")
        self.wrong("neurons", np.abs(t["cosine"]) > 1 + CLOSE, "with a cosine outside [−1, 1]")
        self.wrong("neurons", _again(t["feature"], t["neuron"]), "of a neuron that the feature has already")
        t["|cosine|"] = np.abs(t["cosine"])
        self._ranked("neurons", ("feature",), "|cosine|")

    def _said(self) -> None:
        said, scores = self.columns["explanations"], self.columns["scores"]
        known = list(zip(*(_values(said[name]) for name in KEY), strict=True))
        first = {key: i for i, key in reversed(list(enumerate(known)))}
        self.wrong(
            "explanations", [i for i, key in enumerate(known) if first[key] != i], "with the key of another"
        )
        about = list(zip(*(_values(scores[name]) for name in KEY), strict=True))
        self.wrong(
            "scores",
            [i for i, key in enumerate(about) if key not in first],
            "of an explanation that explanations.parquet lacks",
        )
        by = zip(about, *(_values(scores[name]) for name in ("scorer", "judge", "judge_prompt")), strict=True)
        met: set[Any] = set()
        again = [i for i, key in enumerate(by) if key in met or met.add(key)]  # type: ignore[func-returns-value]
        self.wrong("scores", again, "with the key of another")
        for name in ("score", "control"):
            value = scores[name].astype(float)
            self.wrong(
                "scores",
                np.isinf(value) | (np.abs(np.nan_to_num(value)) > 1 + CLOSE),
                f"with a {name} outside [−1, 1]",
            )
        self.wrong("scores", (scores["n"] < 0) | (scores["failures"] < 0), "with a negative n or failures")

    def _directions(self) -> None:
        path = self.folder / DIRECTIONS
        if not path.exists():
            return
        try:
            sae = assemble(from_cfg(self.info["sae"], CATALOG), read_tensors(path), DIRECTIONS)
        except SaekitError as error:
            self.found.append(str(error).removeprefix(f"{self.folder}/"))
            return
        norms = sae.directions().float().norm(dim=1).cpu().numpy()
        here = self.columns["features"]["decoder_norm"]
        self.wrong(
            "features",
            ~np.isclose(norms, here, rtol=CLOSE, atol=1e-6),
            f"whose decoder_norm is not that of {DIRECTIONS}",
        )

    def _ranked(
        self, name: str, group: tuple[str, ...], falling: str | None = None, where: Bools | None = None
    ) -> None:
        """In each group ranks are 0, 1, 2 … in the order of the rows, and where asked a figure falls with them."""
        t = self.columns[name]
        order = np.lexsort(tuple(t[column] for column in reversed(group)))  # stable: as they lie in the file
        new = np.zeros(len(order), bool)
        new[:1] = True
        for column in group:
            new[1:] |= np.diff(t[column][order].astype(np.int64)) != 0
        starts = np.flatnonzero(new)
        expected = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        self.wrong(name, np.sort(order[t["rank"][order] != expected]), "whose ranks are not 0, 1, 2 …")
        if falling is not None:
            rises = ~new[1:] & (np.diff(t[falling][order]) > 0)
            if where is not None:
                rises &= where[order][1:]
            self.wrong(name, np.sort(order[1:][rises]), f"out of order: highest {falling} first")


def _context_key(columns: dict[str, Any]) -> Ints:
    feature, band, rank = (columns[name].astype(np.int64) for name in ("feature", "band", "rank"))
    return (feature << 24) + ((band & 0xFF) << 16) + (rank & 0xFFFF)


def _again(*keys: Any) -> Ints:
    """The rows, in order, whose keys an earlier one has."""
    order = np.lexsort(keys[::-1])
    same = np.ones(max(0, len(order) - 1), bool)
    for key in keys:
        sorted_key = key[order]
        same &= sorted_key[1:] == sorted_key[:-1]
    return np.sort(order[1:][same])


def _values(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else column.to_pylist()


def _some(values: Any) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (" …" if len(values) > SHOWN else "")


def _kind(kind: Any) -> str:
    names = {str: "text", int: "whole number", dict: "object", list: "list", (int, float): "number"}
    return names[kind]
