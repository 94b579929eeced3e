"""sparsify as a child of `benchmarks.speed`, in the peers' environment.

Its `Trainer` steps inside a hook on a Hugging Face model, so a step here is put together from its own pieces in its own
order: unit decoder rows, `SparseCoder` (and AuxK with its α of 1/32, where asked for), what has fired, FVU read,
backward, the parallel part of the decoder's gradient removed, its default optimizer (schedule-free signum), tokens since
fired. Left out is what its hook does to the model's output: a copy and a mask of all activations. Triton is off, as it
has to be on a CPU. Its `forward` asks for autocast on CUDA only; `autocast` is the same around it on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from benchmarks.speed_process import FAINT, Task

AUX = 1 / 32


def make(job: dict[str, Any], arrays: Mapping[str, Tensor]) -> Task:
    torch.manual_seed(0)
    B = job["batch_size"]
    sae = SparseCoder(
        job["d_in"], SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]), "cpu", torch.float32
    )
    rate = job["lr"] if job.get("aux") else 5e-3 / (sae.num_latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=rate), momentum=0.95)
    optimizer.train()
    since_fired = torch.zeros(sae.num_latents, dtype=torch.long)
    fired = torch.zeros(sae.num_latents, dtype=torch.bool)
    batches = itertools.cycle(arrays["x"].split(B))
    first = next(batches)
    if job.get("aux"):
        sae.encoder.weight.data[: job["d_sae"] // 2] *= FAINT
    sae.encoder.bias.data = -first.mean(0) @ sae.encoder.weight.data.T
    sae.b_dec.data = first.mean(0)

    def once() -> None:
        x = next(batches)
        sae.set_decoder_norm_to_unit_norm()
        dead = since_fired > B if job.get("aux") else None
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=job.get("autocast", False)):
            out = sae(x=x, y=x, dead_mask=dead, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + (AUX if job.get("aux") else 0.0) * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[fired] = 0
            fired.zero_()

    return Task(once, lambda: {"l0": float(job["k"]), "dead": float((since_fired > B).float().mean())})
