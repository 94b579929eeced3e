"""The page's records say what the catalog says, stretch by stretch."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import saekit
from saekit import embedded
from saekit.catalog import Catalog
from saekit.catalog.feature import Context
from saekit.catalog.page.records import ALPHABET, AROUND, Records, how_scored, packed, short
from saekit.catalog.said import Score
from saekit.catalog.tables import write_table

if TYPE_CHECKING:
    from pathlib import Path

    from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def tiny() -> Catalog:
    return Catalog.open(embedded.folder("catalog"))


@pytest.fixture(scope="module")
def neurons(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Of an SAE over the neurons of an MLP."""
    site = "blocks.1.mlp.hook_post"
    d_in = saekit.sites.site_width(model, site)
    sae = saekit.SAE.new("topk", d_in=d_in, d_sae=24, k=4, site=site, model="tiny")
    lines = [f"The small boat number {i} sailed past the harbour with a red lamp." for i in range(12)]
    folder = tmp_path_factory.mktemp("neurons") / "catalog"
    return Catalog.build(model, sae, saekit.tokenize(lines, model, 32), folder)


def unpacked(letters: str, width: int) -> list[int]:
    """As data.js reads them."""
    numbers = []
    for i in range(0, len(letters), width):
        number = 0
        for letter in letters[i : i + width]:
            number = number * len(ALPHABET) + ALPHABET.index(letter)
        numbers.append(number)
    return numbers


def check_context(stretch: dict[str, Any], written: list[Any], context: Context, around: int | None) -> None:
    document, peak, sink, letters, offsets, activations = written
    tokens = [stretch["tokens"][i] for i in unpacked(letters, stretch["width"])]
    at = context.peak - peak  # where the shown part begins
    n = len(context.tokens) if around is None else min(around, len(context.tokens))
    assert tokens == context.tokens[at : at + n]
    assert len(tokens) == n
    assert around is None or peak == around * 5 // 8 or at == 0 or at + n == len(context.tokens)
    assert (document, bool(sink)) == (context.document, context.sink)
    own = context.activations[at : at + n]
    assert offsets == [i for i, a in enumerate(own) if a]
    assert activations == pytest.approx([a for a in own if a], rel=5e-3)
    assert dict(zip(offsets, activations, strict=True))[peak] == pytest.approx(
        context.max_activation, rel=5e-3
    )


def check(catalog: Catalog, start: int, end: int) -> None:
    stretch = Records(catalog).stretch(start, end)
    assert len(stretch["features"]) == end - start
    for record, index in zip(stretch["features"], range(start, end), strict=True):
        feature = catalog[index]
        assert record["mean"] == pytest.approx(feature.mean_activation, rel=5e-3)
        for written, context in zip(record["contexts"], feature.contexts, strict=True):
            check_context(stretch, written, context, None)
        for (low, high, share, contexts), band in zip(record["bands"], feature.bands, strict=True):
            assert (low, high, share) == pytest.approx((band.low, band.high, band.share), rel=5e-3, abs=1e-9)
            for written, context in zip(contexts, band.contexts, strict=True):
                check_context(stretch, written, context, AROUND)
        tables: tuple[tuple[str, list[Any]], ...] = (
            ("histogram", feature.histogram),
            ("tokens", feature.top_tokens),
            ("raised", feature.logits_top),
            ("lowered", feature.logits_bottom),
            ("neighbours", feature.neighbours),
            ("coactive", feature.coactive),
            ("neurons", feature.neurons),
        )
        for name, rows in tables:
            assert len(record[name]) == len(rows), name
            for written, row in zip(record[name], rows, strict=True):
                first, *rest = astuple(row)
                assert written[0] == (pytest.approx(first, rel=5e-3) if name == "histogram" else first)
                assert list(written[1:]) == pytest.approx(rest, rel=5e-3), name
        if feature.effects:
            low, high, counts = record["effects"]
            edges = np.linspace(feature.effects[0].low, feature.effects[-1].high, 41)
            places = [int(np.abs(edges - b.low).argmin()) for b in feature.effects]
            assert [(i, n) for i, n in enumerate(counts) if n] == [
                (i, b.count) for i, b in zip(places, feature.effects, strict=True)
            ]
            assert (low, high) == pytest.approx((feature.effects[0].low, feature.effects[-1].high), rel=5e-3)
            assert len(counts) == 40
        else:
            assert record["effects"] == []
        assert [row[:2] for row in record["explanations"]] == [
            [e.method, e.text] for e in feature.explanations
        ]
        for (*_, score, how), e in zip(record["explanations"], feature.explanations, strict=True):
            assert score == (None if e.score is None else pytest.approx(e.score, abs=5e-3))
            assert how == how_scored(e.scores)
            assert (how == "") == (e.score is None)


@pytest.mark.parametrize("start", [0, 2189, 4092])
def test_records_of_the_embedded_catalog(tiny: Catalog, start: int) -> None:
    check(tiny, start, min(start + 4, len(tiny)))


def test_a_feature_that_never_fired(tiny: Catalog) -> None:
    dead = int(np.flatnonzero(tiny.density == 0)[0])
    (record,) = Records(tiny).stretch(dead, dead + 1)["features"]
    assert record["contexts"] == record["bands"] == record["histogram"] == record["tokens"] == []
    assert record["raised"]
    check(tiny, dead, dead + 1)


def test_neurons(neurons: Catalog) -> None:
    check(neurons, 0, len(neurons))
    assert all(len(record["neurons"]) == 5 for record in Records(neurons).stretch(0, 24)["features"])


def test_order_within_a_feature_is_no_matter(neurons: Catalog, tmp_path: Path) -> None:
    """Tables are sorted by feature alone, as far as anybody promises."""
    shuffled = tmp_path / "catalog"
    shutil.copytree(neurons.path, shuffled)
    for name in ("histograms", "neighbours", "contexts", "activations"):
        table = neurons.table(name).to_pydict()
        feature, order = (
            np.array(table["feature"]),
            np.random.default_rng(0).permutation(len(table["feature"])),
        )
        order = order[np.argsort(feature[order], kind="stable")]
        write_table(shuffled, name, {column: [values[i] for i in order] for column, values in table.items()})
    there, here = Records(Catalog.open(shuffled)).stretch(3, 9), Records(neurons).stretch(3, 9)
    for one, other in zip(there["features"], here["features"], strict=True):
        for name in ("histogram", "neighbours", "coactive"):
            assert sorted(one[name]) == sorted(other[name])
        texts = [
            sorted(
                ([stretch["tokens"][i] for i in unpacked(c[3], stretch["width"])], *c[4:])
                for c in record["contexts"]
            )
            for stretch, record in ((there, one), (here, other))
        ]
        assert texts[0] == texts[1]


def test_short_numbers_are_what_a_person_would_write() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=2000) * 10.0 ** random.integers(-12, 12, 2000)
    x = np.concatenate([x, [0.0, 1.0, 999.6, 0.09996, 1e-12, 0.3]])
    assert short(x) == [float(f"{value:.3g}") for value in x]
    assert short([np.nan, 1.0, np.inf]) == [None, 1.0, None]
    assert short([[1.2345, 2.0], [3.0, 4.0]]) == [[1.23, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("n", [1, len(ALPHABET), len(ALPHABET) + 1, 20_000])
def test_packed_numbers_come_back(n: int) -> None:
    places = np.array([0, n - 1, n // 2, min(7, n - 1)])
    letters, width = packed(places, n)
    assert unpacked(letters, width) == places.tolist()
    assert len(letters) == 4 * width
    assert not set(letters) & set("\"'\\<")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([], ""),
        ([Score("pearson", "", "", None, None, 8, 0)], ""),
        ([Score("detection_f1", "m", "h", 0.9, None, 8, 0)], ""),  # no scale of its own
        (
            [Score("auc", "", "", 0.99, 0.5, 4, 0), Score("pearson", "", "", 0.874, -0.01, 4, 0)],
            "predicts the activations in 4 texts it was not made from: correlation 0.87; another feature's words reach −0.01",
        ),
        (
            [Score("fuzzing", "judge-1", "h", 0.7, None, 1, 0), Score("detection", "judge-1", "h", 0.85, 0.5, 1200, 3)],
            "judge-1 told from these words alone in which of 1,200 texts it fires, 3 without an answer: balanced accuracy "
            "0.85 (chance: 0.50); another feature's words reach 0.50",
        ),
        (
            [Score("simulation", "", "h", 0.5, None, 1, 0)],
            "a model guessed the activations in 1 text from these words alone: correlation 0.50",
        ),
        (
            [Score("fuzzing_auc", "j", "h", 0.5, None, 2, 0)],
            "j told from these words alone whether 2 texts have the tokens marked that it fires on: area under the ROC "
            "curve 0.50 (chance: 0.50)",
        ),
    ],
)  # fmt: skip
def test_how_a_score_came_about(scores: list[Score], words: str) -> None:
    assert how_scored(scores) == words
