"""A feature as it shows itself: what it means and how well that is known, what it fires on, what it moves, what is near it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saekit.catalog.feature import Context, Feature
from saekit.console import ContextText
from saekit.display import html, svg
from saekit.display.terminal import DOWN, SOFT, STRONG, UP, line, listed, named, spark, token

if TYPE_CHECKING:
    from saekit.catalog.relations import Neighbour
    from saekit.catalog.said import Explanation

CONTEXTS, OPEN = 10, 4  # shown, and of those how many without a click
TOKENS = 900  # of contexts together in a notebook: a record stays small, whatever the window
AROUND = 160  # tokens of one context at most
ROWS = 8
NEAR = 5


def shown_explanation(feature: Feature) -> Explanation | None:
    """The explanation that is shown, with its scores; None for a feature without one."""
    told = feature.explanation
    return next((e for e in feature.explanations if e.text == told and e.score == feature.score), None)


def how_said(feature: Feature) -> str:
    """Who says what is shown, and how well each scorer finds that it predicts the feature."""
    said = shown_explanation(feature)
    if said is None:
        return ""
    by = f"explained by {said.method}" + (f" ({said.model})" if said.model else "")
    scores = [
        f"{s.scorer} {s.score:.2f}" + ("" if s.control is None else f" (shuffled {s.control:.2f})")
        for s in said.scores
        if s.score is not None
    ]
    return ", ".join([by, *scores])


def _figures(feature: Feature) -> list[tuple[str, str]]:
    score = [] if feature.score is None else [("score", f"{feature.score:.2f}")]
    return [
        *score,
        ("fires on", f"{feature.density:.3%} of tokens"),
        ("max", f"{feature.max_activation:.3g}"),
        ("mean where it fires", f"{feature.mean_activation:.3g}"),
    ]


# A notebook


def feature_html(feature: Feature) -> str:
    """The record as HTML, below 60 kB: contexts beyond `TOKENS` tokens are left out, and of long ones the ends."""
    catalog = feature.catalog
    what = f"feature {feature.index} of {catalog.model_name} at {catalog.site}"
    head = (
        f'<div class="soft">{html.text(what)}</div>'
        f'<div class="say">{html.text(feature.explanation or "never fired")}</div>'
        f"{html.facts(_figures(feature))}"
    )
    if how := how_said(feature):
        head += f'<div class="soft">{html.text(how)}</div>'
    side = [
        _histogram(feature),
        html.titled("fires on", _tokens(feature)),
    ]
    below = [
        _effects("raises", feature, 1),
        _effects("lowers", feature, -1),
        f'<div class="wide">{html.titled("near it, by direction", _near(feature, feature.neighbours, "cosine"))}</div>',
    ]
    columns = [f'<div class="wide">{_contexts(feature)}</div>', f'<div class="side">{"".join(side)}</div>']
    return html.whole(
        head,
        f'<div class="columns">{"".join(columns)}</div>' if feature.contexts else "",
        f'<div class="columns">{"".join(below)}</div>',
        html.folded("features that fire on the same tokens", _near(feature, feature.coactive, "Jaccard")),
    )


def _contexts(feature: Feature) -> str:
    """The strongest contexts, and one of each band below; as many as `TOKENS` allows, at least one."""
    left = TOKENS
    parts = list[str]()
    for context in feature.contexts[:CONTEXTS]:
        left -= min(AROUND, len(context.tokens))
        if left < 0 and parts:
            break
        parts.append(_context(context, feature.max_activation))
    bands = list[str]()
    for band in reversed(feature.bands):
        if not band.contexts or (left := left - min(AROUND, len(band.contexts[0].tokens))) < 0:
            continue
        about = f"{band.low:.3g} to {band.high:.3g}, about {band.share:.1%} of its firings"
        bands.append(html.titled(about, _context(band.contexts[0], feature.max_activation)))
    more = f"{len(parts) - OPEN} more"
    return (
        html.titled("strongest contexts", *parts[:OPEN])
        + html.folded(more, *parts[OPEN:])
        + html.folded("one from each part of its range", *bands)
    )


def _context(context: Context, top: float) -> str:
    start = max(0, min(context.peak - AROUND // 2, len(context.tokens) - AROUND))
    shown = slice(start, start + AROUND)
    tokens = (
        (name, a / top if top > 0 else 0.0, f"{a:.3g}")
        for name, a in zip(context.tokens[shown], context.activations[shown], strict=True)
    )
    sink = (
        f'<br><span title="an attention sink: {context.norm:.3g} times the median norm">sink</span>'
        if context.sink
        else ""
    )
    value = f"<div>{context.max_activation:.3g}{sink}</div>"
    return f'<div class="context">{value}{html.run(html.grounds(tokens, context.peak - start))}</div>'


def _histogram(feature: Feature) -> str:
    bins = feature.histogram
    if not bins:
        return ""
    edges = [(math.log10(b.low), math.log10(b.high)) for b in bins]
    titles = [f"{b.low:.3g} to {b.high:.3g}: {b.count:,} tokens" for b in bins]
    drawn = svg.bars(edges, [b.count for b in bins], titles, "histogram of activations, log scale")
    return html.titled(
        "activations where it fires",
        drawn,
        svg.axis(f"{bins[0].low:.2g}", "log scale", f"{bins[-1].high:.2g}"),
    )


def _tokens(feature: Feature) -> str:
    rows = [
        (html.code(t.token), f"{t.mean_activation:.3g}", f"{t.count:,}", f"{t.share:.2%}")
        for t in feature.top_tokens[:ROWS]
    ]
    return html.table(("token", "mean", "times", "of all"), rows)


def _effects(name: str, feature: Feature, sign: int) -> str:
    found = feature.logits_top if sign > 0 else feature.logits_bottom
    rows = [(html.code(t.token), f"{t.effect:+.3g}") for t in found[:ROWS]]
    return html.titled(name, html.table(("token", "logit"), rows))


def _near(feature: Feature, near: Sequence[Neighbour], by: str) -> str:
    rows = [
        (
            str(n.feature),
            f"{n.similarity:.2f}",
            html.text(feature.catalog[n.feature].explanation or "never fired"),
        )
        for n in near[:NEAR]
    ]
    return html.table(("feature", by, "means"), rows, (0, 2))


# A terminal


def feature_text(feature: Feature, *, bands: bool = False) -> Group:
    """The record as coloured text. bands: also the contexts drawn from each part of the active range."""
    head = Text.assemble(
        (f"feature {feature.index}", STRONG), "  ", line(feature.explanation or "never fired", "bold cyan")
    )
    facts = listed((Text.assemble((f"{name} ", SOFT), value) for name, value in _figures(feature)), "   ")
    rows: list[tuple[str, Text]] = []
    if how := how_said(feature):
        rows.append(("said", line(how)))
    if bins := feature.histogram:
        ends = f"{bins[0].low:.2g} ", f" {bins[-1].high:.2g}"
        rows.append(
            ("values", Text.assemble((ends[0], SOFT), spark([b.count for b in bins]), (ends[1], SOFT)))
        )
    if feature.top_tokens:
        stats = (
            Text.assemble(token(t.token), (f" {t.mean_activation:.3g} ×{t.count:,}", SOFT))
            for t in feature.top_tokens[:6]
        )
        rows.append(("tokens", listed(stats)))
    for name, effects, style in (("raises", feature.logits_top, UP), ("lowers", feature.logits_bottom, DOWN)):
        if effects:
            rows.append((name, listed(token(t.token, style) for t in effects[:ROWS])))
    for name, near in (("near", feature.neighbours), ("with", feature.coactive)):
        if near:
            rows.append((name, listed(_neighbours(feature, near[:4]), "\n")))
    if feature.neurons:
        rows.append(("neurons", listed(Text(f"{n.neuron} ({n.cosine:+.2f})") for n in feature.neurons[:5])))
    parts: list[RenderableType] = [head, facts, *([named(rows)] if rows else [])]
    if feature.contexts:
        parts += [Text(""), _contexts_text(feature.contexts[:CONTEXTS], feature.max_activation)]
    for band in reversed(feature.bands) if bands else ():
        parts.append(
            Text(f"\n{band.low:.3g} to {band.high:.3g}, about {band.share:.1%} of its firings", SOFT)
        )
        parts.append(_contexts_text(band.contexts, feature.max_activation))
    return Group(*parts)


def _neighbours(feature: Feature, near: Iterable[Neighbour]) -> Iterable[Text]:
    for n in near:
        means = line(feature.catalog[n.feature].explanation or "never fired", SOFT)
        yield Text.assemble(f"{n.feature:<6} {n.similarity:.2f}  ", means)


def _contexts_text(contexts: Sequence[Context], top: float) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True, style=SOFT)
    grid.add_column(overflow="fold", ratio=1)
    for context in contexts:
        sink = " (sink)" if context.sink else ""
        grid.add_row(f"{context.max_activation:.3g}{sink}", ContextText(context, top))
    return grid
