from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog.brute import made, made_up
from conftest import sentences

import saekit
from saekit.catalog import Catalog
from saekit.catalog.effects import logit_effects
from saekit.catalog.feature import shares
from saekit.catalog.tables import SCHEMAS, write_table
from saekit.errors import FileMissing, InvalidInput, UnknownFeature, UnknownName
from saekit.sae import SAE
from saekit.tokens import tokenize


@pytest.fixture(scope="module")
def catalog(model, tmp_path_factory) -> Catalog:
    sae = SAE.new("topk", d_in=256, d_sae=64, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    return Catalog.build(model, sae, tokenize(sentences(40), model, 64), tmp_path_factory.mktemp("c") / "c")


@pytest.fixture(scope="module")
def brute(tmp_path_factory) -> Catalog:
    """Made-up features: everything that fired is in `made_up()`."""
    return Catalog.open(made(tmp_path_factory.mktemp("brute") / "made"))


@pytest.fixture
def copy(catalog, tmp_path):
    return shutil.copytree(catalog.path, tmp_path / "copy")


def test_opening_needs_no_model_and_gives_everything(catalog) -> None:
    again = Catalog.open(catalog.path)
    assert len(again) == 64
    assert "64 features of tiny at blocks.3.hook_resid_pre" in repr(again)
    feature = next(f for f in again if f.contexts)
    assert feature.direction.shape == (256,)
    assert torch.equal(feature.direction, catalog.sae.direction(feature.index))
    assert feature.explanation
    assert feature.top_tokens[0].count >= 2
    assert str(feature).startswith(f"feature {feature.index}: ")
    assert [f.index for f in again] == list(range(64))


@pytest.mark.parametrize("index", [-1, 64, 10**9, 1.0, "3", True, None])
def test_unknown_features(catalog, index) -> None:
    with pytest.raises(UnknownFeature, match="0 … 63"):
        catalog[index]


def of_feature(catalog: Catalog, table: str, index: int) -> list[dict]:
    return [row for row in catalog.table(table).to_pylist() if row["feature"] == index]


@pytest.fixture(scope="module")
def full(brute, tmp_path_factory) -> Catalog:
    """With rows in every table: `datasets` opens no empty one."""
    folder = shutil.copytree(brute.path, tmp_path_factory.mktemp("full") / "full")
    said = {"feature": [2, 2], "method": ["tokens", "llm"], "model": ["", "m"], "prompt": ["", "p"]}
    write_table(folder, "explanations", {**said, "text": ["Jedi", "words about «Jedi»"]})
    judged = {
        "scorer": ["pearson", "detection"],
        "judge": ["", "j"],
        "judge_prompt": ["", "q"],
        "score": [0.5, None],
    }
    write_table(folder, "scores", {**said, **judged, "control": [None, 0.5], "n": [9, 9], "failures": [0, 9]})
    write_table(
        folder, "neurons", {"feature": [2, 2], "rank": [0, 1], "neuron": [7, 1], "cosine": [-0.5, 0.25]}
    )
    return Catalog.open(folder)


@pytest.mark.parametrize("name", SCHEMAS)
def test_tables_open_where_they_lie(full, name) -> None:
    """With DuckDB, pandas, polars and datasets, with the columns and rows that they have here."""
    import datasets
    import duckdb
    import pandas as pd
    import polars as pl

    path, table = str(full.path / f"{name}.parquet"), full.table(name)
    columns = SCHEMAS[name].names
    rows = [tuple(row.values()) for row in table.to_pylist()]
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT * FROM '{path}'")
        assert [column[0] for column in found.description] == columns
        assert found.fetchall() == rows
    assert pd.read_parquet(path).shape == (len(rows), len(columns)) > (0, 0)
    assert pl.read_parquet(path).rows() == rows
    opened = datasets.Dataset.from_parquet(path, keep_in_memory=True)
    assert opened.column_names == columns
    assert [tuple(row.values()) for row in opened] == rows


def test_tables_join(brute) -> None:
    """What a reader would ask in SQL: the strongest token of each feature, by name."""
    import duckdb

    with duckdb.connect() as connection:
        rows = connection.execute(f"""
            SELECT feature, token FROM '{brute.path}/tokens.parquet' JOIN '{brute.path}/vocabulary.parquet' USING (token_id)
            WHERE rank = 0 ORDER BY feature
        """).fetchall()
    assert rows == [(f.index, f.top_tokens[0].token) for f in brute if f.top_tokens]


def test_an_unknown_table(catalog) -> None:
    with pytest.raises(InvalidInput, match="'nope' is not one of features"):
        catalog.table("nope")


def test_contexts_and_bands_are_what_fired(brute) -> None:
    """Their tokens and activations stand somewhere in what the pass saw, and each band keeps to its part of the range."""
    seen = made_up()
    names = brute.vocabulary
    sinks = 0
    for feature in brute:
        for band in [None, *feature.bands]:
            contexts = feature.contexts if band is None else band.contexts
            assert len({c.document for c in contexts}) == len(contexts)
            for context in contexts:
                assert [names[i] for i in context.token_ids] == context.tokens
                n = len(context.tokens)
                rows = np.flatnonzero(seen.documents[:, 0] == context.document)
                assert any(
                    seen.ids[row, t : t + n].tolist() == context.token_ids
                    and seen.f[row, t : t + n, feature.index].tolist() == context.activations
                    and context.norm == pytest.approx(seen.norms[row, t + context.peak] / brute.median_norm)
                    for row in rows
                    for t in range(seen.ids.shape[1] - n + 1)
                )
                assert context.sink == (context.norm > 10)
                sinks += context.sink
                if band is not None:
                    assert band.low < context.max_activation <= band.high * (1 + 1e-6)
        if feature.contexts:
            assert feature.contexts[0].max_activation == feature.max_activation
            assert [b.high for b in feature.bands][-1] == feature.max_activation
    assert sinks
    silent = brute[len(brute) - 1]
    assert silent.contexts == silent.bands == silent.histogram == silent.top_tokens == []


def test_shares_of_bands_are_near_the_true_ones(brute) -> None:
    f = made_up().f
    for feature in brute:
        if not feature.bands:
            continue
        fired = f[..., feature.index][f[..., feature.index] > 0]
        true = np.histogram(fired, np.linspace(0, feature.max_activation, 6))[0] / len(fired)
        assert sum(b.share for b in feature.bands) == pytest.approx(1)
        assert [b.share for b in feature.bands] == pytest.approx(true.tolist(), abs=0.1)


def test_shares_by_hand() -> None:
    def of(n: int, *features: tuple[float, list[tuple[float, float, int]]]) -> list[list[float]]:
        columns = np.array([bar for _, bars in features for bar in bars], float).reshape(-1, 3).T
        tops = np.array([top for top, _ in features])
        return shares(*columns, np.array([len(bars) for _, bars in features]), tops, n).tolist()

    bars = [(0.5, 1.0, 6), (1.0, 4.0, 4)]  # the last one ends at the maximum, 2
    assert of(1, (2.0, bars)) == [[1.0]]
    found = of(
        2,
        (2.0, bars),
        (0.0, []),  # never fired
        (4.0, [(1.0, 4.0, 8)]),  # 2 is the middle of it in log activation
        (1.0, [(1.0, 2.0, 3)]),  # a maximum on the bar's edge
        (0.0, []),
    )
    assert [found[0], found[2], found[3]] == [pytest.approx(x) for x in ([0.6, 0.4], [0.5, 0.5], [0, 1])]
    assert np.isnan([found[1], found[4]]).all()
    assert np.isnan(of(2, (0.0, []))).all()


@pytest.mark.parametrize("index", [0, 11, 22, 23])
def test_records_are_the_rows_of_the_tables(brute, catalog, index) -> None:
    for source in (brute, catalog):
        feature = source[index]
        near = of_feature(source, "neighbours", index)
        for by, found in (("decoder", feature.neighbours), ("firing", feature.coactive)):
            rows = [(r["neighbour"], r["similarity"]) for r in near if r["by"] == by]
            assert [(n.feature, n.similarity) for n in found] == rows
        bins = of_feature(source, "histograms", index)
        for of, found in (("activation", feature.histogram), ("effect", feature.effects)):
            rows = [(r["low"], r["high"], r["count"]) for r in bins if r["of"] == of]
            assert [(b.low, b.high, b.count) for b in found] == rows
        assert feature.neurons == []
        logits = of_feature(source, "logits", index)
        for raised, found in ((True, feature.logits_top), (False, feature.logits_bottom)):
            rows = [(source.token(r["token_id"]), r["effect"]) for r in logits if r["raised"] == raised]
            assert [(e.token, e.effect) for e in found] == rows


def test_neurons(full) -> None:
    assert [(n.neuron, n.cosine) for n in full[2].neurons] == [(7, -0.5), (1, 0.25)]
    assert "neurons  7 (-0.50), 1 (+0.25)" in full[2].summary()


def test_a_transcoders_feature_acts_where_it_writes(copy) -> None:
    plain = Catalog.open(copy)[1].add(1.0, unit="norm")
    assert (plain.site, plain.norm) == ("blocks.3.hook_resid_pre", Catalog.open(copy).median_norm)
    info = json.loads((copy / "catalog.json").read_text())
    info["target_site"] = "blocks.3.hook_mlp_out"
    (copy / "catalog.json").write_text(json.dumps(info))
    edit = Catalog.open(copy)[1].add(1.0, unit="norm")
    assert edit.site == "blocks.3.hook_mlp_out"
    assert edit.norm is None  # the one that is known is of the site that is read


def test_nearest(brute) -> None:
    rows = torch.nn.functional.normalize(brute.sae.directions().double(), dim=1)
    cosine = rows @ rows.t()
    for limit in (3, 10, 15, 99):  # as many as are stored, and more
        found = brute.nearest(4, limit=limit)
        order = [i for i in cosine[4].argsort(descending=True).tolist() if i != 4][:limit]
        assert [n.feature for n in found] == order
        assert [n.similarity for n in found] == pytest.approx(cosine[4, order].tolist(), abs=1e-6)
    assert brute.nearest(4, by="firing", limit=2) == brute[4].coactive[:2]
    assert brute.nearest(brute[4].direction * 3, limit=1)[0].feature == 4
    direction = saekit.Direction(-brute[4].direction, brute.site)
    assert [n.feature for n in brute.nearest(direction, limit=99)] == cosine[4].argsort().tolist()
    with pytest.raises(UnknownFeature):
        brute.nearest(24)
    for wrong, message in (
        (torch.ones(9), r"expected a direction \[8\], got \[9\]"),
        (torch.zeros(8), "the direction is zero"),
        (torch.full((8,), float("nan")), "NaN"),
    ):
        with pytest.raises(InvalidInput, match=message):
            brute.nearest(wrong)
    with pytest.raises(InvalidInput, match="a direction fires on nothing"):
        brute.nearest(torch.ones(8), by="firing")
    with pytest.raises(InvalidInput, match="'taste' is neither"):
        brute.nearest(3, by="taste")
    with pytest.raises(InvalidInput, match="limit starts at 1"):
        brute.nearest(3, limit=0)


def test_what_raises_a_token_by_the_stored_tops(brute) -> None:
    rows = [
        r for r in brute.table("logits").to_pylist() if r["raised"] and brute.token(r["token_id"]) == " Jedi"
    ]
    rows.sort(key=lambda r: -r["effect"])
    assert rows
    assert [(r.feature, r.effect) for r in brute.raising(" Jedi")] == [
        (r["feature"], r["effect"]) for r in rows
    ]
    assert brute.raising(" Jedi", 1) == brute.raising(brute.vocabulary.index(" Jedi"), 1)
    with pytest.raises(
        UnknownName, match="'Jedi' is not one token of made-up's vocabulary. Did you mean ' Jedi'?"
    ):
        brute.raising("Jedi")
    with pytest.raises(UnknownName, match="Did you mean .* lightsaber"):
        brute.raising(" lightsabre")
    with pytest.raises(InvalidInput, match="token id 21 is not in"):
        brute.raising(21)


def test_what_raises_a_token_among_all(catalog, model) -> None:
    token = " king"
    V = len(catalog.vocabulary)
    effects = logit_effects(model, catalog.sae.directions(), catalog.site, V)
    place = effects.raised_ids == catalog.vocabulary.index(token)
    expected = {i: float(effects.raised[i][place[i]][0]) for i in range(len(catalog))}
    order = sorted((i for i in expected if expected[i] > 0), key=lambda i: -expected[i])
    found = catalog.raising(token, 99, model)
    assert [r.feature for r in found] == order
    assert [r.effect for r in found] == pytest.approx([expected[i] for i in order], rel=1e-4)
    assert len(catalog.raising(token)) < len(found)


def test_what_fires_on_a_text(catalog, model) -> None:
    text = "The king sees a ship"
    found = catalog.firing(text, model, limit=3)
    _, cache = model.run_with_cache(text, names_filter=catalog.site)
    f = catalog.sae.encode(cache[catalog.site][0].float()).detach()
    assert "".join(found.tokens[1:]) == text
    for row, fired in zip(f, found.features, strict=True):
        order = row.argsort(descending=True)[:3].tolist()
        assert [i for i, _ in fired] == order
        assert [a for _, a in fired] == pytest.approx(row[order].tolist())
    assert "' king'" in str(found)
    with pytest.raises(InvalidInput, match="the context of the model holds"):
        catalog.firing("ship " * 3000, model)


def test_what_fires_needs_the_catalogs_model(catalog, llama) -> None:
    with pytest.raises(InvalidInput, match="has width 256"):
        catalog.firing("a ship", llama)


def test_a_published_catalog_pulls_what_is_asked_for(brute, tmp_path, monkeypatch) -> None:
    snapshot = tmp_path / "snapshots" / ("c" * 40)
    asked = []

    def fetch(repository: str, name: str, revision: str | None = None) -> Path:
        asked.append(name)
        assert repository == "somebody/catalog"
        assert revision == (None if len(asked) == 1 else snapshot.name)  # all of one commit
        snapshot.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(brute.path / name, snapshot / name))

    monkeypatch.setattr("saekit.catalog.publish.fetch", fetch)
    monkeypatch.chdir(tmp_path)
    catalog = Catalog.open("somebody/catalog")
    assert asked == ["catalog.json", "features.parquet"]
    assert catalog[3].contexts == brute[3].contexts
    assert sorted(asked[2:]) == [f"{t}.parquet" for t in ("activations", "contexts", "corpus", "vocabulary")]
    assert catalog.search("Jedi")[0].index == brute.search("Jedi")[0].index
    assert torch.equal(catalog[3].direction, brute[3].direction)
    assert len(asked) == len(set(asked))
    assert "sample.parquet" not in asked


def test_figures_draw(catalog, tmp_path) -> None:
    for feature in (next(f for f in catalog if f.contexts), min(catalog, key=lambda f: f.density)):
        feature.figure().savefig(tmp_path / "f.png")
        assert (tmp_path / "f.png").stat().st_size > 5000


def test_a_catalog_knows_its_model(catalog, model, llama) -> None:
    catalog.check_fits(model)
    with pytest.raises(InvalidInput, match="has width 256"):
        catalog.check_fits(llama)
    other = saekit.load_model("tiny", dtype="float32")
    with torch.no_grad():
        next(iter(other.original_model.parameters())).add_(1)
    with pytest.raises(InvalidInput, match="weights of tiny are not those"):
        catalog.check_fits(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=99), "schema 99; this saekit reads 2, and `saekit catalog build`"),
        (lambda c: c.pop("site"), "field 'site'"),
        (lambda c: c["sinks"].pop("norm_above"), "field 'norm_above'"),
        (lambda c: c["sae"].update(d_sae=65), "64 rows for 65 latents"),
    ],
)
def test_broken_descriptions(copy, change, message) -> None:
    info = json.loads((copy / "catalog.json").read_text())
    change(info)
    (copy / "catalog.json").write_text(json.dumps(info))
    with pytest.raises(InvalidInput, match=message):
        Catalog.open(copy)


def test_broken_tables(copy) -> None:
    (copy / "tokens.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InvalidInput, match=r"tokens\.parquet: not a readable Parquet"):
        _ = Catalog.open(copy)[0].top_tokens
    shutil.copy(copy / "logits.parquet", copy / "tokens.parquet")
    with pytest.raises(
        InvalidInput, match=r"tokens\.parquet: expected columns feature, rank, token_id, count"
    ):
        _ = Catalog.open(copy)[0].top_tokens
    corpus = Catalog.open(copy).table("corpus").to_pydict()
    write_table(copy, "corpus", {**corpus, "token_id": [10**6] * len(corpus["token_id"])})
    with pytest.raises(InvalidInput, match=r"token id 1000000 is not in vocabulary\.parquet"):
        _ = next(f for f in Catalog.open(copy) if f.density > 0).contexts
    (copy / "neighbours.parquet").unlink()
    with pytest.raises(FileMissing, match="catalog table neighbours"):
        _ = Catalog.open(copy)[0].neighbours


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(FileMissing, match="does not exist"):
        Catalog.open(tmp_path / "none")
    with pytest.raises(FileMissing, match=r"no catalog\.json"):
        Catalog.open(tmp_path)


def test_the_embedded_catalog_finds_the_jedi_feature() -> None:
    catalog = Catalog.open("tiny")
    hits = catalog.search("Jedi", limit=5)
    assert any("Jedi" in t.token for f in hits for t in f.top_tokens[:5])
    assert torch.equal(catalog.sae.W_dec, SAE.load("tiny").W_dec)
