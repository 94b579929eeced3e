"""Texts with labels, read from the files people have them in.

*.csv      a header, then rows with a text and a label
*.jsonl    an object with a text and a label on every line
*.json     a list of such objects; or an object {label: [texts]}
a folder   of *.json files that are lists of texts: a file is a label, its name is the label's
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saekit.errors import FileMissing, InvalidInput
from saekit.files import existing

TEXT_FIELDS = ("text", "statement", "sentence")
LABEL_FIELD = "label"


class Labelled(NamedTuple):
    """Texts and what each is about."""

    texts: list[str]
    labels: list[str]


def read_labelled(path: str | Path) -> Labelled:
    """The labelled texts of a file or folder, in its order.

    The text is the field `text`, `statement` or `sentence`, the label the field `label`: a word, a whole number or a
    truth value. A text that stands there twice counts once, and one that stands there with two labels is left out.

    Raises `FileMissing`, and `InvalidInput` that names file, row and field; also for fewer than two labels.
    """
    path = existing(path, "labelled texts")
    labels: dict[str, str | None] = {}
    for text, label in _pairs(path):
        labels[text] = label if labels.get(text, label) == label else None
    kept = [(text, label) for text, label in labels.items() if label is not None]
    if len({label for _, label in kept}) < 2:
        raise InvalidInput(
            f"labelled texts: {path} holds fewer than two labels, so there is nothing to tell apart"
        )
    return Labelled([text for text, _ in kept], [label for _, label in kept])


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise FileMissing(
                f"labelled texts: no *.json file in {path}; expected a list of texts for each label"
            )
        for file in files:
            yield from _of_one_label(_json(file), file.stem, str(file))
    elif path.suffix == ".csv":
        yield from _rows(_csv(path), path)
    elif path.suffix == ".jsonl":
        yield from _rows(_json_lines(path), path)
    elif path.suffix == ".json":
        value = _json(path)
        if isinstance(value, dict):
            for label, texts in value.items():
                yield from _of_one_label(texts, label, f"{path}, {label!r}")
        elif isinstance(value, list):
            yield from _rows(enumerate(value, 1), path)
        else:
            raise InvalidInput(f"{path}: expected a list of objects or {{label: [texts]}}")
    else:
        raise InvalidInput(f"labelled texts: {path} is no .csv, .json, .jsonl or folder")


def _of_one_label(texts: Any, label: str, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InvalidInput(f"{where}: expected a list of texts")
    return ((text, label) for text in texts)


def _rows(rows: Iterable[tuple[int, Any]], path: Path) -> Iterator[tuple[str, str]]:
    for number, row in rows:
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise InvalidInput(f"{where}: expected fields, found {type(row).__name__}")
        if None in row:  # how `csv` names what has no column
            raise InvalidInput(
                f"{where}: more values than the header has; is a text with a comma without quotes?"
            )
        field = next((name for name in TEXT_FIELDS if name in row), None)
        if field is None or LABEL_FIELD not in row:
            raise InvalidInput(
                f"{where}: expected a field {LABEL_FIELD!r} and one of {', '.join(TEXT_FIELDS)}; "
                f"found {', '.join(map(str, row)) or 'none'}"
            )
        text, label = row[field], row[LABEL_FIELD]
        if not isinstance(text, str) or not isinstance(label, (str, int)):
            raise InvalidInput(f"{where}: {field} {text!r:.60} or label {label!r:.60} is not a text")
        yield text, str(label)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 ({error})") from error


def _csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        yield from enumerate(reader, 1)
    except csv.Error as error:
        raise InvalidInput(f"{path}, line {reader.line_num}: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not valid JSON ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}, line {number}: not valid JSON ({error})") from error
