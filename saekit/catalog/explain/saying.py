"""Writing down what is said about features: rows merged into a catalog's explanations and scores.

Only these two tables change after a build. Each is swapped in whole, so a reader sees the old one or the new one; a row
with the key of a new one gives way to it, and all else stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saekit.catalog.explain.excerpts import check_feature, folder_of
from saekit.catalog.tables import SCHEMAS, read_table, write_table
from saekit.errors import InvalidInput, first_line
from saekit.files import fsync
from saekit.locks import exclusive

Row = dict[str, Any]

EXPLANATION = ("feature", "method", "model", "prompt")  # names an explanation
SCORE = (*EXPLANATION, "scorer", "judge", "judge_prompt")
LOCK = ".explanations.lock"


def merge(
    folder: Path, explanations: Iterable[Row], scores: Iterable[Row] = (), *, without: Collection[str] = ()
) -> None:
    """Add rows to both tables, in the place of rows with the same key, and of all with a method in `without`.

    Raises `InvalidInput` where the folder cannot be written or another process is writing.
    """
    explanations, scores = list(explanations), list(scores)
    with exclusive(folder, what="catalog", name=LOCK):
        building = folder / f"explanations.tmp-{os.getpid()}"
        try:
            building.mkdir(exist_ok=True)
            for name, key, rows in (("explanations", EXPLANATION, explanations), ("scores", SCORE, scores)):
                _merged(folder, building, name, key, rows, without)
            for name in ("explanations", "scores"):
                fsync(building / f"{name}.parquet")
                (building / f"{name}.parquet").replace(folder / f"{name}.parquet")
            fsync(folder)
        except OSError as error:
            raise InvalidInput(f"catalog {folder}: cannot be written ({first_line(error)})") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _merged(
    folder: Path, building: Path, name: str, key: tuple[str, ...], rows: list[Row], without: Collection[str]
) -> None:
    schema = SCHEMAS[name]
    there = read_table(folder, name) if (folder / f"{name}.parquet").exists() else schema.empty_table()
    new = {tuple(row[column] for column in key): row for row in rows}  # of two with one key, the later
    old = zip(*(there[column].to_pylist() for column in key), strict=True)
    kept = [k not in new and k[1] not in without for k in old]
    table = pa.concat_tables(
        [there.filter(pa.array(kept, pa.bool_())), pa.Table.from_pylist(list(new.values()), schema)]
    )
    order = np.argsort(table["feature"].to_numpy(), kind="stable")  # of one feature, in the order of writing
    table = table.take(pa.array(order))
    write_table(building, name, {column: table[column].to_pylist() for column in schema.names})


def note(catalog: Any, feature: int, text: str, author: str) -> None:
    """Write down what a person says about a feature (method `note`, model: the author), in place of an earlier note of theirs.

    catalog: a `Catalog` or its folder. Raises `UnknownFeature`, and `InvalidInput` for an empty text or author.
    """
    folder = folder_of(catalog)
    feature = check_feature(feature, len(read_table(folder, "features")))
    for name, value in (("text", text), ("author", author)):
        if not isinstance(value, str) or not value.strip():
            raise InvalidInput(f"note: {name} is empty; expected words, got {value!r}")
    row = {"feature": feature, "method": "note", "model": author.strip(), "prompt": "", "text": text.strip()}
    merge(folder, [row])
