"""Large buffers on the CPU that every training step needs again: gradients of weights, a tile of pre-activations.

The C library hands large blocks back to the system when they are freed, and the system clears every page of a new one; that was a
fifth of a step at 24,576 latents (LOG.md, November 2026). So who has done with a buffer gives it back here, and who needs one
of that shape takes it, with what is left in it. GPUs have an allocator that does this.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

LEAST = 2**20  # bytes; smaller ones are the C library's own business
KEPT = 2  # of a shape, for the gradients of both weights; dense products give back what they never took
_spare: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)


def take(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with anything in it."""
    spare = _spare[torch.Size(shape), dtype] if device.type == "cpu" else []
    return spare.pop() if spare else torch.empty(shape, dtype=dtype, device=device)


def give(tensor: Tensor) -> None:
    """Give back a contiguous tensor that nobody will look at again."""
    spare = _spare[tensor.shape, tensor.dtype]
    if tensor.device.type == "cpu" and tensor.nbytes >= LEAST and len(spare) < KEPT:
        spare.append(tensor)


def clear() -> None:
    """Let go of everything."""
    _spare.clear()
