"""Jedi on the embedded model, and what it costs: `python -m benchmarks.steering [--quick]`.

Of the Star Wars features that the catalog finds, the one whose texts speak of Star Wars most (on other draws) is added and clamped, a mean difference of texts is added, and random
directions of the same norm stand beside. Writes `benchmarks/results/steering.json` and `docs/steering.png`, and prints ten
continuations, plain and steered, as they came.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import saekit
from saekit.demo import PROMPT, QUERIES, STAR_WARS
from saekit.steering.choosing import choose
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.generate import generate
from saekit.steering.steer import steer
from saekit.steering.sweep import SteeringSweep, sweep

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "steering.json", ROOT / "docs" / "steering.png"
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)  # of the median residual norm
MODERATE = 0.4
CHOOSING, SHOWING = 100, 0  # seeds
PROMPTS = (PROMPT, "The old man looked at the", "In the evening they went to", "She opened the door and saw")
ABOUT = [
    "The Jedi Knight raised a lightsaber against the Sith Lord.",
    "Darth Vader boarded the starship of the Rebel Alliance.",
    "The droids of the Separatist army landed on the planet.",
    "Obi-Wan Kenobi trained Anakin Skywalker at the Jedi Temple.",
    "Clone troopers of the Galactic Republic fought in the Clone Wars.",
    "The Mandalorian drew a blaster on the stormtroopers of the Empire.",
]
ELSE = [
    "The old farmer raised a fence against the hungry sheep.",
    "My brother boarded the morning train to the northern coast.",
    "The children of the village walked along the river.",
    "A young teacher trained the singers at the city school.",
    "Two players of the local team talked about the weather.",
    "The doctor drew a picture on the wall of the kitchen.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: nothing is written")
    quick = parser.parse_args().quick
    console = Console()
    shares = SHARES[:3] if quick else SHARES
    options: dict[str, Any] = {
        "keywords": STAR_WARS,
        "temperature": 0.8,
        "max_new_tokens": 8 if quick else 24,
    }
    options |= {"samples": 1 if quick else 8, "controls": 2 if quick else 5}

    model, catalog = saekit.load_model("tiny"), saekit.Catalog.open("tiny")
    hits = list({f.index: f for query in QUERIES for f in catalog.search(query, limit=12)}.values())
    scores = {feature.index: score for feature, score in choose(model, hits)}

    def effect(feature: saekit.Feature) -> float:
        tried = sweep(
            model,
            PROMPTS,
            lambda s: feature.add(s, unit="norm"),
            [MODERATE],
            seed=CHOOSING,
            **options | {"controls": 1},
        )
        return tried[0].steered.keywords or 0.0

    effects = {feature.index: effect(feature) for feature in hits[: 2 if quick else None]}
    feature = catalog[max(effects, key=lambda i: effects[i])]
    mean = Direction.from_means(model, ABOUT, ELSE, site=catalog.site, label="mean difference")
    unit = float(feature.direction.norm()) / catalog.median_norm  # a share of the norm as one of activation

    def clamp(share: float) -> Edit:
        return feature.clamp(share / unit) if share else feature.add(0.0)

    kinds: dict[str, Callable[[float], Edit]] = {
        f"feature {feature.index}, add": lambda s: feature.add(s, unit="norm"),
        f"feature {feature.index}, clamp": clamp,
        "mean difference, add": lambda s: mean.add(s * catalog.median_norm / float(mean.vector.norm())),
    }
    found = sweep(model, PROMPTS, kinds, shares, seed=SHOWING, **options)
    console.print(str(found), highlight=False, markup=False)
    best = found.knee() or max(found, key=lambda row: row.steered.keywords or 0)
    make = kinds[best.place]
    seeds = [SHOWING + i for i in range(10)]
    sampling: dict[str, Any] = {
        "seed": seeds,
        "temperature": 0.8,
        "max_new_tokens": options["max_new_tokens"],
    }
    plain = generate(model, [PROMPT] * 10, **sampling)
    with steer(model, make(best.strength)):
        steered = generate(model, [PROMPT] * 10, **sampling)
    console.print(
        f"\nten continuations, unedited, {best.place} at {best.strength:g} of the residual norm",
        highlight=False,
    )
    for one, other in zip(plain, steered, strict=True):
        console.print(f"plain    {one.text!r}\nsteered  {other.text!r}", highlight=False, markup=False)
    if quick:
        return
    record = json.loads(found.to_json()) | {"feature": feature.index, "prompts": PROMPTS}
    record["candidates"] = {
        i: {"output_score": scores[i].score if i in scores else None, "texts_with": effects[i]}
        for i in effects
    }
    record["ten"] = [{"plain": a.text, "steered": b.text} for a, b in zip(plain, steered, strict=True)]
    record["suggested"] = asdict(best) | {"from_knee": found.knee() is not None}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    picture(found).savefig(PICTURE, dpi=150)
    console.print(f"{RESULTS.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")


def picture(found: SteeringSweep) -> Any:
    """Effect against strength, fluency against strength, and one against the other; the controls of all kinds in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    effect, cost, both = figure.subplots(1, 3)
    colours = ["#c44e52", "#4c72b0", "#55a868"]
    places = list(dict.fromkeys(row.place for row in found))
    for place, colour in zip(places, colours, strict=True):
        rows = [row for row in found if row.place == place]
        x = [row.strength for row in rows]
        words, ppl = [row.steered.keywords or 0 for row in rows], [row.steered.perplexity for row in rows]
        effect.plot(x, words, color=colour, marker="o", markersize=3, label=place)
        cost.plot(x, ppl, color=colour, marker="o", markersize=3)
        both.plot(ppl, words, color=colour, marker="o", markersize=3)
    rows = [row for row in found if row.place == places[0]]
    x = [row.strength for row in rows]
    for axes, name in ((effect, "keywords"), (cost, "perplexity")):
        low, high = (
            [getattr(getattr(row, f"control_{end}"), name) for row in rows] for end in ("least", "most")
        )
        axes.fill_between(x, low, high, color="#8c8c8c", alpha=0.3, linewidth=0, label="random directions")
    both.plot(
        [row.control.perplexity for row in rows], [row.control.keywords or 0 for row in rows], color="#8c8c8c", marker="o",
        markersize=3,
    )  # fmt: skip
    effect.set(title="texts with a Star Wars word", xlabel="share of the residual norm")
    cost.set(title="perplexity under the plain model", xlabel="share of the residual norm", yscale="log")
    both.set(
        title="what it buys at which cost",
        xlabel="perplexity",
        xscale="log",
        ylabel="texts with a Star Wars word",
    )
    effect.legend(fontsize=7)
    for axis in (cost.yaxis, both.xaxis):
        axis.set_ticks([20, 50, 100, 200, 500])
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("")
    return figure


if __name__ == "__main__":
    main()
