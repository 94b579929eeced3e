"""The difference between two catalogs, against dense matrices of everything."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from catalog.brute import Options, made, made_up

from saekit.catalog import Catalog
from saekit.catalog.difference import AT_LEAST, Difference
from saekit.errors import InvalidInput

S, Z = 24, 40
ROWS = 4  # sampled of 40: some features fire too seldom there to be measured


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalog, Catalog]:
    """Two widths over the same rows; the wider one begins with the activations of the other."""
    folder = tmp_path_factory.mktemp("difference")
    options = Options(contexts=3, per_band=1, sample_rows=ROWS)
    return tuple(Catalog.open(made(folder / str(n), S=n, options=options)) for n in (S, Z))  # type: ignore[return-value]


def sampled(catalog: Catalog, n: int) -> np.ndarray:
    """[rows · T, n] activations on the sample, from the table, BOS left out."""
    table = catalog.table("sample").to_pandas()
    numbers = {row: i for i, row in enumerate(catalog.info["sample"]["rows"])}
    T = catalog.info["corpus"]["context_size"]
    f = np.zeros((len(numbers), T, n))
    f[table["row"].map(numbers), table["position"], table["feature"]] = table["activation"]
    return f[:, 1:].reshape(-1, n)


def check_best(similarity: np.ndarray, measured: np.ndarray, match: np.ndarray, found: np.ndarray) -> None:
    assert np.isnan(found).tolist() == (~measured).tolist()
    for i in np.flatnonzero(measured):
        best = similarity[i].max()
        assert found[i] == pytest.approx(best, abs=1e-5)
        assert similarity[i, match[i]] == pytest.approx(best, abs=1e-5)
    assert (match[~measured] == -1).all()


def test_by_firing_is_the_correlation_on_the_shared_rows(pair: tuple[Catalog, Catalog]) -> None:
    found = pair[0].difference(pair[1], by="firing")
    a, b = sampled(pair[0], S), sampled(pair[1], Z)
    seen = made_up(S)
    assert len(a) == ROWS * (seen.ids.shape[1] - 1)
    measured = [(f > 0).sum(0) >= AT_LEAST for f in (a, b)]
    with np.errstate(invalid="ignore"):
        correlation = np.corrcoef(np.c_[a, b].T)[:S, S:]
    correlation[:, ~measured[1]] = correlation[~measured[0]] = 0
    correlation = np.maximum(0, np.nan_to_num(correlation))
    check_best(correlation, measured[0], found.match, found.similarity)
    check_best(correlation.T, measured[1], found.match_back, found.similarity_back)
    fired = (a > 0).sum(0)
    assert ((fired > 0) & ~measured[0]).any()
    assert measured[0].sum() > S // 4


def test_by_decoder_is_the_cosine_among_those_that_fire(pair: tuple[Catalog, Catalog]) -> None:
    found = pair[0].difference(pair[1])
    assert found.by == "decoder"
    rows = [torch.nn.functional.normalize(c.sae.directions().double(), dim=1).numpy() for c in pair]
    alive = [c.density > 0 for c in pair]
    cosine = rows[0] @ rows[1].T
    cosine[:, ~alive[1]] = cosine[~alive[0]] = -1
    check_best(cosine, alive[0], found.match, found.similarity)
    check_best(cosine.T, alive[1], found.match_back, found.similarity_back)


def test_a_catalog_is_its_own_match(pair: tuple[Catalog, Catalog]) -> None:
    one = pair[0]
    for by in ("decoder", "firing"):
        found = one.difference(one, by)  # type: ignore[arg-type]
        measured = np.isfinite(found.similarity)
        assert (found.match[measured] == np.flatnonzero(measured)).all()
        assert found.share == found.share_back == 1
        assert found.mutual.tolist() == measured.tolist()
        assert found.only_here == found.only_there == []


def test_what_it_tells() -> None:
    nan = math.nan
    found = Difference(
        "firing", 0.5, ("a", "b"),
        np.array([1, 1, 0, -1]), np.array([0.8, 0.9, 0.4, nan]),
        np.array([2, 1]), np.array([0.4, 0.9]),
    )  # fmt: skip
    assert found.mutual.tolist() == [False, True, True, False]
    assert found.share == pytest.approx(2 / 3)
    assert found.share_back == 0.5
    assert (found.only_here, found.only_there) == ([2], [0])
    assert found.table().to_pydict() == {
        "feature": [0, 1, 2, 3],
        "match": [1, 1, 0, None],
        "similarity": [pytest.approx(0.8), pytest.approx(0.9), pytest.approx(0.4), None],
        "mutual": [False, True, True, False],
    }
    text = str(found)
    assert "1 pairs are each other's best match" in text
    assert "a: 66.7% of 3 measured features matched, median 0.800" in text


def changed(catalog: Catalog, folder: Path, **fields: object) -> Catalog:
    shutil.copytree(catalog.path, folder)
    info = json.loads((folder / "catalog.json").read_text())
    for name, value in fields.items():
        part, _, key = name.rpartition("__")
        (info[part] if part else info)[key] = value
    (folder / "catalog.json").write_text(json.dumps(info))
    return Catalog.open(folder)


def test_other_weights_are_compared_by_firing(pair: tuple[Catalog, Catalog], tmp_path: Path) -> None:
    other = changed(pair[0], tmp_path / "other", model__hash="1" * 64)
    assert pair[0].difference(other).by == "firing"
    with pytest.raises(InvalidInput, match="made-up and made-up, have other weights; by='firing'"):
        pair[0].difference(other, "decoder")


def test_other_widths_are_compared_by_firing(pair: tuple[Catalog, Catalog], tmp_path: Path) -> None:
    options = Options(contexts=1, per_band=1, sample_rows=ROWS)
    other = Catalog.open(made(tmp_path / "wide", d_in=12, options=options))
    assert pair[0].difference(other).by == "firing"
    with pytest.raises(InvalidInput, match="widths 8 and 12"):
        pair[0].difference(other, "decoder")


def test_other_text_cannot_be_compared_by_firing(pair: tuple[Catalog, Catalog], tmp_path: Path) -> None:
    other = Catalog.open(made(tmp_path / "other", seed=1, options=Options(contexts=1, per_band=1)))
    with pytest.raises(InvalidInput, match="no row in common"):
        pair[0].difference(other, "firing")
    with pytest.raises(InvalidInput, match="'colour' is neither"):
        pair[0].difference(other, "colour")  # type: ignore[arg-type]


def test_rows_are_matched_by_their_tokens(pair: tuple[Catalog, Catalog], tmp_path: Path) -> None:
    """The sample of one catalog may hold more rows, under other numbers; only the shared ones count."""
    wider = Catalog.open(
        made(tmp_path / "more", S=Z, options=Options(contexts=3, per_band=1, sample_rows=30))
    )
    assert wider.info["sample"]["rows"] != pair[1].info["sample"]["rows"]
    few, many = pair[0].difference(pair[1], "firing"), pair[0].difference(wider, "firing")
    assert many.match.tolist() == few.match.tolist()
    assert many.similarity == pytest.approx(few.similarity, nan_ok=True)
