"""The command line: parse, call the library, print. Nothing is computed here.

Exit codes: 0 when the work is done, 2 for a wrong call, 1 for anything else, with one line that says why.
"""

from __future__ import annotations

import argparse
import json
import os
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
    from saekit.evaluation.probing import Probe
    from saekit.sae.releases import PublishedSAE, Release
    from saekit.steering.edits import Steerable
    from saekit.steering.positions import Positions
    from saekit.training.run import Sweep


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
    rank = os.environ.get("RANK") or "0"  # of torchrun
    if not getattr(error, "told", False):
        print(
            f"saekit: {text or error}" if rank == "0" else f"saekit, process {rank}: {text or error}",
            file=sys.stderr,
        )
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
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. sae.d_sae=2048 sae.1.k=8")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check the recipe and say what it would do")

    evaluate = _command(commands, "eval", _eval, "evaluate one or several SAEs on text")
    evaluate.add_argument("saes", nargs="+", metavar="sae", help="a folder, or what SAE.load takes")
    evaluate.add_argument("--text", default="tiny", help="text to evaluate on (default: the embedded shards)")
    evaluate.add_argument("--tokens", type=_count, default=65_536, help="how many (default: 65536)")
    evaluate.add_argument("--out", metavar="DIR", help="folder for the figures and the pictures")
    evaluate.add_argument(
        "--probe", action="append", default=[], metavar="PATH",
        help="texts with labels (.csv, .json, .jsonl or a folder of .json) to probe; may be repeated",
    )  # fmt: skip
    _model_option(evaluate)

    _catalog_commands(commands)

    steer = _command(commands, "steer", _steer, "continue a prompt plainly and steered")
    _steering_options(steer)
    steer.add_argument("--strength", type=float, default=8.0)

    sweep = _command(commands, "sweep", _sweep, "one edit at several strengths, a random control beside")
    _steering_options(sweep)
    sweep.add_argument("--strengths", type=_numbers, required=True, help="e.g. 0,2,4,8")

    published = _command(commands, "releases", _releases, "published SAEs by name, model, repository or site")
    published.add_argument("query", nargs="*", help="words; or a release's exact name, to list its SAEs")
    published.add_argument("--limit", type=_count, default=20, help="rows (default: 20)")

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
            from saekit.training.parallel import refuse_several

            refuse_several("a language model is trained")
            run = Path("checkpoints") / recipe.name
            final = train_language_model(recipe, run, resume=options.resume, report=reporter.line)
            _print_json({"path": str(final)}) if options.json else print(final)
            return
        from saekit.training.parallel import first_process
        from saekit.training.run import Run, train

        result = train(recipe, resume=options.resume, reporter=reporter)
    if not first_process():
        return
    if isinstance(result, Run):
        if options.json:
            _print_json({"path": str(result.path), "metrics": result.metrics})
        else:
            print(f"{result.path / 'final'}")
            _print_metrics(result.metrics)
    elif options.json:
        saes = [
            {"name": name, "path": str(run.path), "metrics": run.metrics}
            for name, run in zip(result.names, result, strict=True)
        ]
        _print_json({"path": str(result.path), "saes": saes})
    else:
        print(result.path)
        _print_sweep(result)


def _eval(options: argparse.Namespace) -> None:
    from saekit import SAE, tokenize
    from saekit.console import plain
    from saekit.evaluation.labelled import read_labelled
    from saekit.evaluation.measure import Evaluation, assess
    from saekit.evaluation.probing import probe, probe_figures
    from saekit.evaluation.report import check_report_folder, distinct_names, write_report
    from saekit.text import place

    if options.out:
        check_report_folder(options.out)
    text = place(options.text)
    labelled = {Path(path).stem: read_labelled(path) for path in options.probe}
    saes = dict(zip(distinct_names(options.saes), map(SAE.load, options.saes), strict=True))
    contexts = [int(sae.config.metadata.get("context_size") or 128) for sae in saes.values()]
    models: dict[str | None, TransformerBridge] = {}
    evaluations, probes = {}, {}
    for name, sae in saes.items():
        if len(saes) > 1:
            print(f"  {plain(name)}", file=sys.stderr)
        model = models.get(sae.model_name) or _model(options, sae.model_name)
        models[sae.model_name] = model
        tokens = tokenize(text, model, min(*contexts, model.cfg.n_ctx))
        made = assess(model, sae, tokens, max_tokens=options.tokens)
        probes[name] = {texts: probe(model, sae, found) for texts, found in labelled.items()}
        means = {
            f"probe/{texts}/{key}": value
            for texts, found in probes[name].items()
            for key, value in probe_figures(found).items()
        }
        evaluations[name] = Evaluation(made.figures | means, made.density)
    if options.out:
        write_report(options.out, evaluations, probes if labelled else {})
    figures = {name: evaluation.figures for name, evaluation in evaluations.items()}
    if len(figures) > 1:
        _print_json(figures) if options.json else _print_evaluations(figures)
    else:
        (only,) = figures.values()
        _print_json(only) if options.json else _print_metrics(only)
    if not options.json:
        if labelled:
            _print_probes(probes)
        if options.out:
            print(options.out)


def _print_metrics(metrics: dict[str, float]) -> None:
    from saekit.console import out, table

    rows = [
        (name, f"{value:.5g}", _interval(metrics, name))
        for name, value in metrics.items()
        if name.rpartition("_")[2] not in ("low", "high") and not name.startswith("probe/")
    ]
    out.print(table(["metric", "value", "95 %"], rows))


def _print_evaluations(evaluations: dict[str, dict[str, float]]) -> None:
    from saekit.console import out, table

    names = {
        "l0": "L0", "explained_variance": "explained variance", "ce_recovered": "CE recovered",
        "kl_recovered": "KL recovered", "dead": "dead",
    }  # fmt: skip
    intervals = {name for name in names for made in evaluations.values() if f"{name}_low" in made}
    columns = ["SAE"]
    rows = [[sae] for sae in evaluations]
    for name, title in names.items():
        columns += [title, "95 %"] if name in intervals else [title]
        for row, made in zip(rows, evaluations.values(), strict=True):
            row += [f"{made[name]:.4g}" if name in made else ""]
            row += [_interval(made, name)] if name in intervals else []
    out.print(table(columns, rows))


def _print_probes(probes: dict[str, dict[str, list[Probe]]]) -> None:
    from saekit.console import out, table

    some = next(iter(next(iter(probes.values())).values()))[0]
    columns = ["SAE", "texts", "concept", *(f"k = {k}" for k in some.by_k), "all activations", "larger class"]
    rows = [
        (
            sae,
            texts,
            concept.concept,
            *(f"{score.accuracy:.3f}" for score in concept.by_k.values()),
            f"{concept.activations.accuracy:.3f}",
            f"{concept.majority:.3f}",
        )
        for sae, sets in probes.items()
        for texts, found in sets.items()
        for concept in found
    ]
    out.print("\naccuracy of probes on k latents")
    out.print(table(columns, rows))


def _interval(made: dict[str, float], name: str) -> str:
    return f"{made[f'{name}_low']:.3g}…{made[f'{name}_high']:.3g}" if f"{name}_low" in made else ""


def _print_sweep(sweep: Sweep) -> None:
    from saekit.console import out, table

    columns = {
        "L0": "l0", "explained variance": "explained_variance", "CE recovered": "ce_recovered", "dead": "dead"
    }  # fmt: skip
    rows = [
        (name, run.sae.architecture, run.sae.d_sae, *(f"{run.metrics[key]:.4g}" for key in columns.values()))
        for name, run in zip(sweep.names, sweep, strict=True)
    ]
    out.print(table(["name", "architecture", "d_sae", *columns], rows))


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


def _releases(options: argparse.Namespace) -> None:
    from saekit.console import err, out, table
    from saekit.sae.releases import releases

    query = " ".join(options.query)
    found = releases(query)
    listed = found[0].saes if [release.name for release in found] == [query] else None
    shown, total = found[: options.limit], len(found if listed is None else listed)
    if options.json:
        _print_json([_release_record(release, (listed or ())[: options.limit]) for release in shown])
        return
    if listed is not None:
        columns = ["id", "site", "L0", "explained variance", "neuronpedia"]
        rows: list[tuple[object, ...]] = [
            (
                sae.id,
                sae.site or "",
                _or_blank(sae.l0),
                _or_blank(sae.explained_variance),
                sae.neuronpedia or "",
            )
            for sae in listed[: options.limit]
        ]
    else:
        columns = ["release", "model", "SAEs", "reads", "repository"]
        rows = [(r.name, r.model, len(r.saes), _kinds(r.sites), r.repo_id) for r in shown]
    out.print(table(columns, rows) if rows else "nothing found")
    if total > options.limit:
        err.print(f"{total - options.limit} more: --limit {total}")


def _release_record(release: Release, saes: Sequence[PublishedSAE]) -> dict[str, Any]:
    record = {
        "release": release.name,
        "model": release.model,
        "repo_id": release.repo_id,
        "count": len(release.saes),
        "sites": release.sites,
        "supported": release.supported,
    }
    return record | ({"saes": [asdict(sae) for sae in saes]} if saes else {})


def _kinds(sites: Sequence[str]) -> str:
    """Sites without their blocks, each kind once."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", site) for site in sites))


def _or_blank(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


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
    from saekit.sae.files import names_sae

    if not names_sae(options.catalog):
        from saekit import Catalog

        feature = Catalog.open(options.catalog)[
            options.feature
        ]  # an unknown feature is told before a model loads
        model = _model(options, feature.catalog.model_name)
        feature.catalog.check_fits(model)
        return feature, model
    from saekit import SAE, Direction

    sae = SAE.load(options.catalog)
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
