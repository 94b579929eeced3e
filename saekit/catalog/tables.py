"""The files of a catalog: flat tables with fixed schemas, so that DuckDB, pandas, polars and `datasets` read them.

    catalog.json            what this is: model, SAE, site, corpus, exclusions, definitions
    features.parquet        one row per latent
    contexts.parquet        stretches of corpus rows around a peak: the strongest, and a sample of each band of the active range
    activations.parquet     the non-zero activations inside those stretches
    corpus.parquet          the token ids of the corpus rows that contexts and the sample refer to
    sample.parquet          all activations on a few corpus rows, drawn whatever fires there
    tokens.parquet          per latent, the tokens it fires on: count, mean activation, share of its activation
    evidence.parquet        per latent, what it is expected to be on a token, from the half of the documents that explains
    logits.parquet          per latent, the tokens its direction raises and lowers most
    histograms.parquet      per latent, counts of its activations (log-spaced) and of its effects on logits (even)
    neighbours.parquet      per latent, the nearest others by decoder cosine, and by firing on the same tokens
    neurons.parquet         per latent of an MLP's site, the neurons that its direction lies along
    explanations.parquet    per latent, what somebody or something says it means, and how they came to it
    scores.parquet          per explanation, how well it predicts the latent, by which measure, on how much
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

SCHEMA_VERSION = 2
CATALOG, DIRECTIONS = "catalog.json", "directions.safetensors"
TOP = 0  # the band of the strongest contexts; 1 … n are the bands of the active range, weakest first

f32, i8, i16, i32, i64 = pa.float32(), pa.int8(), pa.int16(), pa.int32(), pa.int64()
text = pa.string()

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
            "band": i8,  # 0: the strongest, at most one per document; b of n: peaks in ((b − 1)/n, b/n] of the maximum
            "rank": i16,  # strongest first; in a band, as they were drawn
            "document": i64,
            "row": i32,  # of corpus
            "start": i16,  # in the row
            "length": i16,
            "peak": i16,  # counted from start
            "max_activation": f32,  # at the peak
            "norm": f32,  # residual norm at the peak over the median one: a sink where it is far above 1
        }
    ),
    "activations": pa.schema({"feature": i32, "band": i8, "rank": i16, "offset": i16, "activation": f32}),
    "corpus": pa.schema({"row": i32, "position": i16, "token_id": i32, "document": i64}),
    "sample": pa.schema({"feature": i32, "row": i32, "position": i16, "activation": f32}),
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
    "evidence": pa.schema(
        {
            "feature": i32,
            "rank": i16,  # by summed activation
            "token_id": i32,
            "count": i64,  # firings on this token, in explaining documents
            "expected": f32,  # mean activation on this token there, zeros counted
        }
    ),
    "logits": pa.schema({"feature": i32, "rank": i16, "raised": pa.bool_(), "token_id": i32, "effect": f32}),
    "histograms": pa.schema(
        {"feature": i32, "of": text, "low": f32, "high": f32, "count": i64}  # of: activation, effect
    ),
    "neighbours": pa.schema(
        {"feature": i32, "by": text, "rank": i16, "neighbour": i32, "similarity": f32}  # by: decoder, firing
    ),
    "neurons": pa.schema({"feature": i32, "rank": i16, "neuron": i32, "cosine": f32}),
    "explanations": pa.schema(
        {
            "feature": i32,
            "method": text,  # tokens, peak_token, next_token, logits, llm, note
            "model": text,  # that wrote it; "" where none did
            "prompt": text,  # hash of what it was asked; "" where it was not
            "text": text,
        }
    ),
    "scores": pa.schema(
        {
            "feature": i32,
            "method": text,  # these three name the explanation
            "model": text,
            "prompt": text,
            "scorer": text,  # pearson, auc, simulation, detection, fuzzing …
            "judge": text,  # the model that judged; "" where none did
            "judge_prompt": text,
            "score": f32,  # null: undefined
            "control": f32,  # the same score of a shuffled explanation, or of shuffled labels; null: none
            "n": i32,  # excerpts that were scored
            "failures": i32,  # excerpts that gave no answer
        }
    ),
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
            name: table[name] if table.schema.field(name).type == text else table[name].to_numpy()
            for name in table.schema.names
        }
        self._features = self._columns["feature"]

    def rows(self, feature: int) -> dict[str, Any]:
        # In the column's own type: another one would convert all of it for each feature.
        bounds = np.array([feature, feature + 1], self._features.dtype)
        start, end = np.searchsorted(self._features, bounds)
        return {
            name: column[start:end]
            if isinstance(column, np.ndarray)
            else column.slice(start, end - start).to_pylist()
            for name, column in self._columns.items()
        }
