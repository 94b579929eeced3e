"""Labelled texts from the files people have them in, and one clear error for each that is none."""

from __future__ import annotations

import json

import pytest

from saekit.errors import FileMissing, InvalidInput
from saekit.evaluation.labelled import read_labelled

PAIRS = [("A cat, asleep.", "animal"), ("A stone\nin the rain.", "thing"), ("Ein Hund läuft.", "animal")]


def written(folder, name, text):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_every_format_says_the_same(tmp_path) -> None:
    rows = [{"text": text, "label": label} for text, label in PAIRS]
    quoted = "\n".join(f'"{text}",{label}' for text, label in PAIRS)
    for path in (
        written(tmp_path, "a.csv", f"\ufefftext,label\n{quoted}\n"),
        written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"),
        written(tmp_path, "a.json", json.dumps(rows)),
    ):
        assert list(zip(*read_labelled(path), strict=True)) == PAIRS
    by_label = {"animal": [PAIRS[0][0], PAIRS[2][0]], "thing": [PAIRS[1][0]]}
    for label, texts in by_label.items():
        written(tmp_path / "folder", f"{label}.json", json.dumps(texts))
    for path in (written(tmp_path, "b.json", json.dumps(by_label)), tmp_path / "folder"):
        assert sorted(zip(*read_labelled(path), strict=True)) == sorted(PAIRS)


def test_other_names_numbers_and_repeated_texts(tmp_path) -> None:
    text = "statement,label\none,1\ntwo,0\none,1\nthree,0\nthree,1\n"
    assert read_labelled(written(tmp_path, "a.csv", text)) == (["one", "two"], ["1", "0"])
    rows = [{"sentence": "one", "label": True}, {"sentence": "two", "label": 0}]
    assert read_labelled(written(tmp_path, "a.json", json.dumps(rows))).labels == ["True", "0"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", "is no .csv, .json, .jsonl or folder"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "3", "expected a list of objects"),
        ("a.json", '["x", "y"]', "row 1: expected fields, found str"),
        ("a.json", '{"a": ["x"], "b": [1]}', "'b': expected a list of texts"),
        ("a.json", '[{"text": "x", "label": 1.5}]', "label 1.5 is not a text"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": "y"}', "row 2: expected a field 'label'"),
        ("a.jsonl", '{"text": "x", "label": "a"}\nx', "line 2: not valid JSON"),
        ("a.csv", "word,label\nx,1\n", "found word, label"),
        ("a.csv", 'text,label\n"x,1\n', "unexpected end of data"),
        ("a.csv", "text,label\nx,1\ny,1\n", "fewer than two labels"),
        ("a.csv", "text,label\nx\n", "label None is not a text"),
        ("a.csv", "text,label\nx,1,extra\n", "row 1: more values than the header has"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, name, text, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_labelled(written(tmp_path, name, text))


def test_missing_empty_and_foreign(tmp_path) -> None:
    with pytest.raises(FileMissing, match=r"labelled texts: .*nowhere.csv does not exist"):
        read_labelled(tmp_path / "nowhere.csv")
    with pytest.raises(FileMissing, match="no \\*.json file"):
        read_labelled(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_labelled(tmp_path / "a.csv")
