"""One run in several processes: `torchrun --nproc-per-node N -m saekit train RECIPE`, on one machine or many.

    parallel: {data: 4, latents: 2}      in the recipe: 8 processes

data: every process calls the language model for its share of the contexts, and has their rows of each batch (`activations`).
latents: each process has a block of each SAE's latents, with their weights, gradients, optimizer state and checkpoint, and the
rows of those that it shares the latents with; x̂, the choice of TopK and the clipping norm are agreed upon within a step.
What belongs to no latent (b_dec, a skip) is the same bits everywhere.

The first process alone writes files, tells of progress and evaluates. All processes see the run's folder. What one process
computes alone and what many compute differ by rounding, since sums are taken in another order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
from torch import Tensor, nn

from saekit.activations import Share
from saekit.errors import InvalidInput
from saekit.sae import SAE
from saekit.sae.architectures import Objective
from saekit.sae.ranks import ALONE, Elsewhere, Group, Ranks
from saekit.training.optimizer import SHARED

PATIENCE = timedelta(
    hours=6
)  # with the others, while the first process evaluates; torchrun ends all when one dies


def processes() -> int:
    """How many torchrun has started: `WORLD_SIZE`, 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def first_process() -> bool:
    """Whether this is the one of torchrun's processes that talks."""
    return int(os.environ.get("RANK") or 0) == 0


def refuse_several(what: str) -> None:
    """Raises `InvalidInput` under torchrun."""
    if processes() > 1:
        raise InvalidInput(f"{what} in one process, torchrun has started {processes()}: leave it out")


def device_of_process(wanted: str | None) -> str | None:
    """The device that a recipe asks for (None: a GPU where there is one); a GPU of its own for each process."""
    if processes() == 1 or wanted not in (None, "cuda") or not torch.cuda.is_available():
        return wanted
    local, gpus = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if local >= gpus:
        raise InvalidInput(
            f"torchrun has started more processes here than there are GPUs ({gpus}): use --nproc-per-node {gpus}, or device=cpu"
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextlib.contextmanager
def ranks_of(data: int | None, latents: int) -> Iterator[Ranks]:
    """This process's place among those of torchrun; `ALONE` without it.

    data: processes that share each batch, None for all there are; latents: processes that share each SAE.
    Raises `InvalidInput` where torchrun has started another number of processes.
    """
    there = processes()
    wanted = (data or max(1, there // latents)) * latents
    if wanted != there:
        raise (InvalidInput if first_process() else Elsewhere)(
            f"parallel: data × latents = {wanted // latents} × {latents} takes {wanted} processes, this run has {there}; "
            f"start it with torchrun --nproc-per-node {wanted} -m saekit train …, or change `parallel`"
        )
    if there == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    own = not dist.is_initialized()
    if own:
        gpu = torch.cuda.is_available() and torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK") or 0)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    mesh = init_device_mesh("cpu", (wanted // latents, latents), mesh_dim_names=("data", "latents"))
    try:
        tokens, blocks = (
            Group(mesh.get_local_rank(name), mesh.size(dim), mesh.get_group(name))
            for dim, name in enumerate(("data", "latents"))
        )
        yield Ranks(tokens, blocks, Group(dist.get_rank(), there), mesh)
    finally:
        if own:
            dist.destroy_process_group()


def exchanged(share: Share, group: Group) -> Share:
    """The rows of all who share the latents, in the batch's order, from each one's own."""
    if group.size == 1:
        return share
    counts = torch.cat(group.gather(torch.tensor([len(share.numbers)]))).tolist()
    if max(counts) == 0:
        return share

    def all_of(own: Tensor) -> Tensor:
        """[n, …] of all, as bytes on their way: not every backend knows bfloat16."""
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        found = (part.view(own.dtype) for part in group.gather(padded.view(torch.uint8)))
        return torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])

    numbers, order = all_of(share.numbers).sort()
    rows = {site: all_of(rows)[order.to(rows.device)] for site, rows in share.rows.items()}
    return Share(rows, numbers, share.size)


def shard(sae: SAE, ranks: Ranks) -> SAE:
    """This process's part of an SAE: the whole's config, with its block of the latents' weights. Alone: the SAE itself.

    Raises `InvalidInput` where the latents cannot be shared evenly.
    """
    n = ranks.latents.size
    if n == 1:
        return sae
    if sae.d_sae % n:
        raise InvalidInput(f"parallel.latents: {n} processes cannot share d_sae = {sae.d_sae} latents evenly")
    block = ranks.block(sae.d_sae)
    with torch.device("meta"):
        part = SAE(sae.config)
    for name, parameter in sae.named_parameters():
        setattr(part, name, nn.Parameter(_block(name, parameter.detach(), block)))
    for name, buffer in sae.named_buffers():
        part.register_buffer(name, buffer.clone())
    return part


def _block(name: str, tensor: Tensor, block: slice) -> Tensor:
    """Of a parameter, in memory as it lies there."""
    if (axis := latent_axis(name, tensor)) is None:
        return tensor.clone()
    return tensor.t()[block].clone().t() if axis == 1 else tensor[block].clone()


def whole(part: SAE, ranks: Ranks) -> SAE | None:
    """The SAE that the parts make, for the first process; None for the others. Alone: the SAE itself."""
    if ranks.latents.size == 1:
        return part
    if ranks.data.rank > 0:
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in part.state_dict().items():
        axis = latent_axis(name, tensor)
        parts = None if axis is None else ranks.latents.gather_at_first(tensor)
        found[name] = tensor if parts is None else torch.cat(parts, axis or 0)
    if not ranks.is_first:
        return None
    sae = SAE(part.config).to(part.W_dec.device)
    sae.load_state_dict(found)
    return sae


def latent_axis(name: str, tensor: Tensor) -> int | None:
    """Along which axis a tensor of a trainer's state has its latents; None where it belongs to none.

    name: as `Trainer.tensors` gives it, or of a parameter.
    """
    parts = name.split(".")
    if tensor.ndim == 0 or parts[0] in ("frame", "control") or not {*SHARED}.isdisjoint(parts):
        return None
    return 1 if "W_enc" in parts else 0


@torch.no_grad()
def add_up(objective: Objective, parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> Objective:
    """Gradients and figures of all processes, from each one's summands (`sae.architectures.Objective`).

    Large gradients are summed in place, all else in two bundles: over those that share the batch, and over all.
    """
    for name, parameter in parameters.items():
        if (
            parameter.grad is None and name in SHARED
        ):  # of a transcoder, the first of the latents ranks has it
            parameter.grad = torch.zeros_like(parameter)
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    matrices = [
        g.t() if name == "W_enc" else g for name, g in grads.items() if g.ndim == 2 and name not in SHARED
    ]
    for grad in matrices if ranks.data.size > 1 else ():
        if grad.is_contiguous():
            ranks.data.sum_(grad)
        else:
            grad.copy_(ranks.data.sum(grad))
    vectors = [g for name, g in grads.items() if g.ndim == 1 and name not in SHARED]
    *_, fired = _bundled([*vectors, objective.fired.to(objective.loss.dtype)], ranks.data)
    mine = (
        1.0 if ranks.latents.rank == 0 else 0.0
    )  # of what all that share the latents have alike, one counts
    figures = torch.stack(
        [
            (objective.loss.detach() - objective.sparsity) * mine, objective.sparsity, objective.mse * mine,
            objective.aux * mine, objective.l0,
        ]
    )  # fmt: skip
    *_, figures = _bundled([*(grads[name] for name in SHARED if name in grads), figures], ranks.world)
    rest, sparsity, mse, aux, l0 = figures.unbind()
    return objective._replace(
        loss=rest + sparsity, mse=mse, sparsity=sparsity, aux=aux, l0=l0, fired=fired > 0,
        smallest=None if objective.smallest is None else ranks.world.least(objective.smallest),
    )  # fmt: skip


def _bundled(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """Sum tensors over a group, in place and in one go."""
    bundle = group.sum(torch.cat([t.flatten() for t in tensors]))
    for tensor, summed in zip(tensors, bundle.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
    return tensors
