"""One SAE of a run: its trainer, the sites it takes from the stream, its rows and its folder.

A run trains one of these or several side by side (`training.run`). None knows of the others, so that what becomes of
each is the same, bit for bit, whoever trains beside it.

B tokens in a batch, D = d_in, E = d_out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.activations import Rows
from saekit.errors import InvalidInput
from saekit.evaluation import Evaluation, assess
from saekit.evaluation.density import density_figure
from saekit.evaluation.front import save_figure
from saekit.files import staged, write_json
from saekit.members import Member
from saekit.recipe import Recipe
from saekit.sae import SAE
from saekit.sae.files import save as save_sae
from saekit.sae.ranks import ALONE, Elsewhere, Part, Ranks
from saekit.tokens import Tokens
from saekit.training.parallel import shard, whole
from saekit.training.report import HTML, PNG, write_report
from saekit.training.tracking import SAMPLES, Tracker, WandbConfig
from saekit.training.trainer import StepOutput, Trainer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FINAL, DENSITY = "final", "density.png"
# Latents below a firing rate: those that did not fire in the last 1/rate tokens. A rate of 1e-6 cannot be told from the
# 65,536 tokens of an evaluation, and needs no window of its own here: the trainer counts tokens since each one fired.
RARE = {"sparsity/below_1e-5": 100_000, "sparsity/below_1e-6": 1_000_000}


class Trainee:
    """member: what the recipe says. widths: of the sites, by name. metadata: of the SAE's origin. folder: its own.

    ranks: the processes that train it together, which all make the same calls; the first alone writes and evaluates.
    """

    def __init__(
        self,
        member: Member,
        widths: Mapping[str, int],
        model: TransformerBridge,
        metadata: Mapping[str, Any],
        folder: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.member, self.folder, self.ranks = member, folder, ranks
        self.trainer = Trainer(
            shard(new_sae(member, widths, str(model.cfg.model_name), metadata), ranks).to(model.cfg.device),
            ranks=ranks,
            **member.training.model_dump(),
        )
        self._tracker: Tracker | None = None

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return self.member.name or "sae"

    @property
    def tracker(self) -> Tracker:
        assert self._tracker is not None, "track() comes first"
        return self._tracker

    def track(
        self,
        title: str,
        config: Mapping[str, Any],
        wandb: WandbConfig,
        *,
        group: str | None,
        wandb_id: str | None,
    ) -> Tracker:
        """Open its rows; those beyond the step it stands at are dropped."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tracker = Tracker(
            self.folder, title, config, wandb, group=group, wandb_id=wandb_id, step=self.trainer.steps_taken
        )
        return self._tracker

    def step(self, batch: Rows, part: Part | None = None) -> StepOutput:
        """One step on its sites' rows: x [B, D], and a transcoder's target [B, E]. part: which of the whole batch's they are."""
        sites, target = self.member.sites, self.member.target_site
        x = batch[sites[0]] if len(sites) == 1 else torch.cat([batch[site] for site in sites], 1)
        return self.trainer.step(x, None if target is None else batch[target], part=part)

    def log(self, out: StepOutput) -> dict[str, float]:
        """Write a row of the step just taken → its figures. Raises `InvalidInput` where the loss is NaN."""
        trainer, sae = self.trainer, self.trainer.sae
        figures = {name: float(value) for name, value in out._asdict().items()}
        if math.isnan(figures["loss"]):
            whose = f"the loss of {self.member.name}" if self.member.name else "the loss"
            raise (InvalidInput if self.ranks.is_first else Elsewhere)(
                f"{whose} became NaN at step {trainer.steps_taken}: lower training.lr (now {trainer.config.lr})"
            )
        row: dict[str, float] = {
            "step": trainer.steps_taken,
            SAMPLES: trainer.tokens_seen,
            "losses/overall_loss": figures["loss"],
            "losses/mse_loss": figures["mse"],
            "metrics/l0": figures["l0"],
            "metrics/explained_variance": figures["explained_variance"],
            "sparsity/dead_features": round(figures["dead"] * sae.d_sae),
            "details/current_learning_rate": trainer.learning_rate,
        }
        if (penalty := sae.kind.penalty) is not None:
            row[f"losses/{penalty}_loss"] = figures["sparsity"]
            row[f"details/{penalty}_coefficient"] = float(trainer.coefficient)
        revived_by = trainer.config.dead_latents or sae.kind.dead_latents
        if revived_by == "auxk" or sae.architecture == "gated":
            row["losses/auxiliary_reconstruction_loss"] = figures["aux"]
        row |= {
            key: int(self.ranks.latents.sum((trainer.tokens_since_fired >= tokens).sum()))
            for key, tokens in RARE.items()
            if trainer.tokens_seen >= tokens  # before that nobody can be told to be so rare
        }
        if self.ranks.is_first:
            self.tracker.log(row)
        return figures

    def evaluate(self, model: TransformerBridge, held_out: Tokens, max_tokens: int) -> Evaluation:
        """Evaluate on held-out text and write a row of it. Only the first process has densities."""
        sae = whole(self.trainer.sae, self.ranks)
        found: list[Evaluation] = []

        def work() -> dict[str, float]:
            assert sae is not None
            found.append(assess(model, sae, held_out, max_tokens=max_tokens))
            self._log_evaluation(found[0].figures)
            return found[0].figures

        metrics = self.ranks.first(work)
        return found[0] if found else Evaluation(metrics, torch.empty(0))

    def _log_evaluation(self, metrics: Mapping[str, float]) -> None:
        row: dict[str, float] = {"step": self.trainer.steps_taken, SAMPLES: self.trainer.tokens_seen}
        if "ce_recovered" in metrics:
            row["metrics/ce_loss_score"] = metrics["ce_recovered"]
        row["metrics/mean_log10_feature_sparsity"] = metrics["mean_log10_density"]
        self.tracker.log(row | {f"held_out/{name}": value for name, value in metrics.items()})

    def finish(self, evaluation: Evaluation) -> None:
        """Write `final`: the SAE, its metrics and a picture of its firing rates, whole or not at all."""
        sae = whole(self.trainer.sae, self.ranks)
        self.ranks.first(lambda: self._write_final(sae, evaluation))

    def _write_final(self, sae: SAE | None, evaluation: Evaluation) -> None:
        assert sae is not None
        metrics = evaluation.figures
        sae.config.metadata.update(l0=metrics["l0"], num_dead_features=metrics["dead_latents"])
        with staged(self.folder / FINAL) as building:
            save_sae(sae, building / "sae")
            for file in (building / "sae").iterdir():
                file.rename(building / file.name)
            (building / "sae").rmdir()
            write_json(building / "metrics.json", metrics)
            save_figure(
                density_figure({self.member.name or "feature density": evaluation.density}),
                building / DENSITY,
            )

    def report(
        self, recipe: Recipe, model: TransformerBridge, held_out: Tokens, evaluation: Evaluation
    ) -> Path | None:
        """Write the report of what it has become. Returns its page's path; in the other processes None."""
        sae = whole(self.trainer.sae, self.ranks)
        if sae is None or not self.ranks.is_first:
            return None
        return write_report(self.folder, recipe, self.member, model, sae, held_out, evaluation)

    def publish(self, title: str, metrics: Mapping[str, float], comparison: Path | None) -> None:
        """Show `final`, the report, and a picture that compares it with the others of a sweep, in W&B."""
        self.tracker.show("feature_density", self.folder / FINAL / DENSITY)
        for name in (HTML, PNG):
            if (self.folder / name).exists():
                self.tracker.show(name.replace(".", "_"), self.folder / name)
        if comparison is not None:
            self.tracker.show("pareto", comparison)
        self.tracker.publish(self.folder / FINAL, title, metrics)

    # Its part of a checkpoint

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.key}/{name}": tensor for name, tensor in self.trainer.tensors().items()}

    def state(self) -> dict[str, Any]:
        wandb_id = self.tracker.wandb_id if self.ranks.is_first else None
        return {"trainer": self.trainer.counters(), "wandb_id": wandb_id}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        prefix = f"{self.key}/"
        own = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        self.trainer.restore(own, state["trainer"])


def new_sae(member: Member, widths: Mapping[str, int], model: str, metadata: Mapping[str, Any]) -> SAE:
    """A fresh SAE as the recipe describes it. widths: of the sites, by name."""
    section, target = member.section, member.target_site
    sae = SAE.new(
        member.architecture,
        d_in=sum(widths[site] for site in member.sites),
        d_sae=section.d_sae,
        k=getattr(section, "k", None),
        prefixes=getattr(section, "prefixes", None),
        site=member.sites if member.is_crosscoder else member.sites[0],
        widths=[widths[site] for site in member.sites] if member.is_crosscoder else None,
        target_site=target,
        d_out=None if target is None else widths[target],
        skip=section.skip,
        model=model,
        seed=member.seed,
    )
    sae.config.metadata.update(metadata, training_architecture=member.architecture)
    return sae
