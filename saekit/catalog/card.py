"""The card of a published catalog: what it holds, what the numbers mean, how to open it and steer with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from saekit.catalog.tables import SCHEMAS

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

TAGS = ["saekit", "sparse-autoencoder", "interpretability", "steering"]

TABLES = {
    "features": "one row per feature: density, maximum, mean, label",
    "contexts": "the strongest contexts: a stretch of a corpus row, and where in it the peak is",
    "activations": "the non-zero activations inside those contexts",
    "corpus": "token ids of the corpus rows that contexts refer to",
    "tokens": "the tokens a feature fires on: count, mean activation, share",
    "logits": "the tokens that a feature's direction raises and lowers most",
    "histograms": "activation counts in logarithmic bins",
    "neighbours": "the nearest directions by cosine",
    "explanations": "what features are said to mean, by which method, with which score",
    "vocabulary": "the text of each token id",
}

BODY = """\
# {title}

A catalog of the {d_sae:,} features of a sparse autoencoder ({architecture}, {d_in:,} → {d_sae:,}), read at {site} of
the language model {model}, over {tokens:,} tokens of {corpus}. {alive:,} features fired. Made with
saekit (`pip install saekit`).

## Open it

```python
import saekit

catalog = saekit.Catalog.open({repository})
for feature in catalog.search("night"):
    print(feature)
```

The tables read as they lie with DuckDB, pandas, polars and `datasets.load_dataset({repository}, "features")`.

## Steer with it

```python
model = saekit.load_model({model_string})
print(saekit.compare(model, "Once upon a time", catalog[{feature}].add(1, unit="max")))
```

## Tables

| table | holds |
|---|---|
{tables}

`directions.safetensors` holds the autoencoder's tensors: `W_dec` [{d_sae}, {d_in}] has one direction per row.
`catalog.json` names model, autoencoder and corpus with their hashes.

## What the numbers mean

{definitions}

Excluded from every number: {excluded}.

## Limits

- Contexts quote the corpus {corpus}. Its licence, and whatever it says, come with it.
- Densities and contexts hold for this corpus; a feature that never fired here may fire elsewhere.
- Labels made of top tokens say what a feature fires on, not what it means to the model.
- Directions fit the model with the hash in `catalog.json`, at that site, and no other.
"""


def card(catalog: Catalog, repository: str) -> str:
    """README.md for the dataset `repository`: front matter with one configuration per table, then the text."""
    info = catalog.info
    sae, corpus = info["sae"], info["corpus"]
    front = {
        "pretty_name": " ".join(f"Features of {catalog.model_name} at {catalog.site}".split()),  # one line
        "tags": TAGS,
        "configs": [
            {"config_name": name, "data_files": f"{name}.parquet", "default": name == "features"}
            for name in SCHEMAS
        ],
    }
    body = BODY.format(
        title=f"Features of {_code(catalog.model_name)} at {_code(catalog.site)}",
        model=_code(catalog.model_name),
        model_string=json.dumps(catalog.model_name),
        repository=json.dumps(repository),
        site=_code(catalog.site),
        architecture=sae.get("architecture"),
        d_in=sae["d_in"],
        d_sae=catalog.d_sae,
        tokens=corpus["tokens"],
        corpus=_code(corpus["label"]),
        alive=int((catalog.density > 0).sum()),
        feature=int(catalog.max_activation.argmax()),
        tables="\n".join(f"| `{name}` | {TABLES[name]} |" for name in SCHEMAS),
        definitions="\n".join(f"- **{name}**: {text}" for name, text in info["definitions"].items()),
        excluded=", ".join(map(_code, info["excluded"])) or "nothing",
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


def _code(text: Any) -> str:
    """Text as a Markdown code span that it cannot break out of."""
    shown = json.dumps(str(text), ensure_ascii=False)[1:-1].replace("`", "'")
    return f"`{shown}`"
