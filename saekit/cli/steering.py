"""`saekit steer`, `sweep` and `additions`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from saekit.cli.common import (
    command,
    count,
    model_option,
    numbers,
    positions,
    print_json,
    steerable_and_model,
    words,
)
from saekit.errors import InvalidInput
from saekit.steering.kinds import KINDS, UNITS


def add(commands: Any) -> None:
    steer = command(commands, "steer", _steer, "continue a prompt plainly and steered")
    _steering_options(steer)
    steer.add_argument("--strength", type=float, default=8.0)

    sweep = command(commands, "sweep", _sweep, "one edit at several strengths, a random control beside")
    _steering_options(sweep)
    sweep.add_argument("--strengths", type=numbers, required=True, help="e.g. 0,2,4,8")
    sweep.add_argument(
        "--keywords", type=words, default=(), help="that the text should speak of, e.g. Jedi,droid"
    )
    sweep.add_argument("--samples", type=count, default=8, help="continuations at each strength (default: 8)")
    sweep.add_argument("--controls", type=count, default=3, help="random directions beside (default: 3)")
    sweep.add_argument("--figure", metavar="FILE", help="write the curves as a picture")

    additions = command(
        commands, "additions", _additions, "what an added direction does to two texts (a recipe)"
    )
    additions.add_argument("recipe")
    additions.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. model=gpt2")


def _steering_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="a catalog; or an SAE: a folder, or a published release/site")
    parser.add_argument("feature", type=int)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--kind", choices=[kind for kind in KINDS if kind != "swap"], default="add")
    parser.add_argument("--unit", choices=UNITS["add"], default="raw")
    parser.add_argument(
        "--positions", type=positions, default="all", help="all, prompt, generated, last_prompt or 0,3,5"
    )
    parser.add_argument("--max-new-tokens", type=count, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    model_option(parser)


def _steer(options: argparse.Namespace) -> None:
    from saekit import compare
    from saekit.console import out

    source, model = steerable_and_model(options)
    edit = source.edit(options.kind, options.strength, options.unit)
    side = compare(
        model,
        options.prompt,
        edit,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        temperature=options.temperature,
        positions=options.positions,
    )
    if not options.json:
        out.print(side)
        return
    print_json(
        {
            "prompt": side.prompt,
            "edit": str(edit),
            "plain": side.plain,
            "steered": side.steered,
            "kl": side.kl,
            "top_tokens": side.top_tokens,
        }
    )


def _sweep(options: argparse.Namespace) -> None:
    from saekit.console import out
    from saekit.steering.sweep import sweep

    source, model = steerable_and_model(options)
    found = sweep(
        model,
        options.prompt,
        lambda strength: source.edit(options.kind, strength, options.unit),
        options.strengths,
        keywords=options.keywords,
        samples=options.samples,
        controls=options.controls,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        temperature=options.temperature,
        positions=options.positions,
    )
    if options.figure:
        found.figure().savefig(options.figure, dpi=150)
    if options.json:
        print_json(found.records())
        return
    out.print(found)


def _additions(options: argparse.Namespace) -> None:
    from saekit.console import err
    from saekit.experiments import run_additions
    from saekit.recipe import AdditionsRecipe, read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if not isinstance(recipe, AdditionsRecipe):
        raise InvalidInput(f"{options.recipe} describes a training run: use `saekit train`")
    found, folder = run_additions(recipe, progress=lambda line: err.print(line, highlight=False))
    if options.json:
        print_json({"path": str(folder), **asdict(found)})
    else:
        print(f"{found}\n{folder}")
