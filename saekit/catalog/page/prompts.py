"""Texts token by token, with the features that fire on each: those of the catalog's own sample, and those given with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.firing import PER_TOKEN, firing
from saekit.catalog.page.records import short
from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog.store import Catalog

SAMPLES = 12  # texts of the catalog's sample that a page shows
LENGTH = 64  # tokens of each
GIVEN = 64  # texts that a page takes


def given(catalog: Catalog, texts: Sequence[str], model: TransformerBridge | None) -> list[dict[str, Any]]:
    """What fires on texts the catalog has not seen. model: the one it was built on, loaded by its name where none is given.

    Raises `InvalidInput` for an empty text, one longer than the model's context, too many, or another model.
    """
    if isinstance(texts, str) or any(not isinstance(text, str) or not text.strip() for text in texts):
        raise InvalidInput("prompts: expected a list of texts, none of them empty")
    if len(texts) > GIVEN:
        raise InvalidInput(f"prompts: {len(texts)} texts; a page takes {GIVEN}")
    if not texts:
        return []
    from saekit.lm import load_model

    model = load_model(catalog.model_to_load) if model is None else model
    catalog.check_fits(model)
    return [_given(catalog, text, model) for text in texts]


def _given(catalog: Catalog, text: str, model: TransformerBridge) -> dict[str, Any]:
    found = firing(model, catalog.sae, text)
    excluded = catalog.info["excluded"]  # the catalog says nothing of what features do there
    rows = [
        (token, [] if token in excluded else row)
        for token, row in zip(found.tokens, found.features, strict=True)
    ]
    if rows and rows[0][0] in excluded and not text.startswith(rows[0][0]):
        rows = rows[1:]  # what the model puts before a text is none of it
    fires = [list(zip([i for i, _ in row], short([a for _, a in row]), strict=True)) for _, row in rows]
    return {"text": text, "source": "prompt", "tokens": [token for token, _ in rows], "firing": fires}


def sampled(catalog: Catalog) -> list[dict[str, Any]]:
    """A dozen stretches of the rows of which the catalog holds all activations, spread over them."""
    rows = np.array(catalog.info["sample"]["rows"], np.int64)
    if len(rows) > SAMPLES:
        rows = rows[np.linspace(0, len(rows) - 1, SAMPLES).round().astype(int)]
    table = catalog.table("sample")
    here = np.isin(table["row"].to_numpy(), rows)
    sample = {name: table[name].to_numpy()[here] for name in table.column_names}
    corpus = catalog.table("corpus")
    documents, special = corpus["document"].to_numpy(), list(catalog.info["excluded"].values())
    ids, starts = catalog._corpus
    made = []
    for row in rows.tolist():
        begin, end = int(starts[row]), int(starts[row + 1])
        first, last = _readable(catalog, ids[begin:end], documents[begin:end], special)
        if first == last:
            continue
        tokens = [catalog.vocabulary[i] for i in ids[begin + first : begin + last].tolist()]
        at = np.flatnonzero(
            (sample["row"] == row) & (sample["position"] >= first) & (sample["position"] < last)
        )
        at = at[np.lexsort((sample["feature"][at], -sample["activation"][at]))]
        fires: list[list[tuple[int, float]]] = [[] for _ in tokens]
        figures = (sample["position"][at] - first, sample["feature"][at], short(sample["activation"][at]))
        for token, feature, activation in zip(*(list(column) for column in figures), strict=True):
            if len(fires[token]) < PER_TOKEN:
                fires[token].append((int(feature), activation))
        made.append({"text": "".join(tokens), "source": "sample", "tokens": tokens, "firing": fires})
    return made


def _readable(
    catalog: Catalog, ids: NDArray[np.int32], documents: NDArray[np.int64], special: list[int]
) -> tuple[int, int]:
    """[first, last) of the longest stretch of one document, cut to `LENGTH`: at the end of a sentence where one ends late enough."""
    outside = np.isin(ids, special) | (documents < 0)
    group = np.cumsum(np.diff(documents, prepend=documents[:1]) != 0) + np.cumsum(outside)
    inside = np.flatnonzero(~outside)
    if not len(inside):
        return 0, 0
    longest = np.bincount(group[inside]).argmax()
    own = inside[group[inside] == longest]
    first, last = int(own[0]), int(own[-1]) + 1
    if last - first <= LENGTH:
        return first, last
    ends = [
        i + 1
        for i in range(first + LENGTH // 2, first + LENGTH)
        if catalog.vocabulary[int(ids[i])].strip().endswith((".", "!", "?"))
    ]
    return first, ends[-1] if ends else first + LENGTH
