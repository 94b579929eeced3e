"""`saekit demo`, `train`, `eval` and `releases`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.cli.common import command, count, model_of, model_option, print_json
from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.evaluation.probing import Probe
    from saekit.sae.releases import PublishedSAE, Release
    from saekit.training.run import Sweep


def add(commands: Any) -> None:
    demo = command(commands, "demo", _demo, "the whole story on the embedded model")
    demo.add_argument("--out", default="checkpoints", help="folder for the run (default: checkpoints)")

    train = command(commands, "train", _train, "train what a recipe describes")
    train.add_argument("recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. sae.d_sae=2048 sae.1.k=8")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check the recipe and say what it would do")

    evaluate = command(commands, "eval", _eval, "evaluate one or several SAEs on text")
    evaluate.add_argument("saes", nargs="+", metavar="sae", help="a folder, or what SAE.load takes")
    evaluate.add_argument("--text", default="tiny", help="text to evaluate on (default: the embedded shards)")
    evaluate.add_argument("--tokens", type=count, default=65_536, help="how many (default: 65536)")
    evaluate.add_argument("--out", metavar="DIR", help="folder for the figures and the pictures")
    evaluate.add_argument(
        "--probe", action="append", default=[], metavar="PATH",
        help="texts with labels (.csv, .json, .jsonl or a folder of .json) to probe; may be repeated",
    )  # fmt: skip
    model_option(evaluate)

    published = command(commands, "releases", _releases, "published SAEs by name, model, repository or site")
    published.add_argument("query", nargs="*", help="words; or a release's exact name, to list its SAEs")
    published.add_argument("--limit", type=count, default=20, help="rows (default: 20)")


def _demo(options: argparse.Namespace) -> None:
    from saekit.demo import demo

    result = demo(Path(options.out), quiet=options.json)
    if options.json:
        print_json(result)


def _train(options: argparse.Namespace) -> None:
    from saekit.console import RunReporter
    from saekit.recipe import NO_TRAINING, LanguageModelRecipe, Recipe, read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if not isinstance(recipe, (Recipe, LanguageModelRecipe)):
        raise InvalidInput(f"{options.recipe} {NO_TRAINING}")
    if options.dry_run:
        from saekit.training.dry_run import describe

        description = describe(recipe)
        print_json(description) if options.json else print(description["text"])
        return
    with RunReporter() as reporter:
        if isinstance(recipe, LanguageModelRecipe):
            from saekit.training.language_model import train_language_model
            from saekit.training.parallel import refuse_several

            refuse_several("a language model is trained")
            run = Path("checkpoints") / recipe.name
            final = train_language_model(recipe, run, resume=options.resume, report=reporter.line)
            print_json({"path": str(final)}) if options.json else print(final)
            return
        from saekit.training.parallel import first_process
        from saekit.training.run import Run, train

        result = train(recipe, resume=options.resume, reporter=reporter)
    if not first_process():
        return
    if isinstance(result, Run):
        if options.json:
            print_json({"path": str(result.path), "metrics": result.metrics})
        else:
            print(f"{result.path / 'final'}")
            _print_metrics(result.metrics)
    elif options.json:
        saes = [
            {"name": name, "path": str(run.path), "metrics": run.metrics}
            for name, run in zip(result.names, result, strict=True)
        ]
        print_json({"path": str(result.path), "saes": saes})
    else:
        print(result.path)
        _print_sweep(result)


def _eval(options: argparse.Namespace) -> None:
    from saekit import SAE, tokenize
    from saekit.evaluation.labelled import read_labelled
    from saekit.evaluation.measure import Evaluation, assess
    from saekit.evaluation.probing import probe, probe_figures
    from saekit.evaluation.report import check_report_folder, distinct_names, write_report
    from saekit.lens.tokens import visible
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
            print(f"  {visible(name)}", file=sys.stderr)
        model = models.get(sae.model_name) or model_of(options, sae.model_name)
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
        print_json(figures) if options.json else _print_evaluations(figures)
    else:
        (only,) = figures.values()
        print_json(only) if options.json else _print_metrics(only)
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


def _releases(options: argparse.Namespace) -> None:
    from saekit.console import err, out, table
    from saekit.sae.releases import releases

    query = " ".join(options.query)
    found = releases(query)
    listed = found[0].saes if [release.name for release in found] == [query] else None
    shown, total = found[: options.limit], len(found if listed is None else listed)
    if options.json:
        print_json([_release_record(release, (listed or ())[: options.limit]) for release in shown])
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
