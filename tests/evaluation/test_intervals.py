"""Intervals by resampling documents: they cover the truth as often as they say, and know what a document is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saekit.evaluation.figures import figures, token_reconstruction
from saekit.evaluation.intervals import DocumentSums, bootstrap, totals


def ratio(sums):
    return {"ratio": sums["above"] / sums["below"]}


def one_ratio(rng, documents: int) -> dict[str, torch.Tensor]:
    """Documents of 1 … 40 tokens whose tokens share a document's mean: Σabove / Σbelow is about 3."""
    lengths = rng.integers(1, 41, documents)
    means = 3 + rng.standard_normal(documents)
    above = lengths * means + np.sqrt(lengths) * rng.standard_normal(documents)
    return {"above": torch.from_numpy(above), "below": torch.from_numpy(lengths.astype(float))}


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(0)
    trials = 400
    held = 0
    for seed in range(trials):
        low, high = bootstrap(one_ratio(rng, 80), ratio, resamples=300, seed=seed)["ratio"]
        held += low <= 3.0 <= high
    assert 0.91 <= held / trials <= 0.98


def test_documents_are_resampled_not_tokens() -> None:
    # The same tokens, alike within 40 documents of 25: as 40 documents, and as 1000 of one token each.
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    documents = bootstrap({"above": 25 * values, "below": torch.full((40,), 25.0).double()}, ratio)["ratio"]
    alone = values.repeat_interleave(25)
    tokens = bootstrap({"above": alone, "below": torch.ones_like(alone)}, ratio)["ratio"]
    width, narrow = documents[1] - documents[0], tokens[1] - tokens[0]
    assert width / narrow == pytest.approx(25**0.5, rel=0.15)
    assert width == pytest.approx(2 * 1.96 * float(values.std()) / 40**0.5, rel=0.1)


def test_the_variance_of_a_resample_is_about_its_own_mean() -> None:
    # Brute force: stack the tokens of the drawn documents and compute explained variance from them.
    draw = torch.Generator().manual_seed(1)
    x = [torch.randn(n, 6, generator=draw).double() + n for n in (3, 5, 2, 9)]
    x_hat = [rows + 0.3 * torch.randn(rows.shape, generator=draw).double() for rows in x]
    weights = torch.tensor([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 1, 0]]).double()
    sums = DocumentSums()
    for number, (rows, made) in enumerate(zip(x, x_hat, strict=True)):
        per_token = token_reconstruction(torch.ones(len(rows), 4), made, rows, [2, 4])
        every = torch.ones(len(rows), dtype=torch.bool)
        sums.add(torch.full((len(rows),), number), {name: (every, v) for name, v in per_token.items()})
    found = figures(totals(sums.per_document(), weights), {"a": 2, "b": 4})
    for r, row in enumerate(weights.int().tolist()):
        all_x = torch.cat([rows for rows, w in zip(x, row, strict=True) for _ in range(w)])
        all_hat = torch.cat([rows for rows, w in zip(x_hat, row, strict=True) for _ in range(w)])
        parts = {"explained_variance": slice(0, 6), "explained_variance/a": slice(0, 2)}
        for name, part in (parts | {"explained_variance/b": slice(2, 6)}).items():
            y, y_hat = all_x[:, part], all_hat[:, part]
            expected = 1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
            assert float(found[name][r]) == pytest.approx(float(expected), rel=1e-9), name


def test_sums_of_a_document_meet_again_from_any_batch() -> None:
    sums = DocumentSums()
    rng = np.random.default_rng(3)
    documents = torch.from_numpy(rng.integers(0, 2000, (40, 100)))
    values = torch.from_numpy(rng.standard_normal((40, 100)))
    for numbers, value in zip(documents, values, strict=True):  # more rows than are kept unmerged
        positive = value > 0
        sums.add(
            numbers,
            {"all": (torch.ones_like(positive), value), "positive": (positive, value[positive])},
        )
    found = sums.per_document()
    for i, number in enumerate(documents.unique()):
        mine = values[documents == number]
        assert float(found["all"][i]) == pytest.approx(float(mine.sum()), abs=1e-12)
        assert float(found["positive"][i]) == pytest.approx(float(mine.clamp_min(0).sum()), abs=1e-12)


def test_seeded_and_silent_where_nothing_can_be_told() -> None:
    sums = one_ratio(np.random.default_rng(0), 20)
    assert bootstrap(sums, ratio) == bootstrap(sums, ratio) != bootstrap(sums, ratio, seed=1)
    assert bootstrap({name: rows[:1] for name, rows in sums.items()}, ratio) == {}
    assert bootstrap({}, ratio) == {}
    # 0/0 in some resamples is left out of the interval; in all of them there is none
    rare = {"above": torch.tensor([0.0, 2.0]).double(), "below": torch.tensor([0.0, 1.0]).double()}
    assert bootstrap(rare, ratio)["ratio"] == (2.0, 2.0)
    assert bootstrap({name: 0 * rows for name, rows in rare.items()}, ratio) == {}


def test_many_documents_are_weighted_in_parts(monkeypatch) -> None:
    sums = one_ratio(np.random.default_rng(0), 50)
    whole = bootstrap(sums, ratio, resamples=100)
    monkeypatch.setattr("saekit.evaluation.intervals.WEIGHTS_AT_ONCE", 7 * 50)
    assert bootstrap(sums, ratio, resamples=100)["ratio"] == pytest.approx(whole["ratio"], rel=1e-12)
