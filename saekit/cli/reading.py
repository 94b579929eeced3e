"""`saekit read` and `saekit lens`."""

from __future__ import annotations

import argparse
from typing import Any

from saekit.cli.common import command, count, model_option, print_json, steerable_and_model
from saekit.errors import InvalidInput


def add(commands: Any) -> None:
    read = command(commands, "read", _read, "a feature or a direction, token by token over a text")
    read.add_argument(
        "catalog", help="a catalog; an SAE: a folder, or a published release/site; with --direction a model"
    )
    read.add_argument("feature", type=int, nargs="?")
    read.add_argument("--text", required=True)
    read.add_argument("--direction", metavar="FILE", help="a saved direction, instead of a feature")
    read.add_argument("--site", help="where the direction is, if its file does not say")
    model_option(read)

    lens = command(commands, "lens", _lens, "what each layer would say next (logit lens)")
    lens.add_argument("model", help="a model: a name, a folder, or tiny")
    lens.add_argument("--text", required=True)
    lens.add_argument("--token", help="also this token's rank and probability, e.g. ' Jedi'")
    lens.add_argument(
        "--positions", type=_whole, default=[-1], help="after which tokens (default: -1, the last)"
    )
    lens.add_argument("--layers", type=_whole, help="0 to the number of blocks (default: all)")
    lens.add_argument("--top", type=count, default=5, help="guesses (default: 5)")


def _whole(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 0,3,-1") from None


def _read(options: argparse.Namespace) -> None:
    from saekit import Direction, load_model
    from saekit.lens.reading import read

    if (options.direction is None) == (options.feature is None):
        raise InvalidInput("read: expected the number of a feature, or --direction FILE")
    if options.direction is None:
        what, model = steerable_and_model(options)
    else:
        model = load_model(options.model or options.catalog)
        what = Direction.from_file(options.direction, site=options.site, model=model)
    reading = read(model, options.text, what)
    print_json(reading.to_dict()) if options.json else print(reading)


def _lens(options: argparse.Namespace) -> None:
    from saekit import load_model
    from saekit.lens.logit_lens import logit_lens

    lens = logit_lens(
        load_model(options.model),
        options.text,
        positions=options.positions,
        layers=options.layers,
        token=options.token,
        k=options.top,
    )
    print_json(lens.to_dict()) if options.json else print(lens)
