"""saekit as a child of `benchmarks.speed`, in its own environment, by its public names.

step       `Trainer.step`; `precision`: of its multiplications, by default what saekit chooses on this machine
lm         `sites.capture`
end        `Activations` and one `Trainer.step`, or one for each of `saes`
run        the same from nothing over `tokens`, whole
catalog    `Catalog.build`
steer      `saekit.generate` inside `saekit.steer`; and by turns with the plain model
quality    a whole training run, judged by `saekit.evaluate` (`benchmarks.quality`'s settings)
"""

from __future__ import annotations

import itertools
import shutil
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saekit
from benchmarks.speed_process import FAINT, MB, Task, seconds_of
from saekit.activations import Activations
from saekit.sae.architectures import ARCHITECTURES
from saekit.sites import capture
from saekit.training.config import TrainingConfig

STEPS = 10_000  # of the run that the timed steps are part of


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    clocks = {
        "step": step,
        "lm": lm,
        "end": end,
        "run": run,
        "catalog": catalog,
        "steer": steer,
        "quality": quality,
    }
    return clocks[job["clock"]](job, arrays)


def trainer_of(job: dict[str, Any], steps: int = STEPS, seed: int = 0, **more: Any) -> saekit.Trainer:
    sae = saekit.SAE.new(
        job["architecture"],
        d_in=job["d_in"],
        d_sae=job["d_sae"],
        k=job.get("k"),
        seed=seed,
        site=job.get("site"),
    )
    if "precision" in job and "precision" in TrainingConfig.model_fields:
        more["precision"] = job["precision"]
    B = job["batch_size"]
    return saekit.Trainer(sae, lr=job["lr"], batch_size=B, tokens=steps * B, **more)


def step(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    more = {"dead_after": job["batch_size"]} if job.get("aux") else {}
    trainer = trainer_of(job, **more)
    batches = itertools.cycle(arrays["x"].split(job["batch_size"]))
    last = {"output": trainer.step(next(batches))}  # fits the fresh SAE to the data, once in a run
    if job.get("l0"):
        _sparse(trainer.sae, next(batches), job["l0"])
    if job.get("aux"):
        _half_asleep(trainer.sae)

    def once() -> None:
        last["output"] = trainer.step(next(batches))

    return Task(once, lambda: {"l0": float(last["output"].l0), "dead": float(last["output"].dead)})


@torch.no_grad()
def _sparse(sae: saekit.SAE, x: Tensor, l0: int) -> None:
    """Set the encoder's bias so that each latent fires on the same share of x and L0 is about l0."""
    highest = sae.preactivations(x).topk(max(1, l0 * len(x) // sae.d_sae), dim=0).values[-1]
    sae.encoder_bias.add_((sae.threshold if sae.kind.penalty == "l0" else 0) - highest)


@torch.no_grad()
def _half_asleep(sae: saekit.SAE) -> None:
    """Make half of the latents so faint that the others are always chosen before them."""
    sae.W_enc[:, : sae.d_sae // 2] *= FAINT
    sae.encoder_bias[: sae.d_sae // 2] *= FAINT


def lm(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model, site = saekit.load_model(job["model"], dtype=job.get("dtype")), job["site"]
    batches = itertools.cycle(arrays["ids"].split(job["contexts"]))
    first = capture(model, [site], arrays["ids"][: job["contexts"]])[site].float()
    return Task(
        lambda: capture(model, [site], next(batches)), lambda: {"rms": float(first.square().mean().sqrt())}
    )


def _stream(job: dict[str, Any], model: Any, ids: Tensor | Iterator[Tensor]) -> Activations:
    return Activations(
        model,
        job["site"],
        ids,
        job["batch_size"],
        ring=job["ring"],
        contexts=job["contexts"],
        include_special=True,  # as SAELens does unless told otherwise: the same number of rows for all
    )


def end(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = saekit.load_model(job["model"], dtype=job.get("dtype"))
    trainers = [trainer_of(job, seed=seed) for seed in range(job.get("saes", 1))]
    batches = iter(_stream(job, model, itertools.cycle(arrays["ids"])))

    def once() -> None:
        x = next(batches)
        for trainer in trainers:
            trainer.step(x)

    return Task(once)


def run(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = saekit.load_model(job["model"], dtype=job.get("dtype"))
    ids = arrays["ids"][: job["tokens"] // arrays["ids"].shape[1]]

    def once() -> None:
        trainer = trainer_of(job, steps=ids.numel() // job["batch_size"])
        for x in _stream(job, model, ids):
            trainer.step(x)

    return Task(once)


def catalog(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model, sae = saekit.load_model(job["model"], dtype=job.get("dtype")), saekit.SAE.load(job["sae"])
    folder = Path(job["folder"])

    def once() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        saekit.Catalog.build(model, sae, arrays["ids"][: job["rows"]], folder)

    def figures() -> dict[str, Any]:
        return {"disk_mb": round(sum(path.stat().st_size for path in folder.rglob("*")) / MB, 2)}

    return Task(once, figures)


def steer(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    model = saekit.load_model(job["model"], dtype=job.get("dtype"))
    direction = arrays["direction"]
    edit = saekit.Direction(direction, job["site"]).add(1.0)
    if job.get("clamp"):
        sae = saekit.SAE.new("topk", d_in=len(direction), d_sae=4096, k=32, seed=0, site=job["site"])
        edit = saekit.Direction.from_sae(sae, 0).clamp(1.0)
    prompt = arrays["prompt"]

    def plain() -> None:
        (made,) = saekit.generate(model, [prompt[0]], job["new_tokens"], temperature=0, stop_at_eos=False)
        assert len(made.ids) == prompt.shape[1] + job["new_tokens"]

    def steered() -> None:
        with saekit.steer(model, edit):
            plain()

    def figures() -> dict[str, float]:
        """Here, by turns: where a process's memory happens to lie makes more of a difference than an edit, and so does who is second."""
        times = []
        for pair in range(job["pairs"]):
            first, second = (steered, plain) if pair % 2 else (plain, steered)
            taken = {first: seconds_of(first), second: seconds_of(second)}
            times.append(taken[steered] / taken[plain])
        return {"times plain": statistics.median(times), "least": min(times), "most": max(times)}

    return Task(steered, figures)


def quality(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    from benchmarks.data import SOURCES, Data
    from benchmarks.libraries import LR_DECAY, LR_WARMUP, SPARSITY_WARMUP

    source, B = SOURCES["tiny"], job["batch_size"]
    data = Data(source, batch_size=B, steps=job["tokens"] // B, evaluate_tokens=job["evaluate_tokens"])
    takes_k = ARCHITECTURES[job["architecture"]].takes_k
    trainer = trainer_of(
        {
            **job,
            "d_in": data.d_in,
            "d_sae": source.d_sae,
            "k": source.l0 if takes_k else None,
            "site": source.site,
        },
        steps=data.batches.steps,
        lr_warmup=LR_WARMUP,
        lr_decay=LR_DECAY,
        sparsity_warmup=SPARSITY_WARMUP,
        dead_after=min(1_000_000, job["tokens"] // 5),
    )

    def once() -> None:
        for x in data.batches:
            trainer.step(x)

    def figures() -> dict[str, Any]:
        found = saekit.evaluate(data.model, trainer.sae, data.held_out)
        return {name: found[name] for name in ("fvu", "l0", "ce_recovered", "dead")}

    return Task(once, figures)
