from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import sentences

import saekit
from saekit.catalog import Catalog
from saekit.catalog.tables import SCHEMAS
from saekit.errors import FileMissing, InvalidInput, UnknownFeature
from saekit.sae import SAE
from saekit.tokens import tokenize


@pytest.fixture(scope="module")
def catalog(model, tmp_path_factory) -> Catalog:
    sae = SAE.new("topk", d_in=256, d_sae=64, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    return Catalog.build(model, sae, tokenize(sentences(40), model, 64), tmp_path_factory.mktemp("c") / "c")


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


def test_tables_open_with_pandas_and_datasets(catalog) -> None:
    import datasets
    import pandas as pd

    for name, schema in SCHEMAS.items():
        path = catalog.path / f"{name}.parquet"
        assert list(pd.read_parquet(path).columns) == schema.names
    table = datasets.Dataset.from_parquet(str(catalog.path / "features.parquet"), keep_in_memory=True)
    assert table.num_rows == 64
    assert catalog.table("features").num_rows == 64
    with pytest.raises(InvalidInput, match="'nope' is not one of features"):
        catalog.table("nope")


def test_search_ranks_by_share(catalog) -> None:
    hits = catalog.search("king")
    assert hits
    shares = [sum(t.share for t in f.top_tokens if "king" in t.token.lower()) for f in hits]
    assert shares[0] > 0
    assert catalog.search("zzzzqqqq") == []
    assert len(catalog.search("the", limit=2)) <= 2


@pytest.mark.parametrize("query", ["", "  ", "!!", '"', "* OR"])
def test_queries_are_data(catalog, query) -> None:
    if query == "* OR":
        catalog.search(query)  # a word like any other
    else:
        with pytest.raises(InvalidInput, match="no word"):
            catalog.search(query)


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
        (lambda c: c.update(schema=99), "schema 99; this saekit reads 1"),
        (lambda c: c.pop("site"), "field 'site'"),
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
