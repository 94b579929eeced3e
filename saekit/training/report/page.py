"""The report as one HTML file: its style and its pictures are in it, it runs no script and asks for nothing."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from saekit.evaluation import Evaluation
from saekit.lens.tokens import visible
from saekit.members import Member
from saekit.recipe import Recipe
from saekit.sae import SAE
from saekit.training.report import panels
from saekit.training.report.features import Example, Excerpt
from saekit.training.report.rows import History
from saekit.training.report.words import HEADLINE, measured, opening, sentences

STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SILENT = 0.03  # of the peak: weaker tokens get no ground


def page(
    recipe: Recipe,
    member: Member,
    sae: SAE,
    history: History,
    evaluation: Evaluation,
    shown: Sequence[Example],
) -> str:
    """The file's text."""
    title = " · ".join(filter(None, (recipe.name, member.name)))
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="generator" content="saekit">',
        f"<title>{_text(title)}</title>",
        f"<style>\n{STYLE.read_text('utf-8')}</style>",
        "<header>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(opening(recipe, member, sae))}</p>",
        _tiles(evaluation, sae),
        "</header>",
        "<main>",
        _pictures(history, evaluation, sae, member),
        _features(shown, evaluation),
        _evaluation(evaluation),
        _recipe(recipe, member, history),
        "</main>",
        "</html>",
    ]
    return "\n".join(filter(None, parts)) + "\n"


def _tiles(evaluation: Evaluation, sae: SAE) -> str:
    figures = {one.name: one for one in measured(evaluation.figures)}
    tiles = [(one.value, name, one.meaning) for name in HEADLINE if (one := figures.get(name))]
    firing = sae.d_sae - int(evaluation.figures["dead_latents"])
    tiles.append((f"{firing / sae.d_sae:.1%}", "latents that fire", f"{firing:,} of {sae.d_sae:,}"))
    rows = [
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(meaning)}</small></dd></div>"
        for value, name, meaning in tiles
    ]
    return f'<dl class="tiles" aria-label="On held-out text">{"".join(rows)}</dl>'


def _pictures(history: History, evaluation: Evaluation, sae: SAE, member: Member) -> str:
    last = {name: curve.mean[-1] for name, curve in history.losses.items() if curve.mean}
    figures = evaluation.figures
    silent, most = int(figures["dead_latents"]), int(max(history.dead.high, default=0.0))
    below = " What is below 0 is not shown." if min(history.explained_variance.low, default=0.0) < 0 else ""
    pictures: list[tuple[str, panels.Draw, str, str]] = [
        (
            "Losses",
            partial(panels.losses, history=history),
            "; ".join(f"{name} ends at {value:.4g}" for name, value in last.items()),
            "What was minimised over the tokens seen, in the units of training. Where a run has more rows than the picture has "
            "room, the line is the mean of neighbouring rows and the band what they range over.",
        ),
        (
            "L0 against explained variance",
            partial(panels.sparsity, history=history, evaluation=evaluation),
            f"ends at L0 {figures['l0']:.2f} and explained variance {figures['explained_variance']:.4f} on held-out text",
            "The way that training took, from faint at its start to full at its end. Rings are evaluations on held-out "
            f"text on the way, the cross is the last one.{below}",
        ),
        (
            "How often latents fire",
            partial(panels.density, share=evaluation.density),
            f"{silent:,} of {sae.d_sae:,} latents fired on none of {figures['tokens']:,.0f} tokens",
            f"Of {sae.d_sae:,} latents, {silent:,} fired on none of the {figures['tokens']:,.0f} held-out tokens; "
            "the others by the share of tokens on which they fire. A peak on the right is dense latents.",
        ),
        (
            "Dead latents",
            partial(panels.dead, history=history, d_sae=sae.d_sae),
            f"at most {most:,} of {sae.d_sae:,} at once",
            f"Latents without a firing in the last {member.training.dead_after:,} tokens of training; before so many "
            "have been seen none can be told to be dead.",
        ),
    ]
    made = [
        f'<figure><h3>{name}</h3><div role="img" aria-label="{_text(f"{name}: {said}")}">'
        f"{panels.svg(draw, f'p{number}')}</div><figcaption>{_text(caption)}</figcaption></figure>"
        for number, (name, draw, said, caption) in enumerate(pictures)
    ]
    return f'<section class="pictures" aria-label="Training">{"".join(made)}</section>'


def _features(shown: Sequence[Example], evaluation: Evaluation) -> str:
    if not shown:
        return "<section><h2>Features</h2><p>No latent fired on held-out text.</p></section>"
    said = (
        f"{len(shown)} of the latents that fired in the last evaluation, drawn by a hash of their numbers: none was picked for "
        "its looks. Each with the documents of held-out text in which it fires most; a ground is as strong as the latent "
        "fires on that token."
    )
    return f"<section><h2>{len(shown)} features</h2><p>{_text(said)}</p>{''.join(map(_feature, shown))}</section>"


def _feature(example: Example) -> str:
    moved = " ".join(
        f"<span>{name} {' '.join(f'<code>{_token(token)}</code>' for token in tokens)}</span>"
        for name, tokens in (("raises", example.raised), ("lowers", example.lowered))
        if tokens
    )
    facts = f"fires on {100 * example.density:.2g}% of tokens, up to {example.strongest:.3g}"
    excerpts = "".join(_excerpt(excerpt, example.strongest) for excerpt in example.excerpts)
    return (
        f'<article><div class="head"><h3>{example.index}</h3><span>{facts}</span>{moved}</div>'
        f"<ol>{excerpts}</ol></article>"
    )


def _excerpt(excerpt: Excerpt, top: float) -> str:
    spans = []
    for place, (token, activation) in enumerate(zip(excerpt.tokens, excerpt.activations, strict=True)):
        level, text = activation / top, _token(token)
        if level < SILENT:
            spans.append(text)
        else:
            peak = ' class="peak"' if place == excerpt.peak else ""
            spans.append(f'<span{peak} style="--a:{level:.2f}" title="{activation:.3g}">{text}</span>')
    return f"<li>{''.join(spans)}</li>"


def _evaluation(evaluation: Evaluation) -> str:
    rows = "".join(
        f"<tr><th scope=row>{_text(one.name)}</th><td>{one.value}</td><td>{one.interval}</td><td>{_text(one.meaning)}</td></tr>"
        for one in measured(evaluation.figures)
    )
    return (
        "<section><h2>On held-out text</h2><table><thead><tr><th scope=col>figure</th><th scope=col>value</th>"
        f"<th scope=col>95 % interval</th><th scope=col>what it is</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _recipe(recipe: Recipe, member: Member, history: History) -> str:
    told = sentences(recipe, member, history.tokens)
    rows = "".join(f"<dt>{_text(subject)}</dt><dd>{_text(text)}</dd>" for subject, text in told.items())
    return f'<section><h2>How it was trained</h2><dl class="recipe">{rows}</dl></section>'


def _token(token: str) -> str:
    return html.escape(visible(token)).replace("\n", "↵")


def _text(text: str) -> str:
    return html.escape(visible(text))
