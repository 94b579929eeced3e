"""The clocks of `benchmarks.speed`: which contenders do which job, and in which order they are asked.

A row of a clock is one job done by several contenders in turn, A B C A B C …; the first is saekit, and every other's
seconds are divided by its seconds round by round. Rows of clock "linear" have saekit alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.speed_inputs import CONTEXT_SIZE, MODEL, SITE, Inputs
from benchmarks.speed_process import Failed, Worker
from saekit import embedded

K, L0 = 32, 64  # L0: of the rows of trained, sparse SAEs
LR, HELD = 3e-4, 1e-9  # HELD: moves nothing, so that a row keeps its L0, or its dead latents
SLOW = 1.5  # seconds; longer steps are timed one to a round, after fewer warm-up steps
TAKE_K = ("topk", "batchtopk", "matryoshka")
BATCHES_HELD = 6
CONTEXTS = 32  # a forward
RING = 16_384  # rows that are shuffled, in every library


MODULES = {
    "saekit": "benchmarks.speed_saekit",
    "SAELens": "benchmarks.speed_saelens",
    "dictionary_learning": "benchmarks.speed_dictionary_learning",
    "sparsify": "benchmarks.speed_sparsify",
    "SAEDashboard": "benchmarks.speed_dashboard",
    "repeng": "benchmarks.speed_repeng",
}


class Contender(NamedTuple):
    name: str
    library: str  # a key of `MODULES`
    options: Mapping[str, Any] = MappingProxyType({})


class Spread(NamedTuple):
    median: float
    least: float
    most: float


@dataclass
class Entry:
    """What one contender did of a row."""

    name: str
    seconds: list[list[float]] = field(default_factory=list)  # rounds of steps
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None

    def spread(self, whole_rounds: bool) -> Spread:
        """Seconds a step; of each step, or of whole rounds where only these are alike."""
        taken = self.rounds(True) if whole_rounds else [s for round_ in self.seconds for s in round_]
        return Spread(statistics.median(taken), min(taken), max(taken))

    def rounds(self, whole_rounds: bool) -> list[float]:
        middle = statistics.fmean if whole_rounds else statistics.median
        return [middle(round_) for round_ in self.seconds]


@dataclass(frozen=True)
class Row:
    """A job and its contenders. tokens: in one step."""

    name: str
    tokens: int
    jobs: list[tuple[Contender, dict[str, Any]]]
    whole_rounds: bool = False
    at_once: int = 4
    rounds: int = 5
    warm_up: int = 5

    def ratios(self, entries: Sequence[Entry]) -> dict[str, Spread]:
        """Each entry's seconds over the first one's, round by round."""
        base, *others = entries
        if base.failed:
            return {}
        ours = base.rounds(self.whole_rounds)
        found = {}
        for other in others:
            if other.failed is None:
                each = [b / a for a, b in zip(ours, other.rounds(self.whole_rounds), strict=True)]
                found[other.name] = Spread(statistics.median(each), min(each), max(each))
        return found


SAEKIT = Contender("saekit", "saekit")
SAEKIT_FP32 = Contender("saekit fp32", "saekit", {"precision": "float32", "dtype": "float32"})
SAELENS = Contender("SAELens", "SAELens")
AUTOCAST = Contender("SAELens autocast", "SAELens", {"autocast": True})
COMPILED = Contender("SAELens autocast, compile", "SAELens", {"autocast": True, "compile": True})
OF_A_STEP = (
    SAEKIT,
    SAEKIT_FP32,
    SAELENS,
    AUTOCAST,
    COMPILED,
    Contender("dictionary_learning", "dictionary_learning"),
    Contender("sparsify", "sparsify"),
    Contender("sparsify autocast", "sparsify", {"autocast": True}),
)
OF_A_FORWARD = (
    SAEKIT,
    SAEKIT_FP32,
    SAELENS,
    Contender("SAELens autocast_lm", "SAELens", {"autocast_lm": True}),
    Contender("SAELens, bf16 model", "SAELens", {"dtype": "bfloat16"}),
)
FROM_TOKENS = (
    SAEKIT,
    Contender("saekit, two SAEs", "saekit", {"saes": 2}),
    SAEKIT_FP32,
    SAELENS,
    Contender("SAELens autocast", "SAELens", {"autocast": True}),
    COMPILED,
)
OF_A_CATALOG = (SAEKIT, SAEKIT_FP32, Contender("SAEDashboard", "SAEDashboard"))
OF_STEERING = (
    SAEKIT,
    SAEKIT_FP32,
    Contender("clamp, TopK SAE", "saekit", {"clamp": True}),
    Contender("repeng", "repeng"),
    Contender("repeng, bf16", "repeng", {"dtype": "bfloat16"}),
    Contender("TransformerLens hook", "SAELens"),
    Contender("TransformerLens hook, bf16", "SAELens", {"dtype": "bfloat16"}),
    Contender("TransformerLens, plain", "SAELens", {"plain": True}),
)


class Shape(NamedTuple):
    d_in: int
    d_sae: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.d_in}/{self.d_sae}/{self.batch_size}"


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line."""

    shapes: Sequence[Shape]
    wide: Sequence[Shape]  # timed with topk alone, unless they are among `shapes`
    architectures: Sequence[str]
    libraries: set[str]
    contenders: set[str]  # by name; none: all of these libraries
    features: int
    quick: bool


def step_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """One optimizer step on activations: from the first one, with half of all latents dead for AuxK, and at an L0 below 100."""
    for shape in (*wanted.shapes, *wanted.wide):
        for architecture in wanted.architectures if shape in wanted.shapes else ("topk",):
            job = _step(inputs, shape, architecture)
            yield _row(wanted, f"{architecture} {shape}", shape.batch_size, OF_A_STEP, job)
            if shape not in wanted.shapes:
                continue
            if architecture == "topk":
                aux = {**job, "aux": True, "lr": HELD}
                yield _row(wanted, f"topk, AuxK {shape}", shape.batch_size, OF_A_STEP, aux)
            if architecture in ("standard", "jumprelu"):
                sparse = {**job, "l0": L0, "lr": HELD}
                yield _row(wanted, f"{architecture}, L0 < 100 {shape}", shape.batch_size, OF_A_STEP, sparse)


def _step(inputs: Inputs, shape: Shape, architecture: str, k: int = K) -> dict[str, Any]:
    return {
        "clock": "step",
        "architecture": architecture,
        **({"k": k} if architecture in TAKE_K else {}),
        **shape._asdict(),
        "lr": LR,
        "arrays": str(inputs.activations(shape.d_in, BATCHES_HELD * shape.batch_size)),
    }


def _row(
    wanted: Wanted, name: str, tokens: int, contenders: Sequence[Contender], job: dict[str, Any], **how: Any
) -> Row:
    who = [
        c for c in contenders if c.library in wanted.libraries and c.name in (wanted.contenders or {c.name})
    ]
    if job.get("architecture", "topk") != "topk":
        who = [c for c in who if c.library != "sparsify"]  # it has no other kind
    return Row(name, tokens, [(c, {**job, **c.options}) for c in who], **how)


def lm_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """The language model's forward up to the site."""
    contexts = 2 if wanted.quick else CONTEXTS
    job = {
        "clock": "lm", "model": str(inputs.model), "site": SITE, "d_in": MODEL["n_embd"], "contexts": contexts,
        "arrays": str(inputs.ids),
    }  # fmt: skip
    name = f"6 of 8 blocks, {contexts} contexts of {CONTEXT_SIZE}"
    yield _row(wanted, name, contexts * CONTEXT_SIZE, OF_A_FORWARD, job)


def _end(inputs: Inputs, quick: bool) -> dict[str, Any]:
    size = {"d_sae": 512, "batch_size": 128, "ring": 512, "contexts": 2}
    if not quick:
        size = {"d_sae": 8192, "batch_size": 2048, "ring": RING, "contexts": CONTEXTS}
    return {
        "clock": "end", "model": str(inputs.model), "site": SITE, "d_in": MODEL["n_embd"], "architecture": "topk", "k": K,
        "lr": LR, "arrays": str(inputs.ids), **size,
    }  # fmt: skip


def end_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """From tokens to a trained SAE. A round is twice what fills the ring, so that all rounds hold the same work."""
    job = _end(inputs, wanted.quick)
    steps = job["ring"] // job["batch_size"]
    yield _row(
        wanted, f"topk {job['d_in']}/{job['d_sae']}/{job['batch_size']}, block 6 of 8", job["batch_size"], FROM_TOKENS,
        job, whole_rounds=True, at_once=2 * steps, rounds=3, warm_up=steps,
    )  # fmt: skip


def catalog_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """A catalog of every feature, against a dashboard of every feature."""
    rows, features = (4, 32) if wanted.quick else (32, wanted.features)
    job = {
        "clock": "catalog", "model": str(inputs.model), "sae": str(inputs.sae(features)), "site": SITE, "rows": rows,
        "arrays": str(inputs.ids), "folder": str(inputs.folder / "catalog"),
    }  # fmt: skip
    yield _row(
        wanted, f"{features:,} features, {rows * CONTEXT_SIZE:,} tokens", rows * CONTEXT_SIZE, OF_A_CATALOG, job,
        whole_rounds=True, at_once=1, rounds=3 if features <= 4096 else 1, warm_up=0,
    )  # fmt: skip


def steer_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """Generation with a direction added at the site, in the model of the other clocks and in the embedded one."""
    new, pairs = (8, 2) if wanted.quick else (64, 20)
    models = [
        ("one prompt", inputs.model, SITE, MODEL["n_embd"]),
        ("one prompt, embedded model", embedded.folder("model"), "blocks.3.hook_resid_pre", 256),
    ]
    for name, model, site, width in models:
        job = {
            "clock": "steer", "model": str(model), "site": site, "new_tokens": new, "pairs": pairs,
            "arrays": str(inputs.steering(width)),
        }  # fmt: skip
        yield _row(
            wanted, f"{new} tokens, {name}", new, OF_STEERING, job, whole_rounds=True, at_once=1, rounds=7, warm_up=1
        )  # fmt: skip


def linear_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """saekit against itself: twice the latents, eight times the k, twice the tokens."""
    base = Shape(256, 1024, 256) if wanted.quick else Shape(512, 8192, 2048)
    wide = base._replace(d_sae=2 * base.d_sae)

    def named(name: str, job: dict[str, Any]) -> tuple[Contender, dict[str, Any]]:
        return Contender(name, "saekit"), job

    first = named(f"d_sae {base.d_sae}, k 32", _step(inputs, base, "topk"))
    others = [
        named(f"d_sae {wide.d_sae}", _step(inputs, wide, "topk")),
        named("k 256", _step(inputs, base, "topk", k=256)),
    ]
    yield Row(f"topk {base}", base.batch_size, [first, *others])
    n = 1024 if wanted.quick else 4 * RING
    job = {**_end(inputs, wanted.quick), "clock": "run"}
    yield Row(
        "whole runs from tokens", n,
        [named(f"{tokens:,} tokens", {**job, "tokens": tokens}) for tokens in (n, 2 * n)],
        whole_rounds=True, at_once=1, rounds=3, warm_up=1,
    )  # fmt: skip


def quality_rows(inputs: Inputs, wanted: Wanted) -> Iterator[Row]:
    """Not a clock: FVU at equal tokens, of what saekit chooses and of its fp32 twin."""
    job = {
        "clock": "quality", "batch_size": 2048, "lr": 2e-3, "tokens": 32_768 if wanted.quick else 400_000,
        "evaluate_tokens": 4096 if wanted.quick else 32_768,
    }  # fmt: skip
    for architecture in ("topk", "batchtopk"):
        yield _row(
            wanted, f"{architecture}, {job['tokens']:,} tokens", job["tokens"], (SAEKIT, SAEKIT_FP32),
            {**job, "architecture": architecture}, whole_rounds=True, at_once=1, rounds=1, warm_up=0,
        )  # fmt: skip


CLOCKS: dict[str, Callable[[Inputs, Wanted], Iterator[Row]]] = {
    "step": step_rows,
    "lm": lm_rows,
    "end": end_rows,
    "catalog": catalog_rows,
    "steer": steer_rows,
    "linear": linear_rows,
    "quality": quality_rows,
}


def measure(row: Row, worker_of: Callable[[Contender], Worker], quick: bool) -> list[Entry]:
    """Do a row: open and warm up each contender, then rounds of `at_once` steps of each in turn, then close them.

    worker_of: the process that does a contender's jobs; it raises `Failed` where there is none.
    """
    entries = [Entry(contender.name) for contender, _ in row.jobs]
    at_once = [row.at_once] * len(entries)
    if quick:
        at_once = [min(steps, 2) if not row.whole_rounds else steps for steps in at_once]
    warm_up, rounds = (min(2, row.warm_up), min(2, row.rounds)) if quick else (row.warm_up, row.rounds)

    def each(ask: Callable[[int, Worker], None]) -> None:
        for i, (contender, _) in enumerate(row.jobs):
            if entries[i].failed is None:
                try:
                    ask(i, worker_of(contender))
                except Failed as error:
                    entries[i].failed = str(error)

    def start(i: int, worker: Worker) -> None:
        worker.ask(open=row.jobs[i][1])
        fastest = float("inf")  # compilers make the first steps slower than they are
        for step in range(warm_up):
            fastest = min(fastest, *worker.ask(steps=1)["seconds"])
            if not row.whole_rounds and step >= 2 and fastest > SLOW:
                at_once[i] = 1
                break

    def go(i: int, worker: Worker) -> None:
        entries[i].seconds.append(worker.ask(steps=at_once[i])["seconds"])

    def finish(i: int, worker: Worker) -> None:
        entries[i].figures = worker.ask(close=True)

    each(start)
    for _ in range(rounds):
        each(go)
    each(finish)
    return entries
