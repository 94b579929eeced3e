"""A training run: recipe → `checkpoints/<name>/` with its recipe, rows, exact checkpoints and final SAEs.

    checkpoints/<name>/recipe.yaml    the recipe with every default spelled out
                       metrics.jsonl  every logged row
                       step-<n>/      exact state, the newest few
                       final/         the SAE, SAELens layout, with metrics.json, its held-out evaluation, and
                                      density.png, how often its latents fire

A recipe with a list of SAEs (a sweep) trains them all on one stream, one forward of the language model for all; each has
its rows and its final SAE in a folder of its own, `checkpoints/<name>/<sae>/`, while a checkpoint holds them all, and
`pareto.png` compares them.

The trainers see only batches of activations; this file is where model, text and trainers meet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saekit.activations import Activations, Rows, StreamPosition
from saekit.errors import Interrupted, InvalidInput, UnknownName, near
from saekit.evaluation import Evaluation, pareto_of_sweep
from saekit.files import existing, read_json
from saekit.lm import load_model, special_ids
from saekit.recipe import (
    LanguageModelRecipe,
    Recipe,
    differences,
    parse_recipe,
    read_recipe,
    write_recipe,
)
from saekit.sae import SAE
from saekit.sites import check_site, site_width
from saekit.text import place
from saekit.tokens import Position, Tokens, tokenize
from saekit.training import checkpoint
from saekit.training.origin import origin
from saekit.training.trainee import FINAL, Trainee

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RUNS = Path("checkpoints")
# What may change between a run and its resumption: how long it is, what it logs, what it keeps.
FREE_ON_RESUME = (
    "training.tokens",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "wandb",
)


@dataclass(frozen=True)
class Run:
    """One trained SAE. Its folder holds `metrics.jsonl` and `final`."""

    path: Path
    sae: SAE
    metrics: dict[str, float]  # the last held-out evaluation


@dataclass(frozen=True)
class Sweep:
    """The SAEs of a list, trained over one forward. Iterates its runs; `sweep["k16"]` is one of them by name."""

    path: Path
    runs: tuple[Run, ...]  # in the recipe's order

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(run.path.name for run in self.runs)

    def __getitem__(self, name: str) -> Run:
        """The run of that name. Raises `UnknownName`."""
        for run in self.runs:
            if run.path.name == name:
                return run
        hint = near(str(name), self.names) or f"It has {', '.join(self.names)}"
        raise UnknownName(f"{name!r} is no SAE of the sweep {self.path}. {hint}")

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)


class Reporter(Protocol):
    """Where a run tells of itself."""

    def line(self, text: str) -> None: ...
    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None: ...


class _Silent:
    def line(self, text: str) -> None: ...
    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None: ...


def train(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    model: TransformerBridge | None = None,
    runs: str | Path = RUNS,
    reporter: Reporter | None = None,
) -> Run | Sweep:
    """Train what a recipe describes, into `<runs>/<name>/`: a `Run` for one SAE, a `Sweep` for a list of them.

    recipe: a YAML file, or a `Recipe`. overrides: `"key.path=value"` texts, `"sae.1.k=8"` for a list's member. resume: go
    on from the newest checkpoint (start, where there is none; change nothing, where the run is finished). model: one that
    is loaded already.

    What becomes of an SAE in a list is, bit for bit, what becomes of it alone.

    Raises `InvalidInput` for a wrong recipe, a run that exists and is not to be resumed, one that another process is
    writing, or a resumption with another recipe, model, text or library; `Interrupted` after SIGINT or SIGTERM, once a
    checkpoint is written.
    """
    if not isinstance(recipe, Recipe):
        read = read_recipe(recipe, overrides)
        if isinstance(read, LanguageModelRecipe):
            raise InvalidInput(
                f"{recipe} trains a language model: use `saekit train`, which knows both kinds"
            )
        recipe = read
    elif overrides:
        raise InvalidInput("overrides go with a recipe file; a Recipe has model_copy(update=…)")
    reporter = reporter or _Silent()
    path = Path(runs) / recipe.name
    if not resume:
        checkpoint.check_new(path)
    model = model or load_model(recipe.model, dtype=recipe.dtype, device=recipe.device)
    recipe = recipe.model_copy(update={"dtype": str(model.cfg.dtype).removeprefix("torch.")})
    if resume and (path / "recipe.yaml").exists():
        _check_same_recipe(path, read_recipe(path / "recipe.yaml"), recipe)
    if (finished := _finished(path, recipe)) is not None:
        checkpoint.settle(path, recipe.training.keep_checkpoints)
        reporter.line(f"{path} is finished; nothing to do")
        return finished
    with checkpoint.exclusive(path, reporter.line):
        if not resume:
            checkpoint.check_new(path)  # nobody may have written it while the model was loading
        checkpoint.clean(path)
        with checkpoint.disk_errors_told(path):
            return _Session(recipe, model, path, resume, reporter).run()


class _Session:
    """One process's part of a run, from its start or its newest checkpoint to the end or a signal."""

    def __init__(
        self, recipe: Recipe, model: TransformerBridge, path: Path, resume: bool, reporter: Reporter
    ) -> None:
        self.recipe, self.model, self.path, self.reporter = recipe, model, path, reporter
        self.train_tokens, self.held_out = corpora(recipe, model)
        self.origin = origin(recipe, model)
        widths = {site: site_width(model, site) for site in recipe.sites}
        metadata = _metadata(recipe, model)
        self.trainees = [
            Trainee(member, widths, model, metadata, path / member.name) for member in recipe.members
        ]
        state = self._restore() if resume else {}
        write_recipe(path / "recipe.yaml", recipe)
        self.stream = Activations(
            model,
            recipe.sites,
            self.train_tokens,
            recipe.training.batch_size,
            ring=max(recipe.training.ring, recipe.training.batch_size),
            contexts=recipe.training.contexts,
            seed=recipe.seed,
            start=_stream_position(state["stream"]) if state else StreamPosition(),
        )
        self.wandb_ids = {key: own["wandb_id"] for key, own in state.get("saes", {}).items()}

    def _restore(self) -> dict[str, Any]:
        """Put the trainers where the newest checkpoint left them → its state; empty where there is none."""
        found = checkpoint.newest(self.path, self.reporter.line)
        if found is None:
            return {}
        tensors, state = checkpoint.load(found)
        checkpoint.check_origin(state.get("origin", {}), self.origin, found)
        before = parse_recipe(state["recipe"], str(found))
        _check_same_recipe(self.path, before, self.recipe)
        for trainee in self.trainees:
            trainee.restore(tensors, state["saes"][trainee.key])
        self.reporter.line(f"resumed from {found}")
        return state

    def run(self) -> Run | Sweep:
        with contextlib.ExitStack() as stack:
            for trainee in self.trainees:
                self._track(trainee, stack)
            self._steps()
            return self._finish()

    def _track(self, trainee: Trainee, stack: contextlib.ExitStack) -> None:
        """Open a trainee's rows until the stack unwinds, by an exception or at the end."""
        recipe, member = self.recipe, trainee.member
        own = member.section.name or member.name
        tracker = trainee.track(
            f"{recipe.name}/{own}" if own else recipe.name,
            recipe.model_dump(mode="json") | {"sae": member.section.model_dump(mode="json")},
            recipe.wandb,
            group=recipe.wandb.group or (recipe.name if recipe.is_sweep else None),
            wandb_id=self.wandb_ids.get(trainee.key),
        )
        stack.push(lambda kind, *_: tracker.close(failed=kind is not None))

    @property
    def step(self) -> int:
        return self.trainees[0].trainer.steps_taken

    def _steps(self) -> None:
        config = self.recipe.training
        with checkpoint.stop_on_signals() as stop:
            clock = _Clock(self.trainees[0].trainer.tokens_seen)
            for batch in self._batches():
                outs = [trainee.step(batch) for trainee in self.trainees]
                step = self.step
                if step % config.log_every == 0 or step == config.steps:
                    figures = [trainee.log(out) for trainee, out in zip(self.trainees, outs, strict=True)]
                    rate = clock.rate(self.trainees[0].trainer.tokens_seen)
                    self.reporter.progress(step, config.steps, _told(figures, rate))
                if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
                    self._evaluate()
                if step < config.steps and (
                    stop.asked or (config.checkpoint_every and step % config.checkpoint_every == 0)
                ):
                    self._checkpoint()
                if stop.asked and step < config.steps:
                    raise Interrupted(f"stopped at step {step} of {config.steps}; go on with --resume")

    def _batches(self) -> Iterator[Rows]:
        batches = self.stream.batches()
        while self.step < self.recipe.training.steps:
            yield next(batches)

    def _evaluate(self) -> list[Evaluation]:
        tokens = self.recipe.training.evaluate_tokens
        return [trainee.evaluate(self.model, self.held_out, tokens) for trainee in self.trainees]

    def _checkpoint(self) -> None:
        for trainee in self.trainees:
            trainee.tracker.checkpointed()
        checkpoint.save(
            self.path,
            self.step,
            {name: tensor for trainee in self.trainees for name, tensor in trainee.tensors().items()},
            {
                "origin": self.origin,
                "recipe": self.recipe.model_dump(mode="json"),
                "stream": self.stream.position,
                "saes": {trainee.key: trainee.state() for trainee in self.trainees},
            },
            self.recipe.training.keep_checkpoints,
        )

    def _finish(self) -> Run | Sweep:
        """Evaluate, write every `final`, and only then the last checkpoint, which is what makes a run finished."""
        found = self._evaluate()
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            trainee.finish(evaluation)
        comparison = pareto_of_sweep(self.path) if self.recipe.is_sweep else None
        self._checkpoint()
        runs = []
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            title = "-".join(filter(None, (self.recipe.name, trainee.member.name)))
            trainee.publish(title, evaluation.figures, comparison)
            sae = trainee.trainer.sae.requires_grad_(False)
            runs.append(Run(trainee.folder, sae, evaluation.figures))
        return Sweep(self.path, tuple(runs)) if self.recipe.is_sweep else runs[0]


def _told(figures: list[dict[str, float]], rate: float) -> dict[str, float]:
    """What a reporter is told: one SAE's figures, or how many there are and how far they reach."""
    if len(figures) == 1:
        return figures[0] | {"tokens_per_second": rate}
    ev = [own["explained_variance"] for own in figures]
    return {
        "saes": len(figures),
        "explained_variance_low": min(ev),
        "explained_variance_high": max(ev),
        "dead": max(own["dead"] for own in figures),
        "tokens_per_second": rate,
    }


class _Clock:
    """Tokens per second since the session's second log, so that start-up does not count."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._start = tokens, time.perf_counter()

    def rate(self, tokens: int) -> float:
        return (tokens - self._tokens) / max(1e-9, time.perf_counter() - self._start)


def corpora(recipe: Recipe, model: TransformerBridge) -> tuple[Tokens, Tokens]:
    """(endless training contexts, one pass of held-out contexts), which share no document."""
    data = recipe.data
    for site in recipe.sites:
        check_site(model, site)
    apart = data.held_out_text is None
    base = tokenize(
        _source(data.text),
        model,
        data.context_size,
        field=data.field,
        split="train" if apart and data.held_out > 0 else None,
        held_out=data.held_out if apart else 0.0,
        shuffle=recipe.seed if data.shuffle else None,
        epochs=None,
    )
    if not apart:
        return base, tokenize(_source(data.held_out_text), model, data.context_size, field=data.field)
    if data.held_out == 0:
        raise InvalidInput(
            "data.held_out: 0 leaves nothing to evaluate on; name a text with data.held_out_text"
        )
    held_out = base.with_(split="held_out", shuffle=None, epochs=1)
    next(iter(held_out))  # an empty split is an error now, not after the training
    return base, held_out


def _source(text: str | tuple[str, ...] | None) -> Any:
    if isinstance(text, tuple):
        return [existing(part, "text") for part in text]
    return place(text or "")


def _metadata(recipe: Recipe, model: TransformerBridge) -> dict[str, Any]:
    """What SAELens keeps about an SAE's origin."""
    text = recipe.data.text
    return {
        "model_class_name": "TransformerBridge",
        "hook_head_index": None,
        "context_size": recipe.data.context_size,
        "seqpos_slice": [None],
        "prepend_bos": True,
        "exclude_special_tokens": list(special_ids(model)),
        "dataset_path": text if isinstance(text, str) else ",".join(Path(part).name for part in text),
        "model_from_pretrained_kwargs": {},
    }


def _stream_position(saved: Any) -> StreamPosition:
    filled_from, fill, given = saved
    return StreamPosition(Position(*filled_from), fill, given)


def _finished(path: Path, recipe: Recipe) -> Run | Sweep | None:
    """What a finished run left, or None where something is to be done."""
    folders = [path / member.name for member in recipe.members]
    newest = checkpoint.newest(path)
    last = f"step-{recipe.training.steps}"
    if newest is None or newest.name != last or not all((folder / FINAL).exists() for folder in folders):
        return None
    runs = [
        Run(folder, SAE.load(folder / FINAL), read_json(folder / FINAL / "metrics.json"))
        for folder in folders
    ]
    return Sweep(path, tuple(runs)) if recipe.is_sweep else runs[0]


def _check_same_recipe(path: Path, before: Recipe | LanguageModelRecipe, recipe: Recipe) -> None:
    if changed := differences(before, recipe, FREE_ON_RESUME):
        details = "; ".join(f"{key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise InvalidInput(
            f"run {path} was started with another recipe ({details}); give the new one another name"
        )
