"""The whole story on the embedded model: train an SAE, build its catalog, find its Star Wars features, turn one up.

Everything shown is computed here and now; the only thing told beforehand is which words count as Star Wars.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.text import Text

from saekit import embedded
from saekit.catalog import Catalog, Feature
from saekit.console import CatalogProgress, ContextText, RunReporter, out, table
from saekit.lens.tokens import visible
from saekit.lm import load_model
from saekit.steering.compare import next_token_probabilities
from saekit.steering.edits import Edit
from saekit.steering.generate import Generated, generate
from saekit.steering.judging import keyword_rate, perplexity, word_ids
from saekit.steering.steer import steer
from saekit.steering.sweep import control_of
from saekit.tokens import tokenize
from saekit.training.run import Run, train

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")
Make = Callable[[float], Edit]  # strength → edit

PROMPT = "Mike pulls out his"
PROMPTS = (  # of the page's prompts view
    PROMPT,
    "The Jedi Knight raised her lightsaber and stepped in front of the young Padawan.",
    "Once upon a time there was a little boat that was afraid of the sea.",
    "The battle took place in 19 BBY, when the Galactic Republic became the Galactic Empire.",
    "Tom and Lily went to the park. They saw a big red ball and wanted to play with it.",
)
QUERIES = ("Jedi", "lightsaber", "Star Wars")
STAR_WARS = (
    "lightsaber lightsabers blaster Jedi Sith Padawan Padawans droid droids starfighter starship Star Clone Republic "
    "Empire Imperial Galactic Rebel Alliance Wookiee Skywalker Luke Leia Vader Darth Anakin Obi Kenobi Yoda Palpatine "
    "Ahsoka Tano Mandalorian stormtrooper stormtroopers Force Knight Master Temple Order Confederacy Separatist"
).split()
# Shares of the median residual norm; about half of it is where texts start to break.
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.75)
ENOUGH = 0.5  # share of continuations that have to speak of Star Wars for a strength to count as working
CATALOG_TOKENS = 400_000
MODERATE, SHORT_LIST = 0.4, 8
CHOOSING, SHOWING = 1, 0  # seeds
SAMPLES, NEW_TOKENS = 32, 24


def demo(out_folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the story under `out_folder/demo` and return its figures. Progress goes to stderr, the story to stdout."""
    say: Callable[..., None] = (lambda *_: None) if quiet else out.print
    times: dict[str, float] = {}
    model = _timed(times, "load", lambda: load_model(embedded.NAME))
    say(
        f"[bold]1. The model[/]  {embedded.NAME}: {model.cfg.n_layers} blocks of width {model.cfg.d_model}, {model.cfg.dtype}"
    )
    say(Text(f"   {PROMPT!r} → {_greedy(model)!r}"))

    run = out_folder / "demo"
    shutil.rmtree(run, ignore_errors=True)
    say("[bold]2. Train[/]  a TopK sparse autoencoder on its activations (recipes/tiny.yaml)")
    recipe = embedded.folder("recipes") / "tiny.yaml"
    with nullcontext() if quiet else RunReporter() as reporter:
        trained = _timed(
            times, "train", lambda: train(recipe, model=model, runs=out_folder, reporter=reporter)
        )
    assert isinstance(trained, Run)  # one SAE, not a list
    m = trained.metrics
    say(
        f"   held out: L0 {m['l0']:.1f}, explained variance {m['explained_variance']:.3f}, "
        f"CE recovered {m['ce_recovered']:.3f}, dead {m['dead']:.1%}"
    )

    say("[bold]3. Catalog[/]  what each feature fires on")
    tokens = tokenize(embedded.NAME, model)
    with CatalogProgress() as progress:
        catalog = _timed(
            times,
            "catalog",
            lambda: Catalog.build(
                model, trained.sae, tokens, run / "catalog", max_tokens=CATALOG_TOKENS, progress=None if quiet else progress
            ),
        )  # fmt: skip
    page = _timed(times, "page", lambda: catalog.page(run / "page", prompts=PROMPTS, model=model))
    say(
        f"   {int((catalog.density > 0).sum()):,} of {len(catalog):,} features fired on {catalog.info['corpus']['tokens']:,} tokens"
    )

    say(f"[bold]4. Search[/]  {' · '.join(QUERIES)}")
    hits = list({f.index: f for query in QUERIES for f in catalog.search(query, 12)}.values())
    rows = [
        (f.index, f.explanation, f"{f.density:.2%}", ", ".join(t.token for t in f.logits_top[:5]))
        for f in hits[:8]
    ]
    say(table(["feature", "fires on", "density", "raises"], rows))
    say(f"   … and {len(hits) - len(rows)} more")

    start = time.perf_counter()
    ids = torch.tensor(word_ids(model, STAR_WARS))
    plain_p = _probability(model, None, ids)
    features: list[Make] = [partial(f.add, unit="norm") for f in hits]
    chosen = _choose(model, features, ids)
    feature = hits[features.index(chosen)]
    # The control goes through the same choice: the best of as many random directions of the same norm.
    control = _choose(model, [partial(_random, feature, seed) for seed in range(len(hits))], ids)
    say(
        f"[bold]5. Choose[/]  feature {feature.index} of {len(hits)} hits: the one whose continuations speak of Star Wars most"
    )
    for context in feature.contexts[:4]:
        say("   ", ContextText(context, feature.max_activation))

    say(
        "[bold]6. Steer[/]  add it at a share of the residual norm; beside it the best of as many random directions"
    )
    result_rows = [_measure(model, chosen, control, s, ids) for s in (0.0, *STRENGTHS)]
    say(table(["strength", "P(Star Wars)", "texts with", "perplexity", "random P", "random texts", "random ppl"],
              [_row(r) for r in result_rows]))  # fmt: skip
    best = next((r for r in result_rows if r["share"] >= ENOUGH), None)
    told = "the gentlest strength that turns at least half of the texts"
    if best is None:
        best = max(result_rows, key=lambda r: r["share"])
        told = "no strength turns half of the texts; the one that turns most"
    strength = best["strength"]
    say(f"   {told}: {strength:g}")
    examples = best["texts"][:5]
    say(Text(f"   plain    {visible(result_rows[0]['texts'][0])!r}"))
    for text in examples:
        say(Text(f"   steered  {visible(text)!r}"))
    say(Text(f"   random   {visible(best['random_texts'][0])!r}"))
    times["steer"] = time.perf_counter() - start
    plain_texts = [made.text for made in _continue(model, None, SHOWING)]
    identical = result_rows[0]["texts"] == plain_texts and plain_p == result_rows[0]["p"]
    say(f"   strength 0 gives the plain model's probabilities and texts, bit for bit: {identical}")

    say("[bold]Times[/]  " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()))
    say(f"   page: {page / 'index.html'}#{feature.index}")
    say(
        f"   try:  saekit steer {catalog.path} {feature.index} --prompt {PROMPT!r} --unit norm --strength {strength}"
    )
    return {
        "metrics": m, "hits": [f.index for f in hits], "feature": feature.index, "strength": strength,
        "sweep": result_rows, "identical_at_zero": identical, "seconds": times, "page": str(page), "catalog": str(catalog.path),
    }  # fmt: skip


def _timed(times: dict[str, float], name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    times[name] = time.perf_counter() - start
    return result


def _greedy(model: TransformerBridge) -> str:
    return str(model.generate(PROMPT, max_new_tokens=8, do_sample=False, verbose=False))


def _random(feature: Feature, seed: int, strength: float) -> Edit:
    return control_of(feature.add(strength, unit="norm"), seed)


def _probability(model: TransformerBridge, edit: Edit | None, ids: torch.Tensor) -> float:
    with _with(model, edit):
        return float(next_token_probabilities(model, model.to_tokens(PROMPT))[0, ids].sum())


def _choose(model: TransformerBridge, candidates: Sequence[Make], ids: torch.Tensor) -> Make:
    """The candidate that steers best (Arad 2025: choose features by what they do, not only by what they fire on).

    Of the few that move the next token most, the one whose continuations speak of Star Wars most often at a moderate
    strength; of equals, the one whose continuations the plain model finds least strange. The texts drawn for choosing
    are not those that are shown: the best of many looks better than it is on the draw that made it the best.
    """
    strong = sorted(candidates, key=lambda make: -_probability(model, make(MODERATE), ids))[:SHORT_LIST]

    def quality(make: Make) -> tuple[float, float]:
        texts = _continue(model, make(MODERATE), seed=CHOOSING)
        return _share(texts), -_perplexity(model, texts)

    return max(strong, key=quality)


def _measure(
    model: TransformerBridge, chosen: Make, control: Make, strength: float, ids: torch.Tensor
) -> dict[str, Any]:
    found: dict[str, Any] = {"strength": strength}
    for prefix, make in (("", chosen), ("random_", control)):
        edit = make(strength)
        texts = _continue(model, edit, seed=SHOWING)
        found |= {
            f"{prefix}p": _probability(model, edit, ids),
            f"{prefix}texts": [made.text for made in texts],
            f"{prefix}share": _share(texts),
            f"{prefix}perplexity": _perplexity(model, texts),
        }
    return found


def _continue(model: TransformerBridge, edit: Edit | None, seed: int) -> list[Generated]:
    with _with(model, edit):
        return generate(
            model, [PROMPT] * SAMPLES, NEW_TOKENS, seed=seed * SAMPLES, temperature=0.8, stop_at_eos=False
        )


@contextmanager
def _with(model: TransformerBridge, edit: Edit | None) -> Iterator[None]:
    if edit is None:
        yield
    else:
        with steer(model, edit):
            yield


def _share(texts: list[Generated]) -> float:
    """The share of continuations with a Star Wars word in them."""
    return keyword_rate([made.continuation for made in texts], STAR_WARS)


def _perplexity(model: TransformerBridge, texts: list[Generated]) -> float:
    """The median perplexity of the continuations under the plain model."""
    return statistics.median(perplexity(model, made.ids, made.prompt_length) for made in texts)


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{r['strength']:g}", f"{r['p']:.2%}", f"{r['share']:.0%}", f"{r['perplexity']:.0f}",
        f"{r['random_p']:.2%}", f"{r['random_share']:.0%}", f"{r['random_perplexity']:.0f}",
    )  # fmt: skip
