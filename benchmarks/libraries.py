"""saekit, SAELens and dictionary_learning behind one function each: settings and batches in, a trained SAE out.

All get the same learning rate and schedule (1 % warm-up, constant, linear to 0 over the last 20 %), Adam, the sparsity
coefficient warmed over the first 5 %, and a latent is dead after the same number of tokens. All else is each library's own
default (initialisation, scaling of the data, clipping, what is done about dead latents), but for SAELens's JumpReLU,
which is trained as its authors advise (Anthropic's variant): with its default no coefficient makes a short run sparse.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import saekit
from benchmarks.data import Batches
from saekit.sae.architectures import ARCHITECTURES

LR_WARMUP, LR_DECAY, SPARSITY_WARMUP = 0.01, 0.2, 0.05  # shares of the run


@dataclass(frozen=True)
class Setting:
    """What is trained. `coefficient` is the library's own: of L1, of L0, or unused where k does its work."""

    architecture: str
    site: str
    d_in: int
    d_sae: int
    l0: int  # wanted: k where there is one
    dead_after: int  # tokens
    lr: float
    coefficient: float
    seed: int = 0

    @property
    def has_k(self) -> bool:
        return ARCHITECTURES[self.architecture].takes_k

    @property
    def prefixes(self) -> tuple[int, ...]:
        return saekit.sae.model.default_prefixes(self.d_sae)


@dataclass(frozen=True)
class Trained:
    """A trained SAE, and its trainer's step to be timed."""

    sae: saekit.SAE
    step: Callable[[Tensor], Any]
    difference: float = 0.0  # relative, of this SAE's reconstructions from the library's own


@dataclass(frozen=True)
class Library:
    """One of the compared: its name, its architectures with the coefficient to begin the search at, its training."""

    name: str
    first: dict[str, float]
    train: Callable[[Setting, Batches, Path], Trained]


def train_saekit(setting: Setting, batches: Batches, folder: Path) -> Trained:
    """`saekit.Trainer` over the batches."""
    sae = saekit.SAE.new(
        setting.architecture,
        d_in=setting.d_in,
        d_sae=setting.d_sae,
        k=setting.l0 if setting.has_k else None,
        prefixes=setting.prefixes if setting.architecture == "matryoshka" else None,
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
        sparsity_warmup=SPARSITY_WARMUP,
        l1_coefficient=setting.coefficient,
        l0_coefficient=setting.coefficient,
        l0_penalty="tanh",
        dead_after=setting.dead_after,
    )
    for x in batches:
        trainer.step(x)
    return Trained(saekit.SAE.load(sae.save(folder)), trainer.step)


def train_saelens(setting: Setting, batches: Batches, folder: Path) -> Trained:
    """`SAETrainer.fit` over the batches; the result is saved as its inference SAE and read back by saekit."""
    torch.manual_seed(setting.seed)  # its initialisation draws from the global generator
    total, B = batches.steps * batches.batch_size, batches.batch_size
    trainer: SAETrainer[Any, Any] = SAETrainer(
        SAETrainerConfig(
            total_training_samples=total,
            train_batch_size_samples=B,
            lr=setting.lr,
            lr_end=setting.lr / 10,  # what its runner fills in; unused by a constant schedule
            lr_warm_up_steps=round(LR_WARMUP * batches.steps),
            lr_decay_steps=round(LR_DECAY * batches.steps),
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
    with torch.no_grad():
        theirs = sae_lens.SAE.load_from_disk(folder)(batches[0])
    return Trained(sae, trainer.step, _difference(sae, theirs, batches[0]))


def _saelens_sae(setting: Setting, steps: int) -> Any:
    common: dict[str, Any] = {
        "d_in": setting.d_in,
        "d_sae": setting.d_sae,
        "normalize_activations": "expected_average_only_in",
        "metadata": SAEMetadata(hook_name=setting.site),
    }
    warm, c = round(SPARSITY_WARMUP * steps), setting.coefficient
    own: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": c, "l1_warm_up_steps": warm},
        "gated": {"l1_coefficient": c, "l1_warm_up_steps": warm},
        "topk": {"k": setting.l0},
        "batchtopk": {"k": setting.l0},
        "matryoshka": {"k": setting.l0, "matryoshka_widths": list(setting.prefixes)},
        "jumprelu": {
            "l0_coefficient": c,
            "l0_warm_up_steps": warm,
            "jumprelu_sparsity_loss_mode": "tanh",
            "pre_act_loss_coefficient": 3e-6,
            "jumprelu_ste_to_input": True,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
        },
    }
    prefix = {
        "standard": "Standard",
        "gated": "Gated",
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "matryoshka": "MatryoshkaBatchTopK",
        "jumprelu": "JumpReLU",
    }[setting.architecture]
    make, config = (getattr(sae_lens, f"{prefix}TrainingSAE{end}") for end in ("", "Config"))
    return make(config(**common, **own[setting.architecture]))


def train_dictionary_learning(setting: Setting, batches: Batches, folder: Path) -> Trained:
    """A dictionary_learning trainer over the batches, scaled as its `trainSAE` does (E‖x‖² = 1, folded at the end)."""
    trainers = _dictionary_learning()
    steps = batches.steps
    norm = torch.stack([x.square().sum(1).mean() for x in batches]).mean().sqrt()
    options: dict[str, Any] = {
        "steps": steps,
        "activation_dim": setting.d_in,
        "dict_size": setting.d_sae,
        "layer": 0,
        "lm_name": "",
        "lr": setting.lr,
        "warmup_steps": round(LR_WARMUP * steps),
        "decay_start": round((1 - LR_DECAY) * steps),
        "seed": setting.seed,
        "device": "cpu",
    }
    warm = {"sparsity_warmup_steps": round(SPARSITY_WARMUP * steps)}
    k = {"k": setting.l0, "threshold_start_step": steps // 2}  # its default, 1000, lies beyond a short run
    shares = [
        (end - start) / setting.d_sae
        for start, end in zip((0, *setting.prefixes), setting.prefixes, strict=False)
    ]
    name, own = {
        "standard": ("standard.StandardTrainer", {"l1_penalty": setting.coefficient, **warm}),
        "gated": ("gdm.GatedSAETrainer", {"l1_penalty": setting.coefficient, **warm}),
        "topk": ("top_k.TopKTrainer", k),
        "batchtopk": ("batch_top_k.BatchTopKTrainer", k),
        "matryoshka": ("matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", {**k, "group_fractions": shares}),
        "jumprelu": (
            "jumprelu.JumpReluTrainer",
            {"target_l0": setting.l0, "sparsity_penalty": setting.coefficient, **warm},
        ),
    }[setting.architecture]
    module, trainer_name = name.split(".")
    trainer = getattr(trainers[module], trainer_name)(**options, **own)
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = setting.dead_after
    for step, x in enumerate(batches):
        trainer.update(step, x / norm)
    trainer.ae.scale_biases(float(norm))
    folder.mkdir()
    state = {name: tensor.detach().contiguous() for name, tensor in trainer.ae.state_dict().items()}
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": {**trainer.config, "device": "cpu"}}, default=str)
    )
    sae = saekit.SAE.load(folder)
    sae.config.metadata["hook_name"] = setting.site
    with torch.no_grad():
        theirs = trainer.ae(batches[0])
    return Trained(sae, lambda x: trainer.update(steps - 1, x / norm), _difference(sae, theirs, batches[0]))


def _dictionary_learning() -> dict[str, Any]:
    """Its trainer modules. The package imports nnsight for activations, which are not taken from it here."""
    from importlib import import_module

    if "nnsight" not in sys.modules and find_spec("nnsight") is None:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in
    names = ("standard", "gdm", "top_k", "batch_top_k", "matryoshka_batch_top_k", "jumprelu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: import_module(f"dictionary_learning.trainers.{name}") for name in names}


@torch.no_grad()
def _difference(sae: saekit.SAE, theirs: Tensor, x: Tensor) -> float:
    """Relative difference of saekit's reconstruction from the library's: the worst token but for one in a hundred, because
    folding norms rounds, and TopK turns a tie into another choice."""
    return float(((sae(x) - theirs).norm(dim=1) / theirs.norm(dim=1)).quantile(0.99))


LIBRARIES = [
    Library(
        "saekit",
        {"standard": 2.0, "gated": 3.0, "jumprelu": 0.1, "topk": 0, "batchtopk": 0, "matryoshka": 0},
        train_saekit,
    ),
    Library(
        "SAELens",
        {"standard": 2.0, "gated": 3.0, "jumprelu": 0.15, "topk": 0, "batchtopk": 0, "matryoshka": 0},
        train_saelens,
    ),
]
VERSIONS = {"saekit": saekit.__version__, "SAELens": sae_lens.__version__, "torch": torch.__version__}
if find_spec("dictionary_learning") is not None:
    LIBRARIES.append(
        Library(
            "dictionary_learning",
            {"standard": 0.05, "gated": 0.05, "jumprelu": 1.0, "topk": 0, "batchtopk": 0, "matryoshka": 0},
            train_dictionary_learning,
        )
    )
    VERSIONS["dictionary_learning"] = version("dictionary_learning")
