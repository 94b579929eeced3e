"""A state and what the weights say → the tables of a catalog, each sorted, so that the same build gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saekit.catalog.accumulate import SINK, State, bin_edges, rank_in_group
from saekit.catalog.stream import Position
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, SCHEMAS, write_table
from saekit.catalog.weights import Weights, write_vocabulary
from saekit.files import sha256_of_file, write_json, write_tensors

TOKENS_PER_LATENT, AT_LEAST = 20, 2  # occurrences, before a token enters the token table
EVIDENCE_PER_LATENT = 32
NEIGHBOURS_PER_LATENT = 10  # by firing
IN_LABEL = 3  # tokens
GROWING = ("explanations", "scores")  # tables that are added to when the catalog is there

DEFINITIONS = {
    "density": "share of evaluated tokens (all but the excluded ones) on which the feature is active",
    "contexts": "band 0: the strongest, at most one per document; band b of n: a draw from the activations in "
    "((b - 1)/n, b/n] of the maximum, at most one per document",
    "norm": "L2 norm of the activations at the peak over median_norm; far above 1 it is a sink",
    "median_norm": "median L2 norm of the activations at the site over evaluated tokens (a draw of 65,536, where there are more)",
    "sinks": "evaluated tokens whose norm is above norm_above times median_norm: flagged, not left out",
    "sample": "rows of the corpus, drawn, of which all activations on evaluated tokens are kept",
    "tokens": "by mean activation where the feature is active; tokens with at least two occurrences",
    "share": "share of the feature's summed activation that falls on the token",
    "evidence": "by summed activation over explaining documents; expected: that sum over the token's occurrences there",
    "effect": "decoder direction, centred for LayerNorm and times the final norm's gain, through W_U",
    "decoder": "neighbours by cosine of the decoder directions",
    "firing": "neighbours by Jaccard index of the tokens on which two features fire, estimated from 256 draws of each; "
    "exact where neither fires on more",
    "neurons": "cosine of the decoder direction with a neuron's direction at the site, by magnitude",
    "draws": "lowest SplitMix64 of (row) or of (row, position); documents explain or are held out by it too",
}

Columns = dict[str, Any]


def write_catalog(
    folder: Path, state: State, weights: Weights, origin: Mapping[str, Any], end: Position
) -> None:
    """Write all of a catalog into an empty folder. origin: the arguments of the build; end: where its corpus ended."""
    write_tensors(folder / DIRECTIONS, weights.tensors)
    weights.tensors.clear()  # the largest thing in memory, and nobody needs it any more
    write_vocabulary(folder, weights.vocabulary)
    labels = _write_tokens(folder, state, weights.vocabulary)
    _write_features(folder, state, weights, labels)
    sample_rows = _write_text(folder, state)
    _write_histograms(folder, state, weights)
    _write_neighbours(folder, state, weights)
    write_table(folder, "logits", _logits(weights))
    write_table(folder, "neurons", _neurons(weights))
    for name in GROWING:
        write_table(folder, name, {column: [] for column in SCHEMAS[name].names})
    files = [path for path in sorted(folder.iterdir()) if path.stem not in GROWING]
    description = {
        "schema": SCHEMA_VERSION,
        **weights.about,
        "corpus": {
            "label": origin["corpus"]["label"],
            "tokens": state.tokens,
            "rows": end.rows,
            "context_size": end.context_size,
            "licence": origin["corpus"]["licence"],
        },
        "excluded": origin["excluded"],
        "median_norm": state.median_norm(),
        "sinks": {"norm_above": SINK, "tokens": state.sinks},
        "contexts": {
            "per_feature": origin["contexts"], **{key: origin[key] for key in ("window", "bands", "per_band")}
        },
        "sample": {"rows": sample_rows},
        "seeds": {"draws": 0},
        "definitions": DEFINITIONS,
        "files": {path.name: sha256_of_file(path) for path in files},
    }  # fmt: skip
    write_json(folder / CATALOG, description)


# What comes from the text


def _write_text(folder: Path, state: State) -> list[int]:
    """Contexts, the sample, and the corpus rows they refer to, numbered anew; returns the sample's rows."""
    found, sample, rows = state.contexts(), state.sample(), state.rows()

    def number(row: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(rows.rows, row)

    columns = {
        "feature": found.feature, "band": found.band, "rank": found.rank, "document": found.document,
        "row": number(found.row), "start": found.start, "length": found.length, "peak": found.peak,
        "max_activation": found.value, "norm": found.norm,
    }  # fmt: skip
    write_table(folder, "contexts", columns)
    columns = {
        **{name: getattr(found, name)[found.which] for name in ("feature", "band", "rank")},
        "offset": found.offset, "activation": found.activation,
    }  # fmt: skip
    write_table(folder, "activations", columns)
    R, T = rows.ids.shape
    columns = {
        "row": np.repeat(np.arange(R), T), "position": np.tile(np.arange(T), R),
        "token_id": rows.ids.ravel(), "document": rows.documents.ravel(),
    }  # fmt: skip
    write_table(folder, "corpus", columns)
    columns = {
        "feature": sample.feature, "row": number(sample.row), "position": sample.position,
        "activation": sample.activation,
    }  # fmt: skip
    write_table(folder, "sample", columns)
    return [int(row) for row in number(sample.rows)]


def _write_tokens(folder: Path, state: State, vocabulary: list[str]) -> list[str]:
    """The token table and the evidence; returns each latent's label: the tokens with the largest shares of it."""
    top = state.tokens_top(TOKENS_PER_LATENT, AT_LEAST)
    share = top.sum / np.maximum(1e-30, state.moments.sum[top.feature])
    columns = {
        "feature": top.feature, "rank": top.rank, "token_id": top.token_id, "count": top.count,
        "mean_activation": top.value, "share": share,
    }  # fmt: skip
    write_table(folder, "tokens", columns)
    known = state.evidence_top(EVIDENCE_PER_LATENT)
    columns = {
        "feature": known.feature, "rank": known.rank, "token_id": known.token_id, "count": known.count,
        "expected": known.value,
    }  # fmt: skip
    write_table(folder, "evidence", columns)
    order = np.lexsort((-share, top.feature))
    kept = order[rank_in_group(top.feature[order]) < IN_LABEL]
    labels: list[list[str]] = [[] for _ in state.moments.count]
    for latent, token in zip(top.feature[kept].tolist(), top.token_id[kept].tolist(), strict=True):
        labels[latent].append(vocabulary[token].strip() or repr(vocabulary[token]))
    return [", ".join(label) for label in labels]


def _write_features(folder: Path, state: State, weights: Weights, labels: list[str]) -> None:
    moments, cosine = state.moments, weights.encoder_cosine
    columns = {
        "feature": np.arange(len(labels)), "density": moments.count / state.tokens, "count": moments.count,
        "max_activation": moments.max, "mean_activation": moments.mean(), "std_activation": moments.std(),
        "decoder_norm": weights.decoder_norm,
        "encoder_cosine": [None if np.isnan(c) else c for c in cosine.tolist()] if np.isnan(cosine).any() else cosine,
        "label": labels,
    }  # fmt: skip
    write_table(folder, "features", columns)


def _write_histograms(folder: Path, state: State, weights: Weights) -> None:
    """Bins with something in them, of each latent those of activations first."""
    latents, bins = (index.astype(np.int32) for index in np.nonzero(state.moments.histogram))
    edges = bin_edges().astype(np.float32)
    columns: dict[str, list[NDArray[Any]]] = {
        "feature": [latents], "of": [np.zeros(len(latents), np.int8)], "low": [edges[bins]], "high": [edges[bins + 1]],
        "count": [state.moments.histogram[latents, bins]],
    }  # fmt: skip
    if (effects := weights.effects) is not None:
        owners, at = (index.astype(np.int32) for index in np.nonzero(effects.counts))
        width = (effects.high.astype(np.float64) - effects.low) / effects.counts.shape[1]
        ends = [(effects.low[owners] + (at + end) * width[owners]).astype(np.float32) for end in (0, 1)]
        own = (owners, np.ones(len(owners), np.int8), *ends, effects.counts[owners, at])
        for column, values in zip(columns.values(), own, strict=True):
            column.append(values)
    feature = np.concatenate(columns.pop("feature"))
    order = np.argsort(feature, kind="stable")  # activations first
    sorted_: Columns = {name: np.concatenate(parts)[order] for name, parts in columns.items()}
    sorted_["of"] = _words(("activation", "effect"), sorted_["of"])
    write_table(folder, "histograms", {"feature": feature[order], **sorted_})


def _write_neighbours(folder: Path, state: State, weights: Weights) -> None:
    """Of each latent those by decoder first."""
    index, cosine = weights.neighbours
    S, k = index.shape
    firing = state.firing_neighbours(NEIGHBOURS_PER_LATENT)
    kind = np.r_[np.zeros(S * k, np.int64), np.ones(len(firing.feature), np.int64)]
    feature = np.r_[np.repeat(np.arange(S), k), firing.feature]
    rank = np.r_[np.tile(np.arange(k), S), firing.rank]
    order = np.lexsort((rank, kind, feature))
    columns = {
        "feature": feature[order], "by": _words(("decoder", "firing"), kind[order]), "rank": rank[order],
        "neighbour": np.r_[index.ravel(), firing.neighbour][order],
        "similarity": np.r_[cosine.ravel(), firing.similarity][order],
    }  # fmt: skip
    write_table(folder, "neighbours", columns)


def _words(words: tuple[str, ...], kind: NDArray[np.int64]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(kind, pa.int8()), pa.array(words)).cast(pa.string())


# What comes from the weights


def _logits(weights: Weights) -> Columns:
    if (effects := weights.effects) is None:
        return _nothing("logits")
    S, k = effects.raised_ids.shape
    return {
        "feature": np.repeat(np.arange(S), 2 * k),
        "rank": np.tile(np.r_[np.arange(k), np.arange(k)], S),
        "raised": np.tile(np.r_[np.ones(k, bool), np.zeros(k, bool)], S),
        "token_id": np.concatenate([effects.raised_ids, effects.lowered_ids], axis=1).ravel(),
        "effect": np.concatenate([effects.raised, effects.lowered], axis=1).ravel(),
    }


def _neurons(weights: Weights) -> Columns:
    if weights.neurons is None:
        return _nothing("neurons")
    index, cosine = weights.neurons
    S, k = index.shape
    return {
        "feature": np.repeat(np.arange(S), k),
        "rank": np.tile(np.arange(k), S),
        "neuron": index.ravel(),
        "cosine": cosine.ravel(),
    }


def _nothing(name: str) -> Columns:
    return {column: [] for column in SCHEMAS[name].names}
