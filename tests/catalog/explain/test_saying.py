from __future__ import annotations

import pytest

from saekit.catalog.explain import note
from saekit.catalog.explain.saying import merge
from saekit.catalog.tables import read_table
from saekit.errors import InvalidInput, UnknownFeature
from saekit.locks import exclusive


def row(feature: int, text: str, method: str = "llm", prompt: str = "p") -> dict:
    return {"feature": feature, "method": method, "model": "m", "prompt": prompt, "text": text}


def score(feature: int, value: float | None, scorer: str = "detection", judge_prompt: str = "j") -> dict:
    return {
        "feature": feature, "method": "llm", "model": "m", "prompt": "p", "scorer": scorer, "judge": "m",
        "judge_prompt": judge_prompt, "score": value, "control": None, "n": 4, "failures": 0,
    }  # fmt: skip


def texts(folder) -> list[tuple[int, str, str]]:
    return [(r["feature"], r["prompt"], r["text"]) for r in read_table(folder, "explanations").to_pylist()]


def test_the_same_key_is_replaced_and_all_else_kept(folder) -> None:
    merge(folder, [row(5, "five"), row(2, "two")], [score(5, 0.5), score(5, 0.25, "fuzzing")])
    merge(folder, [row(2, "two again"), row(2, "other", prompt="q")], [score(5, None), score(2, 1.0)])
    assert texts(folder) == [(2, "p", "two again"), (2, "q", "other"), (5, "p", "five")]
    scores = read_table(folder, "scores").to_pylist()
    found = [(r["feature"], r["scorer"], r["score"]) for r in scores]
    assert found == [(2, "detection", 1.0), (5, "fuzzing", 0.25), (5, "detection", None)]
    merge(folder, [row(2, "a", method="tokens")], without=("llm",))
    assert texts(folder) == [(2, "p", "a")]
    assert read_table(folder, "scores").num_rows == 0


def test_tables_that_are_not_there_yet_are_made(folder) -> None:
    for name in ("explanations", "scores"):
        (folder / f"{name}.parquet").unlink()
    merge(folder, [row(1, "one")])
    assert texts(folder) == [(1, "p", "one")]
    assert read_table(folder, "scores").num_rows == 0


def test_a_failed_write_changes_nothing(folder, monkeypatch) -> None:
    merge(folder, [row(1, "one")], [score(1, 0.5)])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    import saekit.catalog.explain.saying as saying

    real = saying.write_table

    def full(place, name, columns) -> None:
        real(place, name, columns)
        if name == "scores":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saying, "write_table", full)
    with pytest.raises(InvalidInput, match="cannot be written .*No space left"):
        merge(folder, [row(1, "other")], [score(1, 0.75)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_writers_at_once(folder) -> None:
    from saekit.catalog.explain.saying import LOCK

    with exclusive(folder, what="catalog", name=LOCK), pytest.raises(InvalidInput, match="another process"):
        merge(folder, [row(1, "one")])
    assert texts(folder) == []


def test_notes(folder) -> None:
    note(folder, 3, " fires on lists \n", "Ada")
    note(folder, 3, "no: on commas", "Bo")
    note(folder, 3, "fires on enumerations", "Ada")
    rows = read_table(folder, "explanations").to_pylist()
    assert [(r["feature"], r["method"], r["model"], r["prompt"], r["text"]) for r in rows] == [
        (3, "note", "Bo", "", "no: on commas"),
        (3, "note", "Ada", "", "fires on enumerations"),
    ]
    for feature, text, author, message in (
        (3, "  ", "Ada", "text is empty"),
        (3, "x", "", "author is empty"),
    ):
        with pytest.raises(InvalidInput, match=message):
            note(folder, feature, text, author)
    with pytest.raises(UnknownFeature, match="feature 8: this catalog has features 0 … 7"):
        note(folder, 8, "x", "Ada")
