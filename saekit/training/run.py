"""A training run: recipe → `checkpoints/<name>/` with its recipe, rows, exact checkpoints and final SAEs.

    checkpoints/<name>/recipe.yaml    the recipe with every default spelled out
                       metrics.jsonl  every logged row
                       step-<n>/      exact state, the newest few
                       final/         the SAE, SAELens layout, with metrics.json, its held-out evaluation, and
                                      density.png, how often its latents fire
                       report.html    what became of it, to read and to send; the same as a picture: report.png

A recipe with a list of SAEs (a sweep) trains them all on one stream, one forward of the language model for all; each has
its rows, its final SAE and its report in a folder of its own, `checkpoints/<name>/<sae>/`, while a checkpoint holds them all, and
`pareto.png` compares them.

Under torchrun several processes do this together (`training.parallel`); one process imports nothing for it.

The trainers see only batches of activations; this file is where model, text and trainers meet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from saekit.activations import Activations, Share, StreamPosition
from saekit.errors import Interrupted, InvalidInput, UnknownName, first_line, near
from saekit.evaluation import Evaluation, pareto_of_sweep
from saekit.files import existing, read_json
from saekit.lm import fast_dtype, load_model, special_ids
from saekit.locks import exclusive
from saekit.recipe import (
    NO_TRAINING,
    AnyRecipe,
    LanguageModelRecipe,
    Recipe,
    differences,
    parse_recipe,
    read_recipe,
    write_recipe,
)
from saekit.sae import SAE, memory
from saekit.sae.ranks import Elsewhere, Part, Ranks
from saekit.sites import check_site, site_width
from saekit.text import place
from saekit.tokens import Position, Tokens, tokenize
from saekit.training import checkpoint
from saekit.training.origin import origin
from saekit.training.parallel import device_of_process, exchanged, latent_axis, ranks_of
from saekit.training.trainee import FINAL, Trainee

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

RUNS = Path("checkpoints")
# What may change between a run and its resumption: how long it is, what it logs, what it keeps, who computes it.
FREE_ON_RESUME = (
    "training.tokens",
    "training.log_every",
    "training.evaluate_every",
    "training.evaluate_tokens",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "report",
    "wandb",
    "parallel",
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

    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
        """At every row. figures: saes, tokens (seen), tokens_in_all and tokens_per_second of the run; loss, l0,
        explained_variance, dead and the other figures of a step; and once there was an evaluation held_out_step,
        held_out_explained_variance and held_out_ce_recovered. In a sweep what is an SAE's is told as `<name>/<figure>`.
        """


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

    What becomes of an SAE in a list is, bit for bit, what becomes of it alone. Under torchrun the processes train together,
    and all return the same.

    Raises `InvalidInput` for a wrong recipe, a run that exists and is not to be resumed, one that another process is
    writing, or a resumption with another recipe, model, text or library; `Interrupted` after SIGINT or SIGTERM, once a
    checkpoint is written.
    """
    if not isinstance(recipe, Recipe):
        read = read_recipe(recipe, overrides)
        if not isinstance(read, Recipe):
            other = "trains a language model: use `saekit train`"
            raise InvalidInput(f"{recipe} {other if isinstance(read, LanguageModelRecipe) else NO_TRAINING}")
        recipe = read
    elif overrides:
        raise InvalidInput("overrides go with a recipe file; a Recipe has model_copy(update=…)")
    with ranks_of(recipe.parallel.data, recipe.parallel.latents) as ranks:
        told = reporter if reporter and ranks.is_first else _Silent()
        return _train(recipe, resume, model, Path(runs) / recipe.name, told, ranks)


def _train(
    recipe: Recipe,
    resume: bool,
    model: TransformerBridge | None,
    path: Path,
    reporter: Reporter,
    ranks: Ranks,
) -> Run | Sweep:
    """What `train` does, in one process of those that train together."""
    if not resume:
        ranks.first(lambda: checkpoint.check_new(path))
    model = model or _load(recipe, ranks)
    recipe = recipe.model_copy(update={"dtype": str(model.cfg.dtype).removeprefix("torch.")})
    if resume and ranks.first((path / "recipe.yaml").exists):
        before = read_recipe(path / "recipe.yaml")
        ranks.each(lambda: _check_same_recipe(path, before, recipe))
    if ranks.first(lambda: _is_finished(path, recipe)):
        ranks.first(lambda: checkpoint.settle(path, recipe.training.keep_checkpoints))
        reporter.line(f"{path} is finished; nothing to do")
        return _finished(path, recipe)

    def begin() -> None:
        stack.enter_context(exclusive(path, reporter.line))
        if not resume:
            checkpoint.check_new(path)  # nobody may have written it while the model was loading
        checkpoint.clean(path)
        stack.enter_context(checkpoint.disk_errors_told(path))

    with contextlib.ExitStack() as stack:
        ranks.first(begin)
        return _Session(recipe, model, path, resume, reporter, ranks).run()


def _load(recipe: Recipe, ranks: Ranks) -> TransformerBridge:
    """The language model, in one dtype for all processes, also where they find different machines."""
    device = device_of_process(recipe.device)
    if recipe.dtype is None and not ranks.alone:
        return load_model(
            recipe.model, dtype=ranks.first(lambda: _name(fast_dtype(device or "cpu"))), device=device
        )
    return load_model(recipe.model, dtype=recipe.dtype, device=device)


class _Session:
    """One process's part of a run, from its start or its newest checkpoint to the end or a signal."""

    def __init__(
        self,
        recipe: Recipe,
        model: TransformerBridge,
        path: Path,
        resume: bool,
        reporter: Reporter,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.model, self.path, self.reporter = recipe, model, path, reporter
        self.ranks = ranks
        self.train_tokens, self.held_out = corpora(recipe, model)
        self.origin = origin(recipe, model)
        widths = {site: site_width(model, site) for site in recipe.sites}
        metadata = _metadata(recipe, model)
        self.trainees = [
            Trainee(member, widths, model, metadata, path / member.name, ranks) for member in recipe.members
        ]
        state = self._restore() if resume else {}
        ranks.first(lambda: write_recipe(path / "recipe.yaml", recipe))
        self.stream = Activations(
            model,
            recipe.sites,
            self.train_tokens,
            recipe.training.batch_size,
            ring=max(recipe.training.ring, recipe.training.batch_size),
            contexts=recipe.training.contexts,
            seed=recipe.seed,
            start=_stream_position(state["stream"]) if state else StreamPosition(),
            share=(ranks.world.rank, ranks.world.size),
            cache=recipe.data.cache,
            cache_rows=recipe.training.tokens,
            tell=reporter.line,
        )
        self.wandb_ids = {key: own["wandb_id"] for key, own in state.get("saes", {}).items()}
        self.evaluated: dict[str, float] = {}  # what is told of the last evaluation

    def _restore(self) -> dict[str, Any]:
        """Put the trainers where the newest checkpoint left them → its state; empty where there is none."""
        step = self.ranks.first(self._newest)
        if step is None:
            return {}
        found = self.path / step
        tensors, state = checkpoint.load(found, ranks=self.ranks, axis=_axis)
        self.ranks.each(lambda: checkpoint.check_origin(state.get("origin", {}), self.origin, found))
        before = parse_recipe(state["recipe"], str(found))
        self.ranks.each(lambda: _check_same_recipe(self.path, before, self.recipe))
        for trainee in self.trainees:
            trainee.restore(tensors, state["saes"][trainee.key])
        self.reporter.line(f"resumed from {found}")
        return state

    def _newest(self) -> str | None:
        """The newest whole checkpoint's name."""
        found = checkpoint.newest(self.path, self.reporter.line)
        return None if found is None else found.name

    def run(self) -> Run | Sweep:
        with contextlib.ExitStack() as stack:
            stack.callback(memory.clear)
            self.ranks.first(lambda: self._track_all(stack))
            self._steps()
            return self._finish()

    def _track_all(self, stack: contextlib.ExitStack) -> None:
        for trainee in self.trainees:
            self._track(trainee, stack)
        places = [place for trainee in self.trainees[:3] for place in trainee.tracker.places]
        more = ["…"] if len(self.trainees) > 3 else []
        self.reporter.line(f"logged to {', '.join([*places, *more])}")

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
            for share in self._shares():
                part = None if self.ranks.data.size == 1 else Part(share.numbers, share.size)
                outs = [trainee.step(share.rows, part) for trainee in self.trainees]
                step = self.step
                logs = step % config.log_every == 0 or step == config.steps
                if logs:
                    figures = [trainee.log(out) for trainee, out in zip(self.trainees, outs, strict=True)]
                    self.reporter.progress(step, config.steps, self._told(figures, clock))
                if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
                    self._evaluate()
                stopping = self._agreed(stop, logs)
                if step < config.steps and (
                    stopping or (config.checkpoint_every and step % config.checkpoint_every == 0)
                ):
                    self._checkpoint()
                    stopping = self._agreed(stop, logs)
                if stopping and step < config.steps:
                    raise (Interrupted if self.ranks.is_first else Elsewhere)(
                        f"stopped at step {step} of {config.steps}; go on with --resume"
                    )

    def _agreed(self, stop: checkpoint.StopFlag, logs: bool) -> bool:
        """Whether one of the processes was asked to stop. On a GPU, which it would wait for, they agree when they log."""
        on_gpu = torch.device(self.model.cfg.device or "cpu").type == "cuda"
        if not self.ranks.alone and on_gpu and not logs:
            return False
        return self.ranks.world.any(stop.asked)

    def _shares(self) -> Iterator[Share]:
        with contextlib.closing(self.stream.shares()) as shares:
            while self.step < self.recipe.training.steps:
                yield exchanged(next(shares), self.ranks.latents)

    def _told(self, figures: list[dict[str, float]], clock: _Clock) -> dict[str, float]:
        """What a reporter is told (`Reporter.progress`). figures: of each SAE."""
        config, seen = self.recipe.training, self.trainees[0].trainer.tokens_seen
        told: dict[str, float] = {
            "saes": len(figures),
            "tokens": seen,
            "tokens_in_all": config.steps * config.batch_size,
            "tokens_per_second": clock.rate(seen),
        }
        for trainee, own in zip(self.trainees, figures, strict=True):
            told |= {_key(trainee, name): value for name, value in own.items()}
        return told | self.evaluated

    def _evaluate(self) -> list[Evaluation]:
        tokens = self.recipe.training.evaluate_tokens
        found = [trainee.evaluate(self.model, self.held_out, tokens) for trainee in self.trainees]
        self.evaluated = {"held_out_step": self.step}
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            for name in ("explained_variance", "ce_recovered"):
                if name in evaluation.figures:
                    self.evaluated[_key(trainee, f"held_out_{name}")] = evaluation.figures[name]
        return found

    def _checkpoint(self) -> None:
        for trainee in self.trainees if self.ranks.is_first else ():
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
            ranks=self.ranks,
            axis=_axis,
        )

    def _finish(self) -> Run | Sweep:
        """Evaluate, write every `final` and report, and only then the last checkpoint, which is what makes a run finished."""
        self.reporter.line(f"evaluating on about {self.recipe.training.evaluate_tokens:,} held-out tokens")
        found = self._evaluate()
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            trainee.finish(evaluation)
        pictures: list[Path] = []
        if self.recipe.is_sweep:
            self.ranks.first(lambda: pictures.append(pareto_of_sweep(self.path)))
        if self.recipe.report:
            self._report(found)
        self._checkpoint()
        if not self.ranks.alone:
            self.ranks.first(lambda: self._publish(found, pictures))
            return _finished(self.path, self.recipe)
        self._publish(found, pictures)
        runs = [
            Run(trainee.folder, trainee.trainer.sae.requires_grad_(False), evaluation.figures)
            for trainee, evaluation in zip(self.trainees, found, strict=True)
        ]
        return Sweep(self.path, tuple(runs)) if self.recipe.is_sweep else runs[0]

    def _report(self, found: list[Evaluation]) -> None:
        """Write the report of each SAE. Its training is done and saved, so what goes wrong here is told and ends nothing."""
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            try:
                path = trainee.report(self.recipe, self.model, self.held_out, evaluation)
            except (
                Exception
            ) as error:  # of a picture, of a full disk, of a model that is odd: of a dozen kinds
                self.reporter.line(
                    f"no report in {trainee.folder} ({first_line(error)}); all else of the run is there"
                )
            else:
                if path is not None:
                    self.reporter.line(f"report: {path}")

    def _publish(self, found: list[Evaluation], pictures: list[Path]) -> None:
        for trainee, evaluation in zip(self.trainees, found, strict=True):
            title = "-".join(filter(None, (self.recipe.name, trainee.member.name)))
            trainee.publish(title, evaluation.figures, pictures[0] if pictures else None)


def _axis(name: str, tensor: Tensor) -> int | None:
    """Of a tensor in a checkpoint, whose name starts with its SAE's."""
    return latent_axis(name.partition("/")[2], tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(trainee: Trainee, figure: str) -> str:
    """Of a figure that a reporter is told: of the one SAE by its name, of one in a list with that before it."""
    return f"{trainee.member.name}/{figure}" if trainee.member.name else figure


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


def _is_finished(path: Path, recipe: Recipe) -> bool:
    newest = checkpoint.newest(path)
    if newest is None or newest.name != f"step-{recipe.training.steps}":
        return False
    return all((path / member.name / FINAL).exists() for member in recipe.members)


def _finished(path: Path, recipe: Recipe) -> Run | Sweep:
    """What a finished run left."""
    folders = [path / member.name for member in recipe.members]
    runs = [
        Run(folder, SAE.load(folder / FINAL), read_json(folder / FINAL / "metrics.json"))
        for folder in folders
    ]
    return Sweep(path, tuple(runs)) if recipe.is_sweep else runs[0]


def _check_same_recipe(path: Path, before: AnyRecipe, recipe: Recipe) -> None:
    if changed := differences(before, recipe, FREE_ON_RESUME):
        details = "; ".join(f"{key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise InvalidInput(
            f"run {path} was started with another recipe ({details}); give the new one another name"
        )
