"""A training run: recipe → `checkpoints/<name>/` with its recipe, rows, exact checkpoints and final SAE.

    checkpoints/<name>/recipe.yaml    the recipe with every default spelled out
                       metrics.jsonl  every logged row
                       step-<n>/      exact state, the newest few
                       final/         the SAE, SAELens layout, and metrics.json, its held-out evaluation

The trainer sees only batches of activations; this file is where model, text and trainer meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from saekit.activations import Activations, StreamPosition
from saekit.errors import Interrupted, InvalidInput
from saekit.evaluation import evaluate
from saekit.files import existing, read_json, staged, write_json
from saekit.lm import load_model, special_ids
from saekit.recipe import LanguageModelRecipe, Recipe, differences, read_recipe, write_recipe
from saekit.sae import SAE
from saekit.sae.files import save as save_sae
from saekit.sites import check_site, site_width
from saekit.text import place
from saekit.tokens import Position, Tokens, tokenize
from saekit.training import checkpoint
from saekit.training.tracking import SAMPLES, Tracker
from saekit.training.trainer import StepOutput, Trainer

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
    """A finished run."""

    path: Path
    sae: SAE
    metrics: dict[str, float]  # the last held-out evaluation


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
) -> Run:
    """Train the SAE that a recipe describes, into `<runs>/<name>/`.

    recipe: a YAML file, or a `Recipe`. overrides: `"key.path=value"` texts. resume: go on from the newest checkpoint
    (start, where there is none; change nothing, where the run is finished). model: one that is loaded already.

    Raises `InvalidInput` for a wrong recipe, a run that exists and is not to be resumed, or a resumption with
    another recipe; `Interrupted` after SIGINT or SIGTERM, once a checkpoint is written.
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
    if path.exists() and not resume and any(path.iterdir()):
        raise InvalidInput(
            f"run {path} exists: resume it (--resume), choose another name, or remove the folder"
        )
    model = model or load_model(recipe.model, dtype=recipe.dtype, device=recipe.device)
    recipe = recipe.model_copy(update={"dtype": str(model.cfg.dtype).removeprefix("torch.")})
    if resume and (path / "recipe.yaml").exists():
        _check_same_recipe(path, recipe)
    if (path / "final").exists() and _is_finished(path, recipe):
        reporter.line(f"{path} is finished; nothing to do")
        return Run(path, SAE.load(path / "final"), read_json(path / "final" / "metrics.json"))
    return _Session(recipe, model, path, resume, reporter).run()


class _Session:
    """One process's part of a run, from its start or its newest checkpoint to the end or a signal."""

    def __init__(
        self, recipe: Recipe, model: TransformerBridge, path: Path, resume: bool, reporter: Reporter
    ) -> None:
        self.recipe, self.model, self.path, self.reporter = recipe, model, path, reporter
        self.train_tokens, self.held_out = corpora(recipe, model)
        sae = SAE.new(
            recipe.sae.architecture,
            d_in=site_width(model, recipe.site),
            d_sae=recipe.sae.d_sae,
            k=getattr(recipe.sae, "k", None),
            site=recipe.site,
            model=recipe.model,
            seed=recipe.seed,
        ).to(model.cfg.device)
        sae.config.metadata.update(_metadata(recipe, model))
        self.trainer = Trainer(sae, **recipe.training.model_dump())
        found = checkpoint.newest(path) if resume else None
        state: dict[str, Any] = {}
        if found is not None:
            tensors, state = checkpoint.load(found)
            self.trainer.restore(tensors, state["trainer"])
            reporter.line(f"resumed from {found}")
        path.mkdir(parents=True, exist_ok=True)
        write_recipe(path / "recipe.yaml", recipe)
        self.stream = Activations(
            model,
            recipe.site,
            self.train_tokens,
            recipe.training.batch_size,
            ring=max(recipe.training.ring, recipe.training.batch_size),
            contexts=recipe.training.contexts,
            seed=recipe.seed,
            start=_stream_position(state["stream"]) if state else StreamPosition(),
        )
        self.tracker = Tracker(
            path,
            recipe.name,
            recipe.model_dump(mode="json"),
            recipe.wandb,
            wandb_id=state.get("wandb_id"),
            step=self.trainer.steps_taken,
        )

    def run(self) -> Run:
        failed = True
        try:
            self._steps()
            result = self._finish()
            failed = False
            return result
        finally:
            self.tracker.close(failed=failed)

    def _steps(self) -> None:
        config, trainer = self.recipe.training, self.trainer
        with checkpoint.stop_on_signals() as stop:
            clock = _Clock(trainer.tokens_seen)
            for x in self._batches():
                out = trainer.step(x)
                step = trainer.steps_taken
                if step % config.log_every == 0 or step == config.steps:
                    self._log(out, clock)
                if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
                    self._evaluate()
                if step < config.steps and (
                    stop.asked or (config.checkpoint_every and step % config.checkpoint_every == 0)
                ):
                    self._checkpoint()
                if stop.asked and step < config.steps:
                    raise Interrupted(f"stopped at step {step} of {config.steps}; go on with --resume")

    def _batches(self) -> Iterator[Tensor]:
        batches = iter(self.stream)
        while self.trainer.steps_taken < self.recipe.training.steps:
            yield next(batches)

    def _log(self, out: StepOutput, clock: _Clock) -> None:
        trainer = self.trainer
        figures = {name: float(value) for name, value in out._asdict().items()}
        if not figures["loss"] == figures["loss"]:
            raise InvalidInput(
                f"the loss became NaN at step {trainer.steps_taken}: lower training.lr (now {self.recipe.training.lr})"
            )
        row: dict[str, float] = {
            "step": trainer.steps_taken,
            SAMPLES: trainer.tokens_seen,
            "losses/overall_loss": figures["loss"],
            "losses/mse_loss": figures["mse"],
            "metrics/l0": figures["l0"],
            "metrics/explained_variance": figures["explained_variance"],
            "sparsity/dead_features": round(figures["dead"] * trainer.sae.d_sae),
            "details/current_learning_rate": trainer.learning_rate,
        }
        if trainer.sae.architecture == "standard":
            row["losses/l1_loss"] = figures["sparsity"]
            row["details/l1_coefficient"] = self.recipe.training.l1_coefficient
        else:
            row["losses/auxiliary_reconstruction_loss"] = figures["aux"]
        self.tracker.log(row)
        self.reporter.progress(
            trainer.steps_taken,
            self.recipe.training.steps,
            figures | {"tokens_per_second": clock.rate(trainer.tokens_seen)},
        )

    def _evaluate(self) -> dict[str, float]:
        metrics = evaluate(
            self.model, self.trainer.sae, self.held_out, max_tokens=self.recipe.training.evaluate_tokens
        )
        self.tracker.log(
            {
                "step": self.trainer.steps_taken,
                SAMPLES: self.trainer.tokens_seen,
                "metrics/ce_loss_score": metrics.get("ce_recovered", 0.0),
                "metrics/mean_log10_feature_sparsity": metrics["mean_log10_density"],
                **{f"held_out/{name}": value for name, value in metrics.items()},
            }
        )
        return metrics

    def _checkpoint(self) -> None:
        self.tracker.checkpointed()
        checkpoint.save(
            self.path,
            self.trainer.steps_taken,
            self.trainer.tensors(),
            {
                "trainer": self.trainer.counters(),
                "stream": self.stream.position,
                "wandb_id": self.tracker.wandb_id,
            },
            self.recipe.training.keep_checkpoints,
        )

    def _finish(self) -> Run:
        """Evaluate, write `final`, and only then the last checkpoint, which is what makes a run finished."""
        metrics = self._evaluate()
        sae = self.trainer.sae
        sae.config.metadata.update(l0=metrics["l0"], num_dead_features=metrics["dead_latents"])
        with staged(self.path / "final") as building:
            save_sae(sae, building / "sae")
            for file in (building / "sae").iterdir():
                file.rename(building / file.name)
            (building / "sae").rmdir()
            write_json(building / "metrics.json", metrics)
        self._checkpoint()
        self.tracker.publish(self.path / "final", self.recipe.name, metrics)
        return Run(self.path, sae.requires_grad_(False), metrics)


class _Clock:
    """Tokens per second since the session's second log, so that start-up does not count."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._start = tokens, time.perf_counter()

    def rate(self, tokens: int) -> float:
        return (tokens - self._tokens) / max(1e-9, time.perf_counter() - self._start)


def corpora(recipe: Recipe, model: TransformerBridge) -> tuple[Tokens, Tokens]:
    """(endless training contexts, one pass of held-out contexts), which share no document."""
    data = recipe.data
    check_site(model, recipe.site)
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
        "training_architecture": recipe.sae.architecture,
    }


def _stream_position(saved: Any) -> StreamPosition:
    filled_from, fill, given = saved
    return StreamPosition(Position(*filled_from), fill, given)


def _is_finished(path: Path, recipe: Recipe) -> bool:
    newest = checkpoint.newest(path)
    return newest is not None and newest.name == f"step-{recipe.training.steps}"


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    before = read_recipe(path / "recipe.yaml")
    if changed := differences(before, recipe, FREE_ON_RESUME):
        details = "; ".join(f"{key}: {old!r} then, {new!r} now" for key, old, new in changed)
        raise InvalidInput(
            f"run {path} was started with another recipe ({details}); give the new one another name"
        )
