"""What the page says of a catalog as a whole: what it is of, where in the model, how good, and what to look at first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saekit import embedded
from saekit.errors import FileMissing, SaekitError
from saekit.files import read_json

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

EXAMPLES = 6
WELL = 0.8  # a score above which an explanation is worth a first look …
RARE, COMMON = 1e-5, 5e-3  # … and densities between which a feature tends to mean one thing
PLACES = {  # what a site is called, by the end of its name
    "hook_resid_pre": "before block {}",
    "hook_resid_mid": "inside block {}, after its attention",
    "hook_resid_post": "after block {}",
    "hook_attn_out": "what the attention of block {} adds",
    "hook_mlp_out": "what the MLP of block {} adds",
    "attn.hook_z": "the attention heads of block {}",
    "mlp.hook_post": "the neurons of block {}",
}


def is_embedded(catalog: Catalog) -> bool:
    try:
        return catalog.path.samefile(embedded.folder("catalog"))
    except FileMissing:
        return False


def shown_name(catalog: Catalog) -> str:
    """What a reader would type to open it: `tiny`, or the folder's own name without where it lies."""
    return embedded.NAME if is_embedded(catalog) else catalog.path.resolve().name


def place(site: str, blocks: int | None) -> str:
    """A site in plain words, such as "before block 3 of 6"; blocks are counted from 0, as sites count them."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    if found is None or found[2] not in PLACES:
        return site
    return PLACES[found[2]].format(found[1] if blocks is None else f"{found[1]} of {blocks}")


def blocks_of(catalog: Catalog) -> int | None:
    """How many blocks the model has, where its configuration lies on this machine."""
    folder = Path(catalog.model_name)
    try:
        folder = embedded.folder("model") if catalog.model_name == embedded.NAME else folder
        config = read_json(folder / "config.json")
    except SaekitError:
        return None
    found = config.get("num_hidden_layers", config.get("n_layer"))
    return found if isinstance(found, int) else None


def figures(catalog: Catalog) -> list[tuple[str, str, str]]:
    """(label, value, plain words) of what is known of the SAE's quality."""
    alive = catalog.density > 0
    told = [
        (
            "Alive",
            f"{int(alive.sum()):,} of {len(catalog):,}",
            "features that fired at least once on this text; the others are dead or wait for another text",
        )
    ]
    if alive.any():
        told += [
            (
                "Active at once",
                f"{catalog.density.sum():.3g}",
                "features that fire on an average token: the fewer, the easier a token's reading is to take in",
            ),
            (
                "Typical feature",
                f"1 in {1 / np.median(catalog.density[alive]):,.0f} tokens",
                "how often the feature in the middle fires, of all that do",
            ),
        ]
    metrics = _metrics(catalog)
    for name, label, words in (
        ("explained_variance", "Variance explained", "of what the model holds at this place, rebuilt from the features alone"),
        ("ce_recovered", "Predictions kept", "of the model's skill at the next word, when it has to go on from the rebuilt numbers"),
    ):  # fmt: skip
        if isinstance(value := metrics.get(name), (int, float)):
            told.append((label, f"{value:.1%}", words))
    score = catalog.score[~np.isnan(catalog.score)]
    if len(score):
        told.append(
            (
                "Explanations",
                f"{np.median(score):.2f}",
                f"median score of {len(score):,} explanations on text they were not made from: 0 is chance, 1 perfect",
            )
        )
    return told


def _metrics(catalog: Catalog) -> dict[str, Any]:
    """The held-out evaluation of the SAE, where its folder lies beside the catalog; told by the sums of its tensors."""
    sums = catalog.info["sae"].get("metadata", {}).get("sha256")
    for name in ("sae", "final"):
        folder = catalog.path.resolve().parent / name
        try:
            if sums and read_json(folder / "cfg.json").get("metadata", {}).get("sha256") == sums:
                return read_json(folder / "metrics.json")
        except SaekitError:
            continue
    return {}


def explained(catalog: Catalog) -> dict[str, int]:
    """Method → explanations by it."""
    return dict(catalog._said.methods())


def examples(catalog: Catalog) -> list[int]:
    """At most six features worth a first look, strongest first: well explained, neither rare nor common, of strengths from
    all over the range, and of those the ones that fire on words that a newcomer can place."""
    density, score, top = catalog.density, np.nan_to_num(catalog.score), catalog.max_activation
    fit = np.flatnonzero((density >= RARE) & (density <= COMMON) & (score >= WELL))
    if len(fit) < EXAMPLES:
        fit = np.flatnonzero(density > 0)
        fit = fit[np.argsort(-score[fit], kind="stable")[: 4 * EXAMPLES]]
    words = _words(catalog, fit)
    fit = fit[np.argsort(top[fit], kind="stable")]
    chosen: dict[str, int] = {}  # by the first token of the label: no two of one kind
    for part in np.array_split(fit, EXAMPLES)[::-1]:
        for i in sorted(part.tolist(), key=lambda i: (-words[i], -score[i], i)):
            if (first := catalog[i].label.partition(", ")[0]) not in chosen:
                chosen[first] = i
                break
    return list(chosen.values())


def _words(catalog: Catalog, features: NDArray[np.int64]) -> dict[int, float]:
    """Feature → the share of its activation on whole words of six letters and more that begin with a capital: names and topics
    tell a newcomer more than endings do."""
    table = catalog.table("tokens")
    good = np.array([re.fullmatch(r" [A-Z][a-z]{5,}", text) is not None for text in catalog.vocabulary])
    feature, ids = table["feature"].to_numpy(), table["token_id"].to_numpy()
    share = np.where(good[ids], table["share"].to_numpy(), 0)
    total = np.bincount(feature, share, minlength=len(catalog))
    return {i: round(float(total[i]), 1) for i in features.tolist()}
