"""A catalog as it shows itself: what it is of, how often its features fire and how well they are explained, ten to start with."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saekit.catalog.feature import Feature
from saekit.catalog.store import Catalog
from saekit.console import table
from saekit.display import html, svg
from saekit.display.terminal import SOFT, STRONG, line, listed, named, spark

TEN = 10
USUAL = (
    1e-4,
    1e-2,
)  # shares of tokens between which a feature is neither too rare nor too broad to start with
BINS = 40
RULE = "the best explained of each tenth by how often they fire, among those that fire on 0.01 % to 1 % of tokens"


def to_start_with(catalog: Catalog) -> list[Feature]:
    """Ten features worth a first look, see `RULE`; of equally explained ones (to two digits) the one that fires most strongly."""
    density, strength = catalog.density, catalog.max_activation
    score = np.round(np.nan_to_num(catalog.score, nan=-1.0), 2)
    chosen = np.flatnonzero((density >= USUAL[0]) & (density <= USUAL[1]))
    if len(chosen) < TEN:  # of a small catalog, all that fired
        chosen = np.flatnonzero(density > 0)
    often = chosen[np.argsort(-density[chosen], kind="stable")]
    tenths = [part for part in np.array_split(often, TEN) if len(part)]
    return [catalog[int(part[np.lexsort((-strength[part], -score[part]))[0]])] for part in tenths]


def facts(catalog: Catalog) -> list[tuple[str, str]]:
    """(name, value) pairs that say what the catalog is of."""
    info, density = catalog.info, catalog.density
    sae, corpus = info["sae"], info["corpus"]
    score = catalog.score[~np.isnan(catalog.score)]
    alive = int((density > 0).sum())
    told = [
        ("SAE", f"{sae['architecture']}, {sae['d_in']} → {sae['d_sae']:,}"),
        ("corpus", f"{corpus['tokens']:,} tokens of {corpus['label']}"),
        ("fired", f"{alive:,} of {len(catalog):,}"),
        ("L0", f"{float(density.sum()):.1f}"),
    ]
    if len(score):
        told.append(("scored above 0.5", f"{int((score > 0.5).sum()):,} of {len(score):,}"))
    return told


def densities(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges in log10 of the share of tokens) of the features that fired."""
    fired = catalog.density[catalog.density > 0]
    return np.histogram(np.log10(fired), BINS) if len(fired) else (np.zeros(0, int), np.zeros(1))


def scores(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges) of the scores there are, those below 0 in the first bin."""
    known = catalog.score[~np.isnan(catalog.score)]
    if not len(known):
        return np.zeros(0, int), np.zeros(1)
    return np.histogram(known.clip(0, 1), BINS, (0.0, 1.0))


# A notebook


def catalog_html(catalog: Catalog) -> str:
    """What the catalog is, two histograms, and ten features to start with."""
    head = f'<div class="say">{html.text(_title(catalog))}</div>{html.facts(facts(catalog))}'
    counts, edges = densities(catalog)
    density = svg.bars(
        _pairs(edges),
        counts.tolist(),
        [
            f"{10**a:.2g} to {10**b:.2g} of tokens: {n:,} features"
            for (a, b), n in zip(_pairs(edges), counts, strict=True)
        ],
        "how many features fire how often, log scale",
    )
    if density:
        density += svg.axis(f"{10 ** edges[0]:.2g}", "share of tokens, log scale", f"{10 ** edges[-1]:.2g}")
    counts, edges = scores(catalog)
    score = svg.bars(
        _pairs(edges),
        counts.tolist(),
        [f"{a:.3g} to {b:.3g}: {n:,} features" for (a, b), n in zip(_pairs(edges), counts, strict=True)],
        "how many features are explained how well",
    )
    if score:
        score += svg.axis("0 (chance)", "score of the explanation shown", "1")
    plots = html.titled("how often features fire", density) + html.titled(
        "how well they are explained", score
    )
    rows = [
        (
            str(f.index),
            html.text(f.explanation or ""),
            "" if f.score is None else f"{f.score:.2f}",
            f"{f.density:.3%}",
            f"{f.max_activation:.3g}",
            " ".join(html.code(t.token) for t in f.logits_top[:4]),
        )
        for f in to_start_with(catalog)
    ]
    ten = html.table(("feature", "means", "score", "fires on", "max", "raises"), rows, (0, 1, 5))
    return html.whole(
        head,
        f'<div class="columns">{plots}</div>',
        html.titled("to start with", f'<div class="soft">{html.text(RULE)}</div>', ten),
    )


def _title(catalog: Catalog) -> str:
    return f"{len(catalog):,} features of {catalog.model_name} at {catalog.site}"


def _pairs(edges: np.ndarray) -> list[tuple[float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


# A terminal


def catalog_text(catalog: Catalog) -> Group:
    """The same as coloured text."""
    told = listed((Text.assemble((f"{name} ", SOFT), line(value)) for name, value in facts(catalog)), "   ")
    rows: list[tuple[str, Text]] = []
    for name, (counts, edges), low, high in (
        ("density", densities(catalog), "{:.2g} ", " {:.2g} of tokens"),
        ("score", scores(catalog), "{:g} ", " {:g}"),
    ):
        if len(counts):
            ends = [10 ** float(e) if name == "density" else float(e) for e in (edges[0], edges[-1])]
            blocks = spark(counts.tolist())
            rows.append(
                (name, Text.assemble((low.format(ends[0]), SOFT), blocks, (high.format(ends[1]), SOFT)))
            )
    parts: list[RenderableType] = [line(_title(catalog), STRONG), told, *([named(rows)] if rows else [])]
    found = [(feature, dict[str, float]()) for feature in to_start_with(catalog)]
    if found:
        parts += [Text(""), features_table(found)]
    return Group(*parts)


def features_table(found: list[tuple[Feature, dict[str, float]]]) -> Table:
    """Features in rows, each with figures of its own (the same names in all) before those that every feature has."""
    rows = [
        (
            Text(str(f.index), STRONG),
            *(f"{value:.3g}" for value in own.values()),
            line(f.explanation or "", "cyan"),
            "" if f.score is None else f"{f.score:.2f}",
            f"{f.density:.3%}",
            f"{f.max_activation:.3g}",
            line(", ".join(repr(t.token) for t in f.logits_top[:4]), "green"),
        )
        for f, own in found
    ]
    return table(
        ["feature", *(found[0][1] if found else ()), "means", "score", "density", "max", "raises"], rows
    )
