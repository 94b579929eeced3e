"""Processes that train one SAE together: some share the tokens of a batch, some the latents.

    data      each process has some of the batch's rows; what is summed over rows is summed over these
    latents   each process has S / n of the latents, a block of them; what is summed over latents is summed over these
    world     all of them, data × latents

A process alone is a group of one, whose methods give back what they were given: the objectives are written once, and cost
nothing there. Every process of a group has to make the same calls in the same order; all get the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from saekit.errors import Interrupted, SaekitError, first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Elsewhere(Interrupted):
    """Another process of the run has ended."""

    told = True  # why, by that process; the command line says it once


class Part(NamedTuple):
    """Which rows of a batch a process has."""

    numbers: Tensor  # [m] int64, on the CPU, ascending
    size: int  # rows of the whole batch


@dataclass(frozen=True)
class Group:
    """This process's place among those that it computes with."""

    rank: int = 0
    size: int = 1
    handle: Any = None  # torch.distributed.ProcessGroup

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over the group, put in the place of a contiguous tensor."""
        return self._reduced(tensor, "SUM")

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else self.sum_(tensor.detach().clone().contiguous())

    def least(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else self._reduced(tensor.detach().clone().contiguous(), "MIN")

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is so for one of them."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everyone's tensor, all of one shape, in the order of ranks."""
        if self.size == 1:
            return [tensor]
        import torch.distributed as dist

        tensor = tensor.detach().contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        _told(lambda: dist.all_gather(found, tensor, group=self.handle))
        return found

    def gather_at_first(self, tensor: Tensor) -> list[Tensor] | None:
        """`gather` for the first of the group alone; None for the others."""
        if self.size == 1:
            return [tensor]
        import torch.distributed as dist

        tensor = tensor.detach().contiguous()
        found = None if self.rank else [torch.empty_like(tensor) for _ in range(self.size)]
        _told(lambda: dist.gather(tensor, found, group=self.handle, group_dst=0))
        return found

    def rows(self, tensor: Tensor, part: Part | None) -> Tensor:
        """The whole batch [B, W] of which each of the group has a part [m, W]."""
        if self.size == 1:
            return tensor
        assert part is not None, "processes that share batches say which rows they have"
        whole = tensor.new_zeros(part.size, *tensor.shape[1:])
        whole[part.numbers.to(tensor.device)] = tensor.detach()
        return self.sum_(whole)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the group, of which each differentiates its own summand."""
        return tensor if self.size == 1 else _Summed.apply(tensor, self)

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        import torch.distributed as dist

        _told(lambda: dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=self.handle))
        return tensor


def _told(collective: Callable[[], object]) -> None:
    """Make a call in which all take part; one that is gone ends it for all."""
    try:
        collective()
    except RuntimeError as error:
        raise Elsewhere(f"another process of the run has ended ({first_line(error)})") from error


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        return group.sum(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    data: Group = field(default_factory=Group)
    latents: Group = field(default_factory=Group)
    world: Group = field(default_factory=Group)
    mesh: DeviceMesh | None = None  # (data, latents)

    @property
    def alone(self) -> bool:
        return self.world.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.world.rank == 0

    def block(self, n: int) -> slice:
        """Which of n latents this process has. n: a multiple of the processes that share them."""
        own = n // self.latents.size
        return slice(self.latents.rank * own, (self.latents.rank + 1) * own)

    def first(self, work: Callable[[], T]) -> T:
        """What the first process gets from `work`, which it alone does; a value that JSON can carry.

        What it raises is raised there, and ends the others with `Elsewhere`.
        """
        if self.alone:
            return work()
        if self.is_first:
            try:
                value = work()
            except Exception as error:
                self._tell({"error": f"{error}" if isinstance(error, SaekitError) else first_line(error)})
                raise
            self._tell({"value": value})
            return value
        told = self._tell(None)
        if "error" in told:
            raise Elsewhere(told["error"])
        found: T = told["value"]
        return found

    def each(self, check: Callable[[], None]) -> None:
        """A check that all make, the first one first: what is wrong for all is said by it alone."""
        self.first(check)
        if not self.is_first:
            check()

    def _tell(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """The first one's message, as JSON."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        length = self.world.sum(torch.tensor(len(data) if self.is_first else 0))
        sent = data if self.is_first else torch.zeros(int(length), dtype=torch.uint8)
        found: dict[str, Any] = json.loads(bytes(self.world.sum_(sent.int()).to(torch.uint8).tolist()))
        return found


ALONE = Ranks()
