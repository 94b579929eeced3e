"""What the commands share: parsers of arguments, the model that goes with an SAE or a catalog, JSON."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog
    from saekit.steering.edits import Steerable
    from saekit.steering.positions import Positions


def command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="language model (default: the one the SAE was trained on)")


def count(text: str) -> int:
    value = int(text.replace("_", "")) if text.replace("_", "").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,2,4,8") from None


def positions(text: str) -> Positions:
    if text in ("all", "prompt", "generated", "last_prompt"):
        return text  # type: ignore[return-value]
    if all(part.strip().isdigit() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(
        f"{text!r} is not all, prompt, generated, last_prompt or positions such as 0,3,5"
    )


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def model_of(options: argparse.Namespace, default: str | None) -> TransformerBridge:
    from saekit import load_model

    name = options.model or default
    if name is None:
        raise InvalidInput("the SAE does not say which model it belongs to: name it with --model")
    return load_model(name)


def catalog_and_model(options: argparse.Namespace) -> tuple[Catalog, TransformerBridge]:
    from saekit import Catalog

    catalog = Catalog.open(options.catalog)
    model = model_of_catalog(options, catalog)
    catalog.check_fits(model)
    return catalog, model


def steerable_and_model(options: argparse.Namespace) -> tuple[Steerable, TransformerBridge]:
    """The feature of a catalog, or the latent of an SAE folder or of a published `release/site`."""
    from saekit.sae.files import names_sae

    if not names_sae(options.catalog):
        from saekit import Catalog

        feature = Catalog.open(options.catalog)[
            options.feature
        ]  # an unknown feature is told before a model loads
        model = model_of_catalog(options, feature.catalog)
        feature.catalog.check_fits(model)
        return feature, model
    from saekit import SAE, Direction

    sae = SAE.load(options.catalog)
    direction = Direction.from_sae(sae, options.feature)
    model = model_of(options, sae.model_name)
    sae.check_fits(model)
    return direction, model


def model_of_catalog(options: argparse.Namespace, catalog: Catalog) -> TransformerBridge:
    from saekit import load_model

    return load_model(options.model or catalog.model_to_load)
