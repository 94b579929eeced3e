"""The command line: parse, call the library, print. Nothing is computed here.

Exit codes: 0 when the work is done, 2 for a wrong call, 1 for anything else, with one line that says why.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.errors import InvalidInput, SaekitError
from saekit.steering.kinds import KINDS, UNITS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog
    from saekit.steering.edits import Steerable
    from saekit.steering.positions import Positions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail(options, InvalidInput("interrupted"))
    except SaekitError as error:
        return _fail(options, error)
    except Exception as error:  # a defect, or a library's own error: one line all the same
        return _fail(options, error, f"unexpected {type(error).__name__}: {error} (--debug shows where)")
    return 0


def _fail(options: argparse.Namespace, error: BaseException, text: str | None = None) -> int:
    if options.debug:
        raise error
    print(f"saekit: {text or error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saekit", description="Train sparse autoencoders, read their features, and steer with them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", _demo, "the whole story on the embedded model")
    demo.add_argument("--out", default="checkpoints", help="folder for the run (default: checkpoints)")

    train = _command(commands, "train", _train, "train what a recipe describes")
    train.add_argument("recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. sae.d_sae=2048")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check the recipe and say what it would do")

    evaluate = _command(commands, "eval", _eval, "evaluate an SAE on text")
    evaluate.add_argument("sae")
    evaluate.add_argument("--text", default="tiny", help="text to evaluate on (default: the embedded shards)")
    evaluate.add_argument("--tokens", type=_count, default=65_536, help="how many (default: 65536)")
    _model_option(evaluate)

    _catalog_commands(commands)

    steer = _command(commands, "steer", _steer, "continue a prompt plainly and steered")
    _steering_options(steer)
    steer.add_argument("--strength", type=float, default=8.0)

    sweep = _command(commands, "sweep", _sweep, "one edit at several strengths, a random control beside")
    _steering_options(sweep)
    sweep.add_argument("--strengths", type=_numbers, required=True, help="e.g. 0,2,4,8")

    serve = _command(commands, "serve", _serve, "the page with a live model behind it, on 127.0.0.1")
    serve.add_argument("catalog")
    serve.add_argument("--port", type=_count, default=8321)
    _model_option(serve)
    return parser


def _catalog_commands(commands: Any) -> None:
    catalog = commands.add_parser("catalog", help="build, show, search, page, publish a feature catalog")
    parts = catalog.add_subparsers(required=True, metavar="COMMAND")

    build = _command(parts, "build", _catalog_build, "one pass over text")
    build.add_argument("sae")
    build.add_argument("--text", required=True)
    build.add_argument("--out", required=True)
    build.add_argument("--tokens", type=_count, default=None, help="stop after about so many")
    build.add_argument("--context-size", type=_count, default=128)
    build.add_argument("--contexts", type=_count, default=20, help="kept per feature (default: 20)")
    _model_option(build)

    show = _command(parts, "show", _catalog_show, "one feature's record")
    show.add_argument("catalog")
    show.add_argument("feature", type=int)

    search = _command(parts, "search", _catalog_search, "features for words")
    search.add_argument("catalog")
    search.add_argument("query")
    search.add_argument("--limit", type=_count, default=10)

    page = _command(parts, "page", _catalog_page, "a static page")
    page.add_argument("catalog")
    page.add_argument("out")

    publish = _command(parts, "publish", _catalog_publish, "upload to the Hugging Face Hub")
    publish.add_argument("catalog")
    publish.add_argument("repository", help="user/name")
    publish.add_argument("--private", action="store_true")


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="language model (default: the one the SAE was trained on)")


def _steering_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("catalog", help="a catalog; or an SAE: a folder, or a published release/site")
    parser.add_argument("feature", type=int)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--kind", choices=KINDS, default="add")
    parser.add_argument("--unit", choices=UNITS["add"], default="raw")
    parser.add_argument(
        "--positions", type=_positions, default="all", help="all, prompt, generated, last_prompt or 0,3,5"
    )
    parser.add_argument("--max-new-tokens", type=_count, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    _model_option(parser)


def _count(text: str) -> int:
    value = int(text.replace("_", "")) if text.replace("_", "").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,2,4,8") from None


def _positions(text: str) -> Positions:
    if text in ("all", "prompt", "generated", "last_prompt"):
        return text  # type: ignore[return-value]
    if all(part.strip().isdigit() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(
        f"{text!r} is not all, prompt, generated, last_prompt or positions such as 0,3,5"
    )


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


# The commands


def _demo(options: argparse.Namespace) -> None:
    from saekit.demo import demo

    result = demo(Path(options.out), quiet=options.json)
    if options.json:
        _print_json(result)


def _train(options: argparse.Namespace) -> None:
    from saekit.console import RunReporter
    from saekit.recipe import LanguageModelRecipe, read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if options.dry_run:
        from saekit.training.dry_run import describe

        description = describe(recipe)
        _print_json(description) if options.json else print(description["text"])
        return
    with RunReporter() as reporter:
        if isinstance(recipe, LanguageModelRecipe):
            from saekit.training.language_model import train_language_model

            run = Path("checkpoints") / recipe.name
            final = train_language_model(recipe, run, resume=options.resume, report=reporter.line)
            _print_json({"path": str(final)}) if options.json else print(final)
            return
        from saekit.training.run import train

        result = train(recipe, resume=options.resume, reporter=reporter)
    if options.json:
        _print_json({"path": str(result.path), "metrics": result.metrics})
    else:
        print(f"{result.path / 'final'}")
        _print_metrics(result.metrics)


def _eval(options: argparse.Namespace) -> None:
    from saekit import SAE, evaluate, tokenize
    from saekit.text import place

    sae = SAE.load(options.sae)
    model = _model(options, sae.model_name)
    context = min(int(sae.config.metadata.get("context_size") or 128), model.cfg.n_ctx)
    metrics = evaluate(model, sae, tokenize(place(options.text), model, context), max_tokens=options.tokens)
    _print_json(metrics) if options.json else _print_metrics(metrics)


def _print_metrics(metrics: dict[str, float]) -> None:
    from saekit.console import out, table

    out.print(table(["metric", "value"], [(name, f"{value:.5g}") for name, value in metrics.items()]))


def _catalog_build(options: argparse.Namespace) -> None:
    from saekit import SAE, Catalog, tokenize
    from saekit.console import CatalogProgress
    from saekit.text import place

    sae = SAE.load(options.sae)
    model = _model(options, sae.model_name)
    tokens = tokenize(place(options.text), model, options.context_size)
    catalog = Catalog.build(
        model, sae, tokens, options.out, max_tokens=options.tokens, contexts=options.contexts,
        progress=CatalogProgress(options.tokens),
    )  # fmt: skip
    alive = int((catalog.density > 0).sum())
    if options.json:
        _print_json({"path": str(catalog.path), "features": len(catalog), "alive": alive})
    else:
        print(f"{catalog}\n{catalog.path}: {alive:,} of {len(catalog):,} features fired")


def _catalog_show(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.console import coloured, out, plain

    feature = Catalog.open(options.catalog)[options.feature]
    if options.json:
        _print_json(_record(feature))
        return
    print(plain(feature.summary()))
    for context in feature.contexts[:10]:
        out.print(
            f"{context.max_activation:9.3g}  ",
            coloured(context.tokens, context.activations, feature.max_activation),
        )


def _record(feature: Any) -> dict[str, Any]:
    return {
        "feature": feature.index,
        "density": feature.density,
        "max_activation": feature.max_activation,
        "explanation": feature.explanation,
        "top_tokens": [asdict(t) for t in feature.top_tokens],
        "logits_top": [asdict(t) for t in feature.logits_top],
        "logits_bottom": [asdict(t) for t in feature.logits_bottom],
        "neighbours": [asdict(n) for n in feature.neighbours],
        "contexts": [asdict(context) for context in feature.contexts],
    }


def _catalog_search(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.console import out, table

    hits = Catalog.open(options.catalog).search(options.query, options.limit)
    if options.json:
        _print_json(
            [
                {
                    "feature": f.index,
                    "explanation": f.explanation,
                    "density": f.density,
                    "max_activation": f.max_activation,
                }
                for f in hits
            ]
        )
        return
    rows = [
        (
            f.index,
            f.explanation or "",
            f"{f.density:.3%}",
            f"{f.max_activation:.3g}",
            ", ".join(repr(t.token) for t in f.logits_top[:4]),
        )
        for f in hits
    ]
    out.print(table(["feature", "fires on", "density", "max", "raises"], rows) if rows else "nothing found")


def _catalog_page(options: argparse.Namespace) -> None:
    from saekit import Catalog

    folder = Catalog.open(options.catalog).page(options.out)
    _print_json({"page": str(folder / "index.html")}) if options.json else print(folder / "index.html")


def _catalog_publish(options: argparse.Namespace) -> None:
    from saekit import Catalog

    address = Catalog.open(options.catalog).publish(options.repository, private=options.private)
    _print_json({"address": address}) if options.json else print(address)


def _steer(options: argparse.Namespace) -> None:
    from saekit import compare
    from saekit.console import plain

    source, model = _steerable_and_model(options)
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
        print(plain(str(side)))
        return
    _print_json(
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
    from saekit.console import out, table
    from saekit.steering.sweep import sweep

    source, model = _steerable_and_model(options)
    rows = sweep(
        model,
        options.prompt,
        lambda strength: source.edit(options.kind, strength, options.unit),
        options.strengths,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        temperature=options.temperature,
        positions=options.positions,
    )
    if options.json:
        _print_json([asdict(row) for row in rows])
        return
    columns = ["strength", "KL", "perplexity", "text", "control KL", "control ppl"]
    cells = [
        (
            f"{r.strength:g}",
            f"{r.kl:.2f}",
            f"{r.perplexity:.0f}",
            r.text,
            f"{r.control_kl:.2f}",
            f"{r.control_perplexity:.0f}",
        )
        for r in rows
    ]
    out.print(table(columns, cells))


def _serve(options: argparse.Namespace) -> None:
    from saekit.server.app import serve

    catalog, model = _catalog_and_model(options)
    serve(catalog, model, port=options.port)


def _catalog_and_model(options: argparse.Namespace) -> tuple[Catalog, TransformerBridge]:
    from saekit import Catalog

    catalog = Catalog.open(options.catalog)
    model = _model(options, catalog.model_name)
    catalog.check_fits(model)
    return catalog, model


def _steerable_and_model(options: argparse.Namespace) -> tuple[Steerable, TransformerBridge]:
    """The feature of a catalog, or the latent of an SAE folder or of a published `release/site`."""
    published = re.fullmatch(r"([^/]+)/((?:blocks\.\d+\.|hook_|ln_final\.|embed\.).+)", options.catalog)
    folder = Path(options.catalog)
    if not (folder / "cfg.json").is_file() and (folder.exists() or not published):
        from saekit import Catalog

        feature = Catalog.open(options.catalog)[
            options.feature
        ]  # an unknown feature is told before a model loads
        model = _model(options, feature.catalog.model_name)
        feature.catalog.check_fits(model)
        return feature, model
    from saekit import SAE, Direction

    release, site = published.groups() if published and not folder.exists() else (options.catalog, None)
    sae = SAE.load(release, site)
    direction = Direction.from_sae(sae, options.feature)
    model = _model(options, sae.model_name)
    sae.check_fits(model)
    return direction, model


def _model(options: argparse.Namespace, default: str | None) -> TransformerBridge:
    from saekit import load_model

    name = options.model or default
    if name is None:
        raise InvalidInput("the SAE does not say which model it belongs to: name it with --model")
    return load_model(name)


if __name__ == "__main__":
    sys.exit(main())
