"""`saekit catalog …` and `serve`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.cli.common import (
    catalog_and_model,
    command,
    count,
    model_of,
    model_of_catalog,
    model_option,
    print_json,
    words,
)
from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from saekit.catalog import Catalog, Feature


def add(commands: Any) -> None:
    catalog = commands.add_parser("catalog", help="build, show, search, page, publish a feature catalog")
    parts = catalog.add_subparsers(required=True, metavar="COMMAND")

    build = command(parts, "build", _catalog_build, "one pass over text")
    build.add_argument(
        "saes", nargs="+", metavar="sae", help="a folder, or what SAE.load takes; several share one pass"
    )
    build.add_argument("--text", required=True)
    build.add_argument("--out", required=True)
    build.add_argument("--tokens", type=count, default=None, help="stop after about so many")
    build.add_argument("--context-size", type=count, default=128)
    build.add_argument(
        "--contexts", type=count, default=20, help="strongest ones kept per feature (default: 20)"
    )
    build.add_argument("--window", type=count, default=64, help="tokens of a context (default: 64)")
    build.add_argument(
        "--bands", type=count, default=5, help="of the active range, sampled from (default: 5)"
    )
    build.add_argument("--per-band", type=count, default=4, help="contexts of each band (default: 4)")
    build.add_argument(
        "--sample-rows", type=count, default=128, help="kept whole, to score on (default: 128)"
    )
    build.add_argument("--part", type=_part, metavar="i/n", help="one of n parts, to be merged")
    build.add_argument("--licence", help="of the corpus, e.g. cc-by-4.0")
    build.add_argument("--include-special", action="store_true", help="count BOS, EOS and pad too")
    build.add_argument("--restart", action="store_true", help="do not go on with what an earlier build left")
    model_option(build)

    merge = command(parts, "merge", _catalog_merge, "one catalog of parts built apart")
    merge.add_argument("parts", nargs="+")
    merge.add_argument("--out", required=True)

    explain = command(
        parts, "explain", _catalog_explain, "explain features with a language model, and score it"
    )
    explain.add_argument("catalog")
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--features", type=_features, help="numbers such as 1,2,3")
    which.add_argument("--top", type=count, default=20, help="features by summed activation (default: 20)")
    how = explain.add_mutually_exclusive_group(required=True)
    how.add_argument("--base-url", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    how.add_argument("--local", metavar="MODEL", help="a transformers model: a folder or a hub id")
    how.add_argument("--prompts-out", metavar="FILE", help="write what is to be asked as JSON lines")
    how.add_argument("--answers-in", metavar="FILE", help="read answers to such prompts")
    explain.add_argument("--model", help="name of the model that answers (not with --local)")
    explain.add_argument(
        "--key-env", metavar="NAME", help="environment variable that holds the endpoint's key"
    )
    explain.add_argument(
        "--score",
        type=words,
        default=["detection"],
        help="of detection,fuzzing,simulation (default: detection)",
    )
    explain.add_argument("--control", action="store_true", help="try another feature's explanation too")
    explain.add_argument("--journal", metavar="FILE", help="file of answers (default: beside the catalog)")
    explain.add_argument("--yes", action="store_true", help="start without asking")

    note = command(parts, "note", _catalog_note, "write down what you say about a feature")
    note.add_argument("catalog")
    note.add_argument("feature", type=int)
    note.add_argument("text")
    note.add_argument("--author", required=True, help="who says so; it is published with the note")

    show = command(parts, "show", _catalog_show, "one feature's record")
    show.add_argument("catalog")
    show.add_argument("feature", type=int)
    show.add_argument("--bands", action="store_true", help="samples over its whole range too")

    search = command(parts, "search", _catalog_search, "features for words, or all that pass the filters")
    search.add_argument("catalog")
    search.add_argument("query", nargs="?", default="", help="words (default: all features)")
    search.add_argument("--limit", type=count, default=10)
    for name, what in (
        ("density", "share of tokens on which it fires"), ("max-activation", "largest activation"),
    ):  # fmt: skip
        search.add_argument(f"--min-{name}", type=float, help=f"least {what}")
        search.add_argument(f"--max-{name}", type=float, help=f"greatest {what}")
    search.add_argument("--min-score", type=float, help="least score of an explanation")
    search.add_argument(
        "--sort", choices=("relevance", "density", "max_activation", "score", "index"), default="relevance"
    )
    search.add_argument("--reverse", action="store_true", help="the other way round")

    check = command(
        parts, "check", _catalog_check, "name every inconsistency; exit code 1 where there is one"
    )
    check.add_argument("folder")

    firing = command(parts, "firing", _catalog_firing, "which features fire on each token of a text")
    firing.add_argument("catalog")
    firing.add_argument("text")
    firing.add_argument("--limit", type=count, default=5, help="features per token (default: 5)")
    model_option(firing)

    near = command(parts, "near", _catalog_near, "features nearest to one")
    near.add_argument("catalog")
    near.add_argument("feature", type=int)
    near.add_argument("--by", choices=("decoder", "firing"), default="decoder", help="(default: decoder)")
    near.add_argument("--limit", type=count, default=10)

    raising = command(parts, "raising", _catalog_raising, "features whose direction raises a token")
    raising.add_argument("catalog")
    raising.add_argument("token", help="its text with its space, such as ' lightsaber'")
    raising.add_argument("--limit", type=count, default=20)
    raising.add_argument("--exact", action="store_true", help="among all features, with the model's weights")
    model_option(raising)

    diff = command(parts, "diff", _catalog_diff, "which features of two catalogs match")
    diff.add_argument("catalog")
    diff.add_argument("other")
    diff.add_argument(
        "--by", choices=("decoder", "firing"), help="(default: decoder where directions compare)"
    )
    diff.add_argument("--threshold", type=float, default=0.7, help="similarity of a match (default: 0.7)")
    diff.add_argument("--limit", type=count, default=20, help="features shown (default: 20); --json has all")

    page = command(
        parts, "page", _catalog_page, "a static page: a folder, or for some features one .html file"
    )
    page.add_argument("catalog")
    page.add_argument("out", help="a folder, or with --features a file that ends in .html")
    page.add_argument("--features", type=_features, help="numbers such as 1,2,3: those of a single file")
    page.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="show what fires on it (repeatable)"
    )
    page.add_argument("--prompts", metavar="FILE", help="such texts, one a line")
    model_option(page)

    publish = command(parts, "publish", _catalog_publish, "upload to the Hugging Face Hub")
    publish.add_argument("catalog")
    publish.add_argument("repository", help="user/name")
    publish.add_argument("--private", action="store_true")
    publish.add_argument("--wandb", action="store_true", help="to Weights & Biases as well")
    publish.add_argument("--licence", help="of the corpus, e.g. cc-by-4.0")
    publish.add_argument("--metrics", metavar="FILE", help="the SAE's evaluation, from `saekit eval --json`")

    export = command(parts, "export", _catalog_export, "the files that Neuronpedia imports")
    export.add_argument("catalog")
    export.add_argument("out")
    export.add_argument("--model-id", required=True, help="as Neuronpedia names the model")
    export.add_argument("--source-set", required=True, help="e.g. res-jb")
    export.add_argument("--layer", type=int)
    export.add_argument("--release")
    export.add_argument("--title")
    export.add_argument("--creator", default="")
    export.add_argument("--url")
    export.add_argument("--repository", help="the hub's, where the SAE is published")
    export.add_argument("--no-vectors", action="store_true", help="leave the directions out")

    upload = command(parts, "upload", _catalog_upload, "features to a source of yours on Neuronpedia")
    upload.add_argument("catalog")
    upload.add_argument("--model-id", required=True)
    upload.add_argument("--source", required=True, help="e.g. 6-res-jb")
    upload.add_argument("--base-url", default="https://www.neuronpedia.org")
    upload.add_argument("--key-env", default="NEURONPEDIA_API_KEY", metavar="NAME")
    upload.add_argument("--start", type=int, default=0, help="go on from this feature")

    serve = command(commands, "serve", _serve, "the page with a live model behind it, on 127.0.0.1")
    serve.add_argument("catalog")
    serve.add_argument("--port", type=_port, default=8321, help="default: 8321; 0 takes any free one")
    serve.add_argument("--open", action="store_true", help="open it in the browser")
    model_option(serve)


def _port(text: str) -> int:
    if text.isdigit() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 0 to 65535")


def _part(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n such as 1/4")
    return int(i), int(n)


def _features(text: str) -> list[int]:
    if all(part.strip().isdigit() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of features such as 1,2,3")


def _catalog_build(options: argparse.Namespace) -> None:
    from saekit import SAE, Catalog, tokenize
    from saekit.catalog.working import unfinished
    from saekit.console import CatalogProgress
    from saekit.text import place

    saes = [SAE.load(sae) for sae in options.saes]
    model = model_of(options, saes[0].model_name)
    tokens = tokenize(place(options.text), model, options.context_size)
    try:
        with CatalogProgress() as progress:
            made: Any = Catalog.build(
                model, saes if len(saes) > 1 else saes[0], tokens, options.out, max_tokens=options.tokens,
                contexts=options.contexts, window=options.window, bands=options.bands, per_band=options.per_band,
                sample_rows=options.sample_rows, include_special=options.include_special, licence=options.licence,
                part=options.part, resume=not options.restart, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as error:
        if not unfinished(Path(options.out)):
            raise
        raise InvalidInput(
            f"catalog {options.out}: stopped; the same command goes on where it was (--restart begins anew)"
        ) from error
    if options.part:
        print_json({"path": str(made)}) if options.json else print(made)
    else:
        _print_made(options, made if isinstance(made, list) else [made])


def _catalog_merge(options: argparse.Namespace) -> None:
    from saekit import Catalog

    made = Catalog.merge(options.parts, options.out)
    _print_made(options, made if isinstance(made, list) else [made])


def _print_made(options: argparse.Namespace, catalogs: list[Catalog]) -> None:
    told = [{"path": str(c.path), "features": len(c), "alive": int((c.density > 0).sum())} for c in catalogs]
    if options.json:
        print_json(told if len(told) > 1 else told[0])
        return
    for catalog, one in zip(catalogs, told, strict=True):
        print(f"{catalog}\n{one['path']}: {one['alive']:,} of {one['features']:,} features fired")


def _catalog_explain(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.catalog.explain import Endpoint, Local, plan, strongest
    from saekit.console import AnswersProgress, err
    from saekit.lens.tokens import visible

    if not options.local and not options.model:
        raise InvalidInput("explain: --model says who answers")
    folder = Catalog.open(options.catalog).path
    by = (
        Local(options.local)
        if options.local
        else Endpoint(options.model, options.base_url, key_env=options.key_env)
        if options.base_url
        else options.model
    )
    features = options.features or strongest(folder, options.top)
    made = plan(folder, features, by, score=options.score, control=options.control, journal=options.journal)
    if options.prompts_out:
        n = made.write_prompts(options.prompts_out)
        result = {"prompts": n, "path": options.prompts_out}
        print_json(result) if options.json else print(f"{options.prompts_out}: {n:,} prompts")
        return
    if options.answers_in:
        done = made.read_answers(options.answers_in)
    else:
        err.print(visible(str(made)))
        if not options.yes:
            if not sys.stdin.isatty():
                raise InvalidInput("explain: --yes starts it where nobody can be asked")
            if input("start? [y/N] ").strip().lower() not in ("y", "yes"):
                raise InvalidInput("explain: not started")
        with AnswersProgress() as progress:
            done = made.run(progress)
    if options.json:
        print_json(asdict(done))
        return
    for row in done.explanations:
        print(visible(f"{row['feature']:>8}  {row['text']}"))
    print(visible(str(done)))


def _catalog_note(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.catalog.explain import note

    note(Catalog.open(options.catalog), options.feature, options.text, options.author)
    if options.json:
        print_json({"feature": options.feature, "text": options.text})


def _catalog_show(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.console import out
    from saekit.display.feature import feature_text

    feature = Catalog.open(options.catalog)[options.feature]
    if options.json:
        print_json(_record(feature))
        return
    out.print(feature_text(feature, bands=options.bands))


def _record(feature: Any) -> dict[str, Any]:
    return {
        "feature": feature.index,
        "density": feature.density,
        "max_activation": feature.max_activation,
        "explanation": feature.explanation,
        "score": feature.score,
        "explanations": [asdict(e) for e in feature.explanations],
        "top_tokens": [asdict(t) for t in feature.top_tokens],
        "logits_top": [asdict(t) for t in feature.logits_top],
        "logits_bottom": [asdict(t) for t in feature.logits_bottom],
        "histogram": [asdict(b) for b in feature.histogram],
        "effects": [asdict(b) for b in feature.effects],
        "neighbours": [asdict(n) for n in feature.neighbours],
        "coactive": [asdict(n) for n in feature.coactive],
        "neurons": [asdict(n) for n in feature.neurons],
        "contexts": [asdict(context) for context in feature.contexts],
        "bands": [asdict(band) for band in feature.bands],
    }


def _catalog_search(options: argparse.Namespace) -> None:
    from saekit import Catalog

    hits = Catalog.open(options.catalog).search(
        options.query, options.limit, min_density=options.min_density, max_density=options.max_density,
        min_max_activation=options.min_max_activation, max_max_activation=options.max_max_activation,
        min_score=options.min_score, sort=options.sort, reverse=options.reverse,
    )  # fmt: skip
    _print_features(options, [(f, {}) for f in hits])


def _catalog_near(options: argparse.Namespace) -> None:
    from saekit import Catalog

    catalog = Catalog.open(options.catalog)
    found = catalog.nearest(options.feature, options.by, options.limit)
    _print_features(options, [(catalog[n.feature], {"similarity": n.similarity}) for n in found])


def _catalog_raising(options: argparse.Namespace) -> None:
    from saekit import Catalog

    catalog = Catalog.open(options.catalog)
    model = model_of_catalog(options, catalog) if options.exact or options.model else None
    found = catalog.raising(options.token, options.limit, model)
    _print_features(options, [(catalog[r.feature], {"effect": r.effect}) for r in found])


def _print_features(options: argparse.Namespace, found: list[tuple[Feature, dict[str, float]]]) -> None:
    """Features in a table, each with figures of its own before those that all have."""
    from saekit.console import out
    from saekit.display.catalog import features_table

    if options.json:
        print_json(
            [
                {
                    "feature": f.index,
                    **own,
                    "explanation": f.explanation,
                    "score": f.score,
                    "density": f.density,
                    "max_activation": f.max_activation,
                }
                for f, own in found
            ]
        )
        return
    out.print(features_table(found) if found else "nothing found")


def _catalog_check(options: argparse.Namespace) -> None:
    from saekit.catalog.check import check
    from saekit.lens.tokens import visible

    found = check(options.folder)
    if options.json:
        print_json({"path": options.folder, "found": found})
    elif found:
        print(visible("\n".join(found)))
    else:
        print(f"{options.folder}: nothing wrong")
    if found:
        raise InvalidInput(f"{options.folder}: {len(found)} inconsistencies")


def _catalog_firing(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.console import out, table

    catalog = Catalog.open(options.catalog)
    found = catalog.firing(options.text, model_of_catalog(options, catalog), limit=options.limit)
    if options.json:
        print_json(asdict(found))
        return
    rows = [
        (repr(token), ", ".join(f"{i} {catalog[i].explanation or ''} ({a:.3g})" for i, a in features))
        for token, features in zip(found.tokens, found.features, strict=True)
    ]
    out.print(table(["token", "features"], rows))


def _catalog_diff(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.console import out, table
    from saekit.lens.tokens import visible

    one, other = Catalog.open(options.catalog), Catalog.open(options.other)
    found = one.difference(other, options.by, threshold=options.threshold)
    if options.json:
        print_json(
            {
                "by": found.by,
                "threshold": found.threshold,
                "share": None if found.share != found.share else found.share,
                "share_back": None if found.share_back != found.share_back else found.share_back,
                "features": found.table().to_pylist(),
                "only_there": found.only_there,
            }
        )
        return
    print(visible(str(found)))
    rows = [
        (i, one[i].explanation or "", f"{found.similarity[i]:.2f}", int(j), other[int(j)].explanation or "")
        for i in found.only_here[: options.limit]
        if (j := found.match[i]) >= 0
    ]
    if rows:
        out.print("\nfeatures without a match, and what is nearest to them")
        out.print(table(["feature", "means", "similarity", "nearest", "means"], rows))


def _catalog_page(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.catalog.page import size_of

    catalog = Catalog.open(options.catalog)
    prompts = [*options.prompt, *(_lines(options.prompts) if options.prompts else ())]
    model = model_of_catalog(options, catalog) if prompts else None
    made = catalog.page(options.out, prompts=prompts, model=model, features=options.features)
    start, size = made / "index.html" if made.is_dir() else made, size_of(made)
    if options.json:
        print_json({"page": str(start), "bytes": size})
        return
    print(start)
    print(f"{size / 1e6:.1f} MB", file=sys.stderr)


def _lines(file: str) -> list[str]:
    """The lines of a text file that say something. Raises `FileMissing`, or `InvalidInput` for one that is no UTF-8 text."""
    from saekit.files import existing

    path = existing(file, "prompts")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"prompts {file}: not a text file ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _catalog_publish(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.files import read_json

    metrics = read_json(Path(options.metrics)) if options.metrics else None
    address = Catalog.open(options.catalog).publish(
        options.repository,
        private=options.private,
        wandb=options.wandb,
        licence=options.licence,
        metrics=metrics,
    )
    print_json({"address": address}) if options.json else print(address)


def _catalog_export(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.catalog.neuronpedia import export

    place = export(
        Catalog.open(options.catalog), options.out, model_id=options.model_id, source_set=options.source_set,
        layer=options.layer, release=options.release, title=options.title, creator=options.creator, url=options.url,
        repository=options.repository, vectors=not options.no_vectors,
    )  # fmt: skip
    print_json({"path": str(place)}) if options.json else print(place)


def _catalog_upload(options: argparse.Namespace) -> None:
    from saekit import Catalog
    from saekit.catalog.neuronpedia import upload

    done = upload(
        Catalog.open(options.catalog), model_id=options.model_id, source=options.source, base_url=options.base_url,
        key_env=options.key_env, start=options.start,
        progress=lambda n, of: print(f"  {n:,} of {of:,} features", file=sys.stderr),
    )  # fmt: skip
    if options.json:
        print_json(asdict(done))
    else:
        print(f"{done.features:,} features in {done.calls} calls; {done.silent:,} never fired")


def _serve(options: argparse.Namespace) -> None:
    import webbrowser

    from saekit.server.app import serve

    def ready(address: str) -> None:
        print_json({"address": address}) if options.json else print(f"{address}   (Ctrl-C stops)")
        sys.stdout.flush()  # also into a pipe: the server goes on
        if options.open:
            webbrowser.open(address)

    catalog, model = catalog_and_model(options)
    serve(catalog, model, port=options.port, ready=ready)
