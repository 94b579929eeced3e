"""What of a catalog is told to others: its description without what only this machine knows, and the card beside it.

The card says what the catalog holds, what its numbers mean and do not mean, how to open it and how to steer with it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from saekit import embedded
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMAS
from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

TAGS = ["saekit", "sparse-autoencoder", "mechanistic-interpretability", "interpretability", "steering"]
GOOD = 0.5  # scores above it are counted
SNAPSHOT = re.compile(r"models--(.+?)[\\/]snapshots[\\/]")  # of the hub, in the hub's cache
PATH = re.compile(
    r"(file:|[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\])"
)  # how a path begins that no hub id begins with

# The identifiers of licences that the hub knows, as far as texts come under them; others go by name.
LICENCES = set(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 "
    "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-permissive-1.0 "
    "cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl "
    "lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl odbl odc-by openrail other pddl unknown unlicense wtfpl zlib".split()
)
SIZES = [
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
]

TABLES = {
    "features": "one row per feature: density, maximum, mean, label",
    "contexts": "stretches of corpus rows around a peak: the strongest (band 0), and a sample of each band of the active range",
    "activations": "the non-zero activations inside those contexts",
    "corpus": "token ids of the corpus rows that contexts and the sample refer to",
    "sample": "all activations on a few corpus rows, drawn whatever fires there",
    "tokens": "the tokens a feature fires on: count, mean activation, share",
    "evidence": "what a feature is expected to be on a token, from the documents that explain, not from those that score",
    "logits": "the tokens that a feature's direction raises and lowers most",
    "histograms": "counts of activations in logarithmic bins, and of effects on logits in even ones",
    "neighbours": "the nearest features by cosine of their directions, and by firing on the same tokens",
    "neurons": "the neurons that a feature's direction lies along, where the site is an MLP's",
    "explanations": "what features are said to mean, by which method",
    "scores": "how well explanations predict their features, a control beside each",
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

catalog = saekit.Catalog.open({repository})   # fetches a table when it is first asked for
for feature in catalog.search("night"):
    print(feature)
```

The tables are flat Parquet files, which other tools read as they lie:

```python
import datasets, duckdb, pandas, polars

datasets.load_dataset({repository}, "features", split="train")
duckdb.sql("SELECT feature, label, density FROM '{address}/features.parquet' ORDER BY density DESC LIMIT 20")
pandas.read_parquet("{address}/features.parquet")
polars.scan_parquet("{address}/features.parquet")
```

## Steer with it

```python
model = saekit.load_model({model_string})
print(saekit.compare(model, "Once upon a time", catalog[{feature}].add(1, unit="max")))
```

{which_model}

## Tables

| table | holds |
|---|---|
{tables}

`{directions}` holds the autoencoder's tensors: `W_dec` [{d_sae}, {d_out}] has one direction per row.
`{catalog}` names model, autoencoder and corpus with their hashes, and the SHA-256 sums of the other files.

{metrics}## Explanations

{scores}

## What the numbers mean

{definitions}

Excluded from every number: {excluded}.{sinks}

## Corpus and licence

{licence}

## Limits

- Contexts quote the corpus {corpus}. Its licence, and whatever it says, come with it.
- Densities, contexts and scores hold for this corpus; a feature that never fired here may fire elsewhere.
- Labels made of top tokens say what a feature fires on, not what it means to the model.
- Effects on logits are those of the direction alone, straight through the unembedding; what later layers make of it is
  not in them.
- Neighbours by firing are estimated from a sample of each feature's firings.
- Directions fit the model with the hash in `{catalog}`, at that site, and no other.
"""


def card(
    catalog: Catalog,
    repository: str,
    *,
    licence: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """README.md for the dataset `repository`: front matter with one configuration per table, then the text.

    licence: of the corpus, in place of what the catalog says. metrics: the SAE's evaluation, as `saekit.evaluate` gives it.
    Raises `InvalidInput` for metrics that are no finite numbers, or an empty licence.
    """
    info = public(catalog.info)
    sae, corpus, model = info["sae"], info["corpus"], info["model"]
    licence = corpus.get("licence") if licence is None else licence
    title = f"Features of {model['name']} at {info['site']}"
    front = {
        "pretty_name": " ".join(title.split()),  # one line
        **_licence(licence),
        "tags": TAGS,
        "size_categories": [next((name for n, name in SIZES if catalog.d_sae < n), "n>10M")],
        "configs": [
            {"config_name": name, "data_files": f"{name}.parquet", "default": name == "features"}
            for name in SCHEMAS
            if pq.read_metadata(catalog._file(f"{name}.parquet")).num_rows  # `datasets` reads no empty table
        ],
    }
    body = BODY.format(
        title=f"Features of {_code(model['name'])} at {_code(info['site'])}",
        model=_code(model["name"]),
        model_string='"path/to/your/copy"' if model.get("local") else json.dumps(model["name"]),
        which_model=_which_model(model),
        repository=json.dumps(repository),
        address=f"hf://datasets/{repository}",
        site=_site(info),
        architecture=_code(sae.get("architecture")),
        d_in=sae["d_in"],
        d_out=sae.get("d_out", sae["d_in"]),
        d_sae=catalog.d_sae,
        tokens=corpus["tokens"],
        corpus=_code(corpus["label"]),
        alive=int((catalog.density > 0).sum()),
        feature=int(catalog.max_activation.argmax()),
        tables="\n".join(f"| `{name}` | {TABLES[name]} |" for name in SCHEMAS),
        directions=DIRECTIONS,
        catalog=CATALOG,
        metrics=_metrics(metrics),
        scores=_scores(catalog),
        definitions="\n".join(
            f"- **{name}**: {' '.join(str(text).split())}" for name, text in info["definitions"].items()
        ),
        excluded=", ".join(map(_code, info["excluded"])) or "nothing",
        sinks=_sinks(info),
        licence=_about_licence(licence),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{body}"


# What leaves this machine


def public(info: Mapping[str, Any]) -> dict[str, Any]:
    """`catalog.json` without paths of the machine on which it was built.

    A model from a local folder keeps the folder's own name, and `model.local` says that the name alone will not find it;
    one from a snapshot in the hub's cache gets its hub id back. Any other path in what is said about model, autoencoder
    and corpus is cut to its last part.
    """
    told = copy.deepcopy(dict(info))
    name = str(told["model"]["name"])
    if shown := _hub_id(name):
        told["model"]["name"] = shown
    elif _is_local(name):
        shown = _base(name)
        told["model"] |= {"name": shown, "local": True}
    for part in ("model", "sae", "corpus"):
        told[part] = _cut(told[part], name, shown or name)
    return told


def _hub_id(name: str) -> str | None:
    found = SNAPSHOT.search(name)
    return found[1].replace("--", "/") if found else None


def _is_local(name: str) -> bool:
    """As `load_model` tells a folder from a hub id; a folder that lies here is one, too."""
    if name == embedded.NAME:
        return False
    return bool(PATH.match(name)) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()


def _base(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "model"


def _cut(value: Any, name: str, shown: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _cut(item, name, shown) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cut(item, name, shown) for item in value]
    if not isinstance(value, str):
        return value
    if name != shown:
        value = value.replace(name, shown)
    return _base(value) if PATH.match(value) else value


# Parts of the card


def _which_model(model: Mapping[str, Any]) -> str:
    known = (
        "The model was read from a local folder of that name; `load_model` takes the path of your copy. "
        if model.get("local")
        else ""
    )
    return (
        f"{known}Directions fit weights with the hash {_code(model['hash'])}; `catalog.check_fits(model)` says whether "
        "yours are these."
    )


def _site(info: Mapping[str, Any]) -> str:
    written = info.get("target_site", info["site"])
    return _code(info["site"]) + (
        "" if written == info["site"] else f" (its directions write to {_code(written)})"
    )


def _licence(licence: str | None) -> dict[str, str]:
    """The front matter's keys: the hub refuses identifiers that it does not know."""
    if licence is None:
        return {}
    if not isinstance(licence, str) or not (text := " ".join(licence.split())):
        raise InvalidInput(f"licence: expected a name such as 'cc-by-4.0', got {licence!r}")
    if text.lower() in LICENCES:
        return {"license": text.lower()}
    return {
        "license": "other",
        "license_name": re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "other",
    }


def _about_licence(licence: str | None) -> str:
    if licence is None:
        return "This catalog does not know the licence of the corpus. Look it up before you share what contexts quote."
    return (
        f"The corpus comes under {_code(' '.join(licence.split()))}, and so does what contexts quote of it."
    )


def _sinks(info: Mapping[str, Any]) -> str:
    sinks = info.get("sinks")
    if not sinks:
        return ""
    return (
        f" Tokens with a norm above {sinks['norm_above']:g} times the median, attention sinks, are counted "
        f"({sinks['tokens']:,} of them); `norm` in the contexts tells them."
    )


def _metrics(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise InvalidInput(f"metrics: {name} is {value!r}; expected names and finite numbers")
    rows = "\n".join(f"| {_cell(name)} | {value:.4g} |" for name, value in metrics.items())
    return f"## The autoencoder, evaluated\n\n| metric | value |\n|---|---|\n{rows}\n\n"


def _scores(catalog: Catalog) -> str:
    rows = score_summary(catalog)
    if not rows:
        return "No explanation in this catalog is scored."
    lines = [
        f"| {_cell(row['method'])} | {_cell(row['model'] or '–')} | {_cell(row['scorer'])} | {_cell(row['judge'] or '–')} "
        f"| {row['features']:,} | {row['above']:,} | {_count(row['control_above'])} | {row['median']} | {row['undefined']:,} |"
        for row in rows
    ]
    head = (
        "| explained by | model | scorer | judge | features scored | above 0.5 | control above 0.5 | median | undefined |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return (
        f"{head}{chr(10).join(lines)}\n\n"
        "A control is the same score of a shuffled explanation, or of shuffled labels: what chance gives. Where it is near "
        "the score, the explanation says nothing. Chance is 0 for correlations and 0.5 for `auc` and balanced accuracy."
    )


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def score_summary(catalog: Catalog) -> list[dict[str, Any]]:
    """Per method, model, scorer and judge: how many features score above 0.5, and how many of the controls do.

    A feature with several explanations by one method counts once, by its best. Undefined scores count as no score.
    """
    keys = ("method", "model", "scorer", "judge")
    table = catalog.table("scores")
    groups = table.group_by([*keys, "feature"]).aggregate([("score", "max"), ("control", "max")])
    columns = {name: np.array(groups[name].to_pylist(), object) for name in keys}
    score = groups["score_max"].to_numpy().astype(np.float64)  # null: NaN
    control = groups["control_max"].to_numpy().astype(np.float64)
    found = []
    for key in sorted(set(zip(*columns.values(), strict=True))):
        here = np.logical_and.reduce([columns[name] == value for name, value in zip(keys, key, strict=True)])
        defined = here & ~np.isnan(score)
        controlled = here & ~np.isnan(control)
        found.append(
            {
                **dict(zip(keys, key, strict=True)),
                "features": int(defined.sum()),
                "above": int((score[defined] > GOOD).sum()),
                "control_above": int((control[controlled] > GOOD).sum()) if controlled.any() else None,
                "median": f"{np.median(score[defined]):.2f}" if defined.any() else "–",
                "undefined": int((here & np.isnan(score)).sum()),
            }
        )
    return found


def _code(text: Any) -> str:
    """Text as a Markdown code span that it cannot break out of."""
    shown = json.dumps(str(text), ensure_ascii=False)[1:-1].replace("`", "'")
    return f"`{shown}`"


def _cell(text: Any) -> str:
    """The same in a table."""
    return _code(text).replace("|", r"\|")
