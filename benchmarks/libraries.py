"""saekit and SAELens behind one function each: settings and batches in, a trained SAE out.

Both get the same schedule (1 % warm-up, constant, linear to 0 over the last 20 %), Adam (0.9, 0.999), gradients
clipped at norm 1, data scaled so that E‖x‖ = √D, the L1 coefficient warmed over the first 5 %, and a latent is
dead after the same number of tokens. All else is each library's own default.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import saekit
from benchmarks.data import Batches

LR_WARMUP, LR_DECAY, L1_WARMUP = 0.01, 0.2, 0.05  # shares of the run


@dataclass(frozen=True)
class Setting:
    """What is trained, and the two values that are searched for."""

    architecture: str  # "topk" or "standard"
    site: str
    d_in: int
    d_sae: int
    k: int
    dead_after: int  # tokens
    lr: float
    l1: float  # standard only
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained SAE, and its trainer's step to be timed."""

    sae: saekit.SAE
    step: Callable[[Tensor], Any]
    difference: float = 0.0  # relative, of this SAE's reconstructions from the library's own


Train = Callable[[Setting, Batches, Path], Trained]


def train_saekit(setting: Setting, batches: Batches, folder: Path) -> Trained:
    """`saekit.Trainer` over the batches."""
    sae = saekit.SAE.new(
        setting.architecture,  # type: ignore[arg-type]
        d_in=setting.d_in,
        d_sae=setting.d_sae,
        k=setting.k if setting.architecture == "topk" else None,
        site=setting.site,
        seed=setting.seed,
    )
    trainer = saekit.Trainer(
        sae,
        tokens=batches.steps * batches.batch_size,
        batch_size=batches.batch_size,
        lr=setting.lr,
        lr_warmup=LR_WARMUP,
        lr_decay=LR_DECAY,
        l1_warmup=L1_WARMUP,
        l1_coefficient=setting.l1,
        dead_after=setting.dead_after,
    )
    for x in batches:
        trainer.step(x)
    sae.save(folder)
    return Trained(saekit.SAE.load(folder), trainer.step)


def train_saelens(setting: Setting, batches: Batches, folder: Path) -> Trained:
    """`SAETrainer.fit` over the batches; the result is saved as its inference SAE and read back by saekit."""
    torch.manual_seed(setting.seed)  # its initialisation draws from the global generator
    total, B = batches.steps * batches.batch_size, batches.batch_size
    warmup, decay = round(LR_WARMUP * batches.steps), round(LR_DECAY * batches.steps)
    trainer: SAETrainer[Any, Any] = SAETrainer(
        SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=B,
            lr=setting.lr,
            lr_end=setting.lr / 10,  # what its runner fills in; unused by a constant schedule
            lr_warm_up_steps=warmup,
            lr_decay_steps=decay,
            dead_feature_window=setting.dead_after // B,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        _saelens_sae(setting, batches.steps),
        iter(batches),
    )
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        # Its own estimate, but from a second pass over the data: fit() would use up the first batches for it.
        trainer.activation_scaler.estimate_scaling_factor(
            setting.d_in, iter(batches), min(batches.steps, 100)
        )
        trained = trainer.fit()  # folds the scale into the weights
    trained.save_inference_model(folder)
    sae = saekit.SAE.load(folder)
    return Trained(sae, trainer.step, _difference(sae, trained, folder, batches[0]))


def _saelens_sae(setting: Setting, steps: int) -> TopKTrainingSAE | StandardTrainingSAE:
    common: dict[str, Any] = {
        "d_in": setting.d_in,
        "d_sae": setting.d_sae,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(hook_name=setting.site),
    }
    if setting.architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(k=setting.k, **common))
    return StandardTrainingSAE(
        StandardTrainingSAEConfig(
            l1_coefficient=setting.l1, l1_warm_up_steps=round(L1_WARMUP * steps), **common
        )
    )


@torch.no_grad()
def _difference(sae: saekit.SAE, trained: Any, folder: Path, x: Tensor) -> float:
    """Relative difference of saekit's reconstruction from SAELens's two, as trained and as saved: the worst token
    but for one in a hundred, because folding the decoder norms rounds, and TopK turns a tie into another choice."""
    ours = sae(x)
    theirs = (trained(x), sae_lens.SAE.load_from_disk(folder)(x))
    return max(float(((ours - y).norm(dim=1) / y.norm(dim=1)).quantile(0.99)) for y in theirs)


LIBRARIES: dict[str, Train] = {"saekit": train_saekit, "SAELens": train_saelens}
