"""dictionary_learning as a child of `benchmarks.speed`, in the peers' environment.

A step is its trainer's `update` in float32: on a CPU its `trainSAE` takes no autocast, whatever `autocast_dtype` says.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed_process import FAINT, Task

TRAINERS = {
    "standard": "standard.StandardTrainer",
    "gated": "gdm.GatedSAETrainer",
    "topk": "top_k.TopKTrainer",
    "batchtopk": "batch_top_k.BatchTopKTrainer",
    "matryoshka": "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
    "jumprelu": "jumprelu.JumpReluTrainer",
}


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    stand_in = types.ModuleType("nnsight")  # imported for activations, which are not taken from it here
    stand_in.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", stand_in)
    module, name = TRAINERS[job["architecture"]].split(".")
    own: dict[str, Any] = {"k": job["k"]} if "k" in job else {}
    if job["architecture"] == "matryoshka":
        own["group_fractions"] = [0.125, 0.125, 0.25, 0.5]
    trainer = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=10_000,
        activation_dim=job["d_in"],
        dict_size=job["d_sae"],
        layer=0,
        lm_name="",
        lr=job["lr"],
        seed=0,
        device="cpu",
        **own,
    )
    if hasattr(trainer, "dead_feature_threshold") and job.get("aux"):
        trainer.dead_feature_threshold = job["batch_size"]
    batches = itertools.cycle(arrays["x"].split(job["batch_size"]))
    steps = itertools.count()
    trainer.update(next(steps), next(batches))  # looks for the geometric median, once in a run
    if job.get("l0"):
        _sparse(trainer.ae, job["architecture"], next(batches), job["l0"])
    if job.get("aux"):
        with torch.no_grad():
            trainer.ae.encoder.weight[: job["d_sae"] // 2] *= FAINT

    def figures() -> dict[str, Any]:
        with torch.no_grad():
            how = {"use_threshold": False} if "k" in job else {}
            active = trainer.ae.encode(next(batches), **how) != 0
        dead = getattr(trainer, "dead_features", -1)
        return {"l0": float(active.float().sum(1).mean()), "dead": max(0, dead) / job["d_sae"]}

    return Task(lambda: trainer.update(next(steps), next(batches)), figures)


@torch.no_grad()
def _sparse(ae: Any, architecture: str, x: Tensor, l0: int) -> None:
    """Set the encoder's bias so that each latent fires on the same share of x and L0 is about l0."""
    if architecture == "jumprelu":
        p, bias, threshold = x @ ae.W_enc + ae.b_enc, ae.b_enc, ae.threshold
    else:
        p, bias, threshold = ae.encoder(x - ae.bias), ae.encoder.bias, 0
    highest = p.topk(max(1, l0 * len(x) // p.shape[1]), dim=0).values[-1]
    bias.add_(threshold - highest)
