"""The files of a catalog: flat tables with fixed schemas, so that DuckDB, pandas, polars and `datasets` read them.

    catalog.json            what this is: model, SAE, site, corpus, exclusions, definitions
    features.parquet        one row per latent
    contexts.parquet        top contexts: a stretch of a corpus row, and where in it the peak is
    activations.parquet     the non-zero activations inside those stretches
    corpus.parquet          the token ids of the corpus rows that contexts refer to
    tokens.parquet          per latent, the tokens it fires on: count, mean activation, share of its activation
    logits.parquet          per latent, the tokens its direction raises and lowers most
    histograms.parquet      per latent, log-spaced activation counts
    neighbours.parquet      per latent, the nearest others by decoder cosine
    explanations.parquet    per latent, what somebody or something says it means, how, and how well that predicts
    vocabulary.parquet      token id → text
    directions.safetensors  the SAE's tensors: W_dec [S, D] holds the directions

Every table but `corpus` and `vocabulary` is sorted by `feature`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saekit.errors import InvalidInput
from saekit.files import existing

SCHEMA_VERSION = 1
CATALOG, DIRECTIONS = "catalog.json", "directions.safetensors"

f32, i16, i32, i64, text = pa.float32(), pa.int16(), pa.int32(), pa.int64(), pa.string()

SCHEMAS: dict[str, pa.Schema] = {
    "features": pa.schema(
        {
            "feature": i32,
            "density": f32,  # share of evaluated tokens on which it fires
            "count": i64,
            "max_activation": f32,
            "mean_activation": f32,  # where it fires
            "std_activation": f32,  # where it fires
            "decoder_norm": f32,
            "encoder_cosine": f32,  # cosine of encoder column and decoder row
            "label": text,
        }
    ),
    "contexts": pa.schema(
        {
            "feature": i32,
            "rank": i16,
            "document": i64,
            "row": i32,  # of corpus
            "start": i16,  # in the row
            "length": i16,
            "peak": i16,  # of the maximum, counted from start
            "max_activation": f32,
        }
    ),
    "activations": pa.schema({"feature": i32, "rank": i16, "offset": i16, "activation": f32}),
    "corpus": pa.schema({"row": i32, "position": i16, "token_id": i32}),
    "tokens": pa.schema(
        {
            "feature": i32,
            "rank": i16,
            "token_id": i32,
            "count": i64,
            "mean_activation": f32,  # where it fires on this token
            "share": f32,  # of the latent's summed activation
        }
    ),
    "logits": pa.schema({"feature": i32, "rank": i16, "raised": pa.bool_(), "token_id": i32, "effect": f32}),
    "histograms": pa.schema({"feature": i32, "low": f32, "high": f32, "count": i64}),
    "neighbours": pa.schema({"feature": i32, "rank": i16, "neighbour": i32, "cosine": f32}),
    "explanations": pa.schema({"feature": i32, "method": text, "model": text, "text": text, "score": f32}),
    "vocabulary": pa.schema({"token_id": i32, "token": text}),
}


def write_table(folder: Path, name: str, columns: Mapping[str, Any]) -> None:
    """Write one table, its columns cast to the schema."""
    schema = SCHEMAS[name]
    arrays = [_column(columns[field.name], field.type) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd", row_group_size=1 << 20)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return pa.array(values).cast(kind)
    return pa.array(values, type=kind)


def read_table(folder: Path, name: str) -> pa.Table:
    """Read one table and check its columns. Raises `InvalidInput` naming the file and the columns."""
    path = existing(folder / f"{name}.parquet", f"catalog table {name}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable Parquet file ({error})") from error
    schema = SCHEMAS[name]
    if table.schema.names != schema.names or table.schema.types != schema.types:
        found = ", ".join(f"{n} {t}" for n, t in zip(table.schema.names, table.schema.types, strict=True))
        raise InvalidInput(f"{path}: expected columns {', '.join(schema.names)}, found {found}")
    return table


class ByFeature:
    """A table sorted by `feature`, from which one feature's rows come as plain arrays."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = {
            name: table[name].to_numpy() if table.schema.field(name).type != text else table[name].to_pylist()
            for name in table.schema.names
        }
        self._features = self._columns["feature"]

    def rows(self, feature: int) -> dict[str, Any]:
        start, end = np.searchsorted(self._features, [feature, feature + 1])
        return {name: column[start:end] for name, column in self._columns.items()}

    def column(self, name: str) -> Any:
        return self._columns[name]
