"""The checker: a sound catalog passes, and each kind of damage is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalog.brute import Options, made

from saekit.catalog.check import check
from saekit.catalog.tables import SCHEMAS, read_table, write_table
from saekit.errors import FileMissing
from saekit.files import sha256_of_file, write_json

Columns = dict[str, Any]
Change = Callable[[Columns], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made(
        tmp_path_factory.mktemp("check") / "made", options=Options(contexts=5, per_band=2, sample_rows=20)
    )
    said = {
        "feature": [0, 0, 3],
        "method": ["tokens", "llm", "llm"],
        "model": ["", "m", "m"],
        "prompt": ["", "p", "p"],
    }
    write_table(folder, "explanations", {**said, "text": ["the", "words", "words"]})
    scored = {name: [x for x in values for _ in range(2)] for name, values in said.items()}
    judged = {"scorer": ["pearson", "auc"] * 3, "judge": [""] * 6, "judge_prompt": [""] * 6}
    figures = {"score": [0.5, None, -0.2] * 2, "control": [None] * 6, "n": [40] * 6, "failures": [0] * 6}
    write_table(folder, "scores", {**scored, **judged, **figures})
    columns = {"feature": [0, 0, 1], "rank": [0, 1, 0], "neuron": [5, 2, 2], "cosine": [-0.9, 0.5, 0.1]}
    write_table(folder, "neurons", columns)
    reseal(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "copy")


def reseal(folder: Path) -> None:
    """Checksums of what is there now: what is wrong then is wrong in itself."""
    info = json.loads((folder / "catalog.json").read_text())
    info["files"] = {
        name: sha256_of_file(folder / name) for name in info["files"] if (folder / name).exists()
    }
    write_json(folder / "catalog.json", info)


def describe(folder: Path, change: Change) -> None:
    info = json.loads((folder / "catalog.json").read_text())
    change(info)
    write_json(folder / "catalog.json", info)


def rewrite(folder: Path, name: str, change: Change) -> None:
    columns = {key: np.array(values) if SCHEMAS[name].field(key).type != pa.string() else values
               for key, values in read_table(folder, name).to_pydict().items()}  # fmt: skip
    change(columns)
    write_table(folder, name, columns)
    reseal(folder)


def put(column: str, value: Any, where: Any = 0) -> Change:
    """Set a column's value: in row `where`, or in the first row in which the function `where` of the columns is true."""

    def change(columns: Columns) -> None:
        row = int(np.flatnonzero(where(columns))[0]) if callable(where) else where
        columns[column][row] = value(columns, row) if callable(value) else value

    return change


def also(*changes: Change) -> Change:
    def change(columns: Columns) -> None:
        for one in changes:
            one(columns)

    return change


def repeat(row: int = 0) -> Change:
    """Put a row there twice."""

    def change(columns: Columns) -> None:
        for name, values in columns.items():
            columns[name] = (
                np.insert(values, row, values[row])
                if isinstance(values, np.ndarray)
                else [*values[:row], values[row], *values[row:]]
            )

    return change


def without(where: Callable[[Columns], Any]) -> Change:
    """Take all rows out in which the function is true."""

    def change(columns: Columns) -> None:
        kept = np.flatnonzero(~where(columns))
        for name, values in columns.items():
            columns[name] = values[kept] if isinstance(values, np.ndarray) else [values[i] for i in kept]

    return change


def first(where: Callable[[Columns], Any]) -> Callable[[Columns], Any]:
    """The first row in which the function is true, alone."""
    return lambda columns: np.arange(len(columns["feature"])) == np.flatnonzero(where(columns))[0]


def swap(*names: str, rows: tuple[int, int] = (0, 1)) -> Change:
    def change(columns: Columns) -> None:
        a, b = rows
        for name in names or columns:
            columns[name][a], columns[name][b] = columns[name][b], columns[name][a]

    return change


def test_a_sound_catalog_has_nothing_to_say(sound: Path) -> None:
    assert check(sound) == []
    assert check(str(sound)) == []


def test_a_card_and_hidden_files_belong(folder: Path) -> None:
    (folder / "README.md").write_text("# a catalog")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    assert check(folder) == []


def top(t: Columns) -> Any:
    return t["band"] == 0


def at_peak(t: Columns) -> Any:
    """Of feature 0, the strongest activation of all."""
    return (t["feature"] == 0) & (t["activation"] == t["activation"][t["feature"] == 0].max())


def beside(t: Columns) -> Any:
    """Of feature 0, the activations in windows of rank 1 and up that are not the strongest of their window."""
    strongest = {
        rank: t["activation"][(t["feature"] == 0) & top(t) & (t["rank"] == rank)].max(initial=0)
        for rank in range(5)
    }
    below = t["activation"] < [strongest[min(rank, 4)] for rank in t["rank"]]
    return (t["feature"] == 0) & top(t) & (t["rank"] > 0) & below


DAMAGE: list[tuple[str, Change, str]] = [
    ("features", swap(), "sorted by feature"),
    ("features", repeat(3), "expected one row for each of the features 0 … 23"),
    ("features", put("feature", 99, 23), "features.parquet: 1 row of a feature outside 0 … 23"),
    ("features", put("density", np.nan, 2), "a density that is no finite number .first: feature 2, row 2"),
    ("features", put("density", -0.1), "density outside"),
    ("features", put("density", lambda t, i: t["density"][i] * 1.01), "density · tokens is not the count"),
    ("features", put("count", -1), "count outside 0 …"),
    ("features", put("max_activation", 0.0), "count and max_activation disagree"),
    ("features", put("mean_activation", 1e3), "mean_activation is above the maximum"),
    ("features", put("mean_activation", 0.0), "count and mean_activation disagree"),
    ("features", put("std_activation", -1.0), "negative std"),
    ("features", put("decoder_norm", -1.0), "negative decoder_norm"),
    ("features", put("decoder_norm", lambda t, i: 1.1 * t["decoder_norm"][i]), "decoder_norm is not that of directions"),
    ("features", put("encoder_cosine", -1.5), "encoder_cosine outside"),
    ("features", put("count", 1, 0), "features.parquet: 1 row that fire in the sample more often than at all"),
    ("vocabulary", swap("token_id"), "token_id is not its place"),
    ("corpus", put("token_id", 21), "corpus.parquet: 1 row with a token_id that the vocabulary of 21 lacks"),
    ("corpus", swap("position"), "rows 0, 1, …"),
    ("corpus", put("row", 7, 0), "rows 0, 1, …"),
    ("contexts", swap("feature", rows=(0, 50)), "contexts.parquet: .* sorted by feature"),
    ("contexts", put("band", 6, 0), "band outside 0 … 5"),
    ("contexts", put("band", -1, 0), "band outside 0 … 5"),
    ("contexts", put("rank", 9, 1), "ranks are not 0, 1, 2"),
    ("contexts", swap("max_activation"), "out of order: highest max_activation first"),
    ("contexts", put("document", lambda t, i: t["document"][i - 1], 1), "of a document that the band has already"),
    ("contexts", put("document", 999, 1), "leaves its document"),
    ("contexts", put("max_activation", 0.0, lambda t: t["rank"] == 1), "peak that does not fire"),
    ("contexts", put("max_activation", 99.0, 0), "peak above the feature's max_activation"),
    ("contexts", put("max_activation", lambda t, i: t["max_activation"][i] * 0.99, 0), "not the feature's maximum"),
    ("contexts", put("norm", -1.0), "negative norm"),
    ("contexts", put("max_activation", lambda t, i: 0.01, lambda t: t["band"] == 5), "lies in another band"),
    ("contexts", put("row", 40), "of a row that the corpus lacks"),
    ("contexts", put("row", -1), "of a row that the corpus lacks"),
    ("contexts", put("start", -1), "window leaves its row"),
    ("contexts", put("length", 60), "window leaves its row"),
    ("contexts", put("length", 0), "window leaves its row"),
    ("contexts", put("peak", lambda t, i: t["length"][i]), "outside of its window"),
    ("contexts", put("peak", -1), "outside of its window"),
    ("contexts", also(put("start", 0, 0), put("length", 2, 0), put("peak", 1, 0)), "holds an excluded token"),
    ("contexts", put("peak", lambda t, i: (t["peak"][i] + 1) % t["length"][i]), "is not the activation at the peak"),
    ("contexts", without(first(top)), "contexts.parquet: .* ranks are not 0, 1, 2"),
    ("activations", without(first(at_peak)), "contexts.parquet: 1 row whose max_activation is not the activation at the peak"),
    ("activations", put("band", 9, 0), "of a context that contexts.parquet lacks"),
    ("contexts", without(lambda t: (t["feature"] == 0) & (t["band"] == 0)), "features.parquet: 1 row that fired without a context"),
    ("activations", put("activation", 12.0, beside), "contexts.parquet: 1 row whose peak is not the maximum of its window"),
    ("activations", put("rank", 30, 0), "of a context that contexts.parquet lacks"),
    ("activations", put("offset", 60, 0), "outside of their context's window"),
    ("activations", put("offset", -1, 0), "outside of their context's window"),
    ("activations", put("activation", -1.0, 0), "not above 0"),
    ("activations", put("activation", np.inf, 0), "no finite number"),
    ("activations", put("activation", 99.0, 0), "above the feature's max_activation"),
    ("activations", repeat(), "of a token that has one already"),
    ("sample", put("activation", 0.0), "sample.parquet: 1 row that are not above 0"),
    ("sample", put("activation", 99.0), "above the feature's max_activation"),
    ("sample", put("row", lambda t, i: next(r for r in range(99) if r not in t["row"])), "sample.rows .* does not name"),
    ("sample", put("position", 24), "outside of their row"),
    ("sample", put("position", 0), "on an excluded token"),
    ("sample", swap("position", "row", "activation"), "sorted by feature, row and position"),
    ("sample", repeat(), "sorted by feature, row and position"),
    ("tokens", put("token_id", 21), "tokens.parquet: 1 row with a token_id"),
    ("tokens", swap("mean_activation", "count", "share"), "highest mean_activation first"),
    ("tokens", put("rank", 1), "tokens.parquet: .* ranks are not"),
    ("tokens", put("token_id", lambda t, i: t["token_id"][0], 1), "tokens.parquet: 1 row of a token"),
    ("tokens", put("count", 1), "count outside 2 … the feature's"),
    ("tokens", put("mean_activation", 99.0), "mean_activation outside"),
    ("tokens", put("share", 1.5), r"share outside \[0, 1\]"),
    ("tokens", put("share", lambda t, i: t["share"][i] * 0.98), "share is not count · mean"),
    ("evidence", put("token_id", -1), "evidence.parquet: 1 row with a token_id"),
    ("evidence", put("token_id", lambda t, i: t["token_id"][0], 1), "evidence.parquet: 1 row of a token that the feature has"),
    ("evidence", put("count", 0), "count outside 1 … the feature's"),
    ("evidence", put("expected", 0.0), "expected activation outside"),
    ("evidence", swap("rank", rows=(0, 1)), "evidence.parquet: .* ranks are not"),
    ("evidence", put("rank", 5, 0), "evidence.parquet: .* ranks are not"),
    ("logits", put("token_id", 21), "logits.parquet: 1 row with a token_id"),
    ("logits", put("effect", np.nan), "effect that is no finite number"),
    ("logits", put("effect", 99.0, 1), "highest effect in its direction first"),
    ("logits", put("effect", -99.0, 6), "highest effect in its direction first"),
    ("logits", put("token_id", lambda t, i: t["token_id"][0], 1), "logits.parquet: 1 row of a token"),
    ("histograms", put("of", "colour"), "something else than activation and effect"),
    ("histograms", put("count", -1), "negative count"),
    ("histograms", put("count", 500, lambda t: np.array(t["of"]) == "activation"), "does not add up to the count"),
    ("histograms", put("count", 500, lambda t: np.array(t["of"]) == "effect"), "those of effects count 21, 5"),
    ("histograms", put("low", 1e9), "low is above their high"),
    ("neighbours", put("neighbour", 24), "neighbour outside 0 … 23"),
    ("neighbours", put("neighbour", 0), "name the feature itself"),
    ("neighbours", put("by", "smell"), "something else than decoder and firing"),
    ("neighbours", put("similarity", 1.5), "similarity that none can be"),
    ("neighbours", put("similarity", -0.5, lambda t: np.array(t["by"]) == "firing"), "similarity that none can be"),
    ("neighbours", swap("similarity"), "highest similarity first"),
    ("neighbours", put("neighbour", lambda t, i: t["neighbour"][0], 1), "of a neighbour that the feature has already"),
    ("neurons", put("neuron", -1), "negative neuron"),
    ("neurons", put("cosine", -1.5), "neurons.parquet: 1 row with a cosine"),
    ("neurons", put("cosine", 0.4), r"highest \|cosine\| first"),
    ("neurons", put("neuron", 5, 1), "of a neuron that the feature has already"),
    ("explanations", repeat(), "explanations.parquet: 1 row with the key of another"),
    ("scores", repeat(), "scores.parquet: 1 row with the key of another"),
    ("scores", put("model", "another"), "of an explanation that explanations.parquet lacks"),
    ("scores", put("score", 1.5), r"score outside \[−1, 1\]"),
    ("scores", put("control", 2.0), r"control outside \[−1, 1\]"),
    ("scores", put("n", -1), "negative n or failures"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"), DAMAGE, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(DAMAGE)]
)
def test_damage_is_named(folder: Path, name: str, change: Change, message: str) -> None:
    rewrite(folder, name, change)
    found = check(folder)
    assert any(re.search(message, line) for line in found), found
    assert all("\n" not in line and len(line) < 300 for line in found)


def test_contexts_agree_with_the_sample(folder: Path) -> None:
    """A value that only the sample can tell to be wrong: beside a peak, on a sampled row."""
    rows = json.loads((folder / "catalog.json").read_text())["sample"]["rows"]
    contexts = read_table(folder, "contexts").to_pandas()
    drawn = contexts[contexts["row"].isin(rows)].set_index(["feature", "band", "rank"])
    fired = read_table(folder, "activations").to_pandas()
    beside = [
        i for i, row in fired.iterrows()
        if (key := (row["feature"], row["band"], row["rank"])) in drawn.index and drawn.loc[key, "peak"] != row["offset"]
    ]  # fmt: skip
    assert beside
    rewrite(folder, "activations", put("activation", lambda t, i: t["activation"][i] * 0.9, beside[0]))
    assert [line.partition(" (first")[0] for line in check(folder)] == [
        "activations.parquet: 1 row that the sample of the same row has otherwise"
    ]
    rewrite(folder, "activations", without(lambda t: np.arange(len(t["offset"])) == beside[0]))
    assert [line.partition(" (first")[0] for line in check(folder)] == [
        "contexts.parquet: 1 row that leave out activations which the sample of the same row has"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=1), "catalog.json: schema 1; this saekit reads 2"),
        (lambda d: d.pop("site"), "site is 'None', which is no text"),
        (lambda d: d["corpus"].update(tokens="many"), "corpus.tokens is 'many', which is no whole number"),
        (lambda d: d["sae"].update(d_sae="wide"), "sae.d_sae is 'wide'"),
        (lambda d: d["sae"].update(d_sae=23), "of a feature outside 0 … 22"),
        (lambda d: d.update(median_norm=0), "median_norm is 0"),
        (lambda d: d["excluded"].update(x="y"), "whole numbers"),
        (lambda d: d["sample"].update(rows=[3, 2]), "sample.rows has to name rows of the corpus, 0 … 39, ascending"),
        (lambda d: d["sample"].update(rows=[3, 40]), "sample.rows has to name rows"),
        (lambda d: d["corpus"].update(context_size=9), "a row of 24 tokens; corpus.context_size is 9"),
        (lambda d: d["corpus"].update(tokens=d["corpus"]["tokens"] * 2), "density · tokens is not the count"),
        (lambda d: d["contexts"].update(per_feature=2), "beyond the 2 of a feature"),
        (lambda d: d["contexts"].update(per_band=1), "beyond the 1 of a band"),
        (lambda d: d["contexts"].update(window=4), "longer than the window of 4"),
        (lambda d: d["contexts"].update(bands=4), "band outside 0 … 4"),
        (lambda d: d["files"].pop("tokens.parquet"), "files has no checksum of tokens.parquet"),
        (lambda d: d["files"].update({"scores.parquet": "0"}), "files has a checksum of scores.parquet"),
        (lambda d: d["files"].update({"tokens.parquet": "0" * 64}), "tokens.parquet: not what was built"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_named(folder: Path, change: Change, message: str) -> None:
    describe(folder, change)
    assert any(message in line for line in check(folder)), check(folder)


def test_files(folder: Path) -> None:
    (folder / "logits.parquet").unlink()
    (folder / "thoughts.txt").write_text("mine")
    (folder / "tokens.parquet").write_bytes(b"PAR1 nothing")
    pq.write_table(pa.table({"feature": [1]}), folder / "evidence.parquet")
    features = read_table(folder, "features").to_pydict()
    pq.write_table(pa.table({**features, "count": [None, *features["count"][1:]]}, SCHEMAS["features"]), folder / "features.parquet")  # fmt: skip
    data = bytearray((folder / "directions.safetensors").read_bytes())
    (folder / "directions.safetensors").write_bytes(data[:-8])
    reseal(folder)
    found = check(folder)
    for line in (
        "logits.parquet: missing",
        "catalog.json: files has no checksum of logits.parquet",
        "thoughts.txt: no file of a catalog",
        "features.parquet: empty values in count",
    ):
        assert line in found
    assert any(line.startswith("tokens.parquet: not a readable Parquet file") for line in found)
    assert any(line.startswith("evidence.parquet: expected columns feature, rank") for line in found)


def test_broken_directions(folder: Path) -> None:
    data = bytearray((folder / "directions.safetensors").read_bytes())
    (folder / "directions.safetensors").write_bytes(data[:-8])
    reseal(folder)
    assert len(check(folder)) == 1
    assert check(folder)[0].startswith("directions.safetensors: not a readable")


def test_what_is_no_catalog(tmp_path: Path) -> None:
    with pytest.raises(FileMissing):
        check(tmp_path / "none")
    [found] = check(tmp_path)
    assert "does not exist" in found
    (tmp_path / "catalog.json").write_text("{")
    [found] = check(tmp_path)
    assert "not valid JSON" in found


def test_an_empty_catalog_is_sound(tmp_path: Path, sound: Path) -> None:
    """Nothing fired, nothing was sampled: every table but features, vocabulary and those of the weights is empty."""
    folder = shutil.copytree(sound, tmp_path / "copy")
    keep = ("features", "vocabulary", "neighbours", "logits", "histograms", "neurons")
    for name, schema in SCHEMAS.items():
        if name not in keep:
            write_table(folder, name, {column: [] for column in schema.names})
    features = read_table(folder, "features").to_pydict()
    for name in ("density", "count", "max_activation", "mean_activation", "std_activation"):
        features[name] = [0] * len(features[name])
    write_table(folder, "features", features)
    effects = read_table(folder, "histograms").to_pandas().query("of == 'effect'")
    write_table(folder, "histograms", {name: effects[name].tolist() for name in effects})
    describe(folder, lambda info: info["sample"].update(rows=[]))
    reseal(folder)
    assert check(folder) == []
