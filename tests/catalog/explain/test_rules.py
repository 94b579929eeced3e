from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from catalog.brute import WORDS
from catalog.explain.test_measures import slow_auc, slow_pearson
from catalog.explain.worlds import BEFORE, DETECTOR, IDS, NOISE, SILENT, world, written

from saekit.catalog.explain import note, without_llm
from saekit.catalog.explain.excerpts import Excerpts
from saekit.catalog.explain.rules import held_out_windows
from saekit.catalog.tables import read_table, write_table


def said(folder) -> dict[tuple[int, str], str]:
    return {
        (row["feature"], row["method"]): row["text"] for row in read_table(folder, "explanations").to_pylist()
    }


def scores(folder) -> dict[tuple[int, str, str], dict]:
    table = read_table(folder, "scores").to_pylist()
    return {(row["feature"], row["method"], row["scorer"]): row for row in table}


@pytest.fixture(scope="module")
def explained(original, tmp_path_factory):
    folder = shutil.copytree(original, tmp_path_factory.mktemp("explained") / "catalog")
    return folder, without_llm(folder)


def test_what_features_mean(explained) -> None:
    folder, tally = explained
    texts = said(folder)
    assert texts[DETECTOR, "peak_token"] == texts[DETECTOR, "tokens"] == '" Jedi"'
    assert texts[BEFORE, "next_token"] == 'say " ship"'
    assert (BEFORE, "peak_token") not in texts
    assert (NOISE, "tokens") in texts
    assert not [method for feature, method in texts if feature == NOISE and method != "tokens"]
    assert not [method for feature, method in texts if feature == SILENT]
    assert tally.explained == {"tokens": 7, "peak_token": 5, "next_token": 1, "logits": 0}
    assert str(tally).startswith("8 features: 7 by tokens, 5 by peak_token, 1 by next_token, 0 by logits; ")


def test_a_token_detector_scores_one_and_another_feature_does_not(explained) -> None:
    folder, tally = explained
    found = scores(folder)
    for feature in (DETECTOR, 4, 5, 6, 7):
        for method in ("tokens", "peak_token"):
            for scorer in ("pearson", "auc"):
                row = found[feature, method, scorer]
                assert row["score"] == pytest.approx(1, abs=1e-6)
                assert row["n"] in range(12, 21, 2)
                assert row["failures"] == 0
                assert row["control"] < 0.97
        assert abs(found[feature, "peak_token", "pearson"]["control"]) < 0.2
        assert abs(found[feature, "peak_token", "auc"]["control"] - 0.5) < 0.1
    controls = [abs(found[feature, "tokens", "pearson"]["control"]) for feature in (0, 1, 2, 4, 5, 6, 7)]
    assert np.median(controls) < 0.1
    assert found[BEFORE, "next_token", "pearson"]["score"] == pytest.approx(1, abs=1e-6)
    assert found[BEFORE, "next_token", "auc"]["control"] is None  # there is no second feature of this rule
    assert abs(found[BEFORE, "tokens", "pearson"]["score"]) < 0.5
    assert abs(found[NOISE, "tokens", "pearson"]["score"]) < 0.5
    assert (tally.scored, tally.above_half) == (7, 5)
    assert tally.control_above_half <= 1


def test_scores_are_those_of_the_slow_way(explained) -> None:
    folder, _ = explained
    excerpts, found = Excerpts(folder), scores(folder)
    evidence = read_table(folder, "evidence").to_pylist()
    for feature in (DETECTOR, BEFORE, NOISE, 6):
        expected = {row["token_id"]: row["expected"] for row in evidence if row["feature"] == feature}
        windows = held_out_windows(excerpts, feature, feature + 1, 10)
        predicted, true = [], []
        for i, (start, length) in enumerate(
            zip(windows.start.tolist(), windows.length.tolist(), strict=True)
        ):
            predicted += [expected.get(t, 0.0) for t in excerpts.ids[start : start + length].tolist()]
            true += windows.activations[i, :length].tolist()
        row = found[feature, "tokens", "pearson"]
        assert row["score"] == pytest.approx(slow_pearson(predicted, true), abs=1e-6)
        area = slow_auc(predicted, [x > 0 for x in true])
        assert found[feature, "tokens", "auc"]["score"] == pytest.approx(area, abs=1e-6)
        assert row["n"] == len(windows.feature)


def test_another_table_predicts_for_every_feature_alike(tmp_path) -> None:
    """Latents that all fire on one word: another's table is as good as the own one, and the control says so."""
    seen = world()
    for s in range(8):
        seen.f[..., s] = (1.0 + s) * (seen.ids == IDS["king"])
    folder = written(tmp_path / "catalog", seen)
    without_llm(folder)
    for row in read_table(folder, "scores").to_pylist():
        assert row["score"] == row["control"] == pytest.approx(1, abs=1e-6)


def test_raised_tokens(folder) -> None:
    """Before several words, which the direction raises: no one token is shared, but the logits know them."""
    seen = world()
    wanted = [IDS[word] for word in ("moon", "rain", "river", "stone")]
    seen.f[..., NOISE] = 0
    seen.f[:, :-1, NOISE] = np.isin(seen.ids[:, 1:], wanted) & (
        seen.documents[:, 1:] == seen.documents[:, :-1]
    )
    seen.f[seen.ids == 0] = 0
    folder = written(folder.parent / "raised", seen)
    rows = [row for row in read_table(folder, "logits").to_pylist() if row["feature"] != NOISE]
    rows += [
        {"feature": NOISE, "rank": i, "raised": True, "token_id": t, "effect": 1.0}
        for i, t in enumerate(wanted)
    ]
    rows.sort(key=lambda row: row["feature"])
    write_table(folder, "logits", {name: [row[name] for row in rows] for name in rows[0]})
    without_llm(folder)
    assert said(folder)[NOISE, "logits"] == 'say one of " moon", " rain", " river", " stone"'
    assert scores(folder)[NOISE, "logits", "pearson"]["score"] == pytest.approx(1, abs=1e-6)


def test_case_and_spaces_part_tokens(folder) -> None:
    table = read_table(folder, "vocabulary").to_pydict()
    table["token"][IDS["king"]], table["token"][IDS["ship"]] = "jedi", " JEDI"
    write_table(folder, "vocabulary", table)
    without_llm(folder)
    king = IDS["king"]  # 4 … 7 are detectors of the words of these ids
    assert said(folder)[king, "peak_token"] == '"jedi"'
    for method in ("tokens", "peak_token"):
        assert scores(folder)[king, method, "pearson"]["score"] == pytest.approx(1, abs=1e-6)


def test_nothing_held_out_is_undefined_and_not_zero(folder) -> None:
    info = json.loads((folder / "catalog.json").read_text())
    info["sample"]["rows"] = []
    (folder / "catalog.json").write_text(json.dumps(info))
    tally = without_llm(folder)
    assert tally.scored == 0
    rows = read_table(folder, "scores").to_pylist()
    assert len(rows) == 2 * 13
    assert all(row["score"] is None and row["control"] is None and row["n"] == 0 for row in rows)


def test_again_gives_the_same_and_keeps_notes(folder) -> None:
    without_llm(folder)
    note(folder, DETECTOR, "the Jedi order", "R. Reader")
    first = {name: read_table(folder, name) for name in ("explanations", "scores")}
    without_llm(folder)
    texts = said(folder)
    assert texts.pop((DETECTOR, "note")) == "the Jedi order"
    assert len(texts) == first["explanations"].num_rows - 1
    assert read_table(folder, "scores").equals(first["scores"])


def test_the_vocabulary_of_this_world() -> None:
    assert WORDS[IDS["Jedi"] - 1] == "Jedi"
    assert IDS["king"] == 7
