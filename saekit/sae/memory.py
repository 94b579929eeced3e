"""Large buffers on the CPU that every training step needs again: gradients of weights, pre-activations, all latents of a batch.

The C library hands large blocks back to the system when they are freed, and the system clears every page of a new one; that was a
fifth of a step at 24,576 latents, and more than a product in each dense pass (LOG.md, November 2026). So a block that was taken
here comes back when the last tensor that looks at it is gone, whoever that is and however the step ended, and who needs one
of that size takes it, with what is left in it. GPUs have an allocator that does this.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 2**20  # bytes; smaller ones are the C library's own business
KEPT = 3  # of a size: a gated SAE's dense step looks at three of all latents at once
Block = np.ndarray[Any, np.dtype[np.uint8]]
_spare: defaultdict[int, list[Block]] = defaultdict(list)  # by bytes


def take(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor with anything in it. It is given back by being forgotten."""
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LEAST:
        return torch.empty(shape, dtype=dtype, device=device)
    spare = _spare[nbytes]
    block = spare.pop() if spare else _new(nbytes)
    lent = block[:]  # the tensor's storage holds this, and nobody else does
    weakref.finalize(lent, _keep, block, spare).atexit = False
    # No view of another tensor: autograd adds gradients in place where nobody else has the memory.
    flat = torch.from_numpy(lent).view(dtype)
    return torch.empty(0, dtype=dtype).set_(flat, 0, shape)  # type: ignore[call-overload] # stubs know storages only


def clear() -> None:
    """Let go of everything that is spare, and of what is in use as soon as it no longer is."""
    _spare.clear()


def _keep(block: Block, spare: list[Block]) -> None:
    if len(spare) < KEPT:
        spare.append(block)


def _new(nbytes: int) -> Block:
    """A block in large pages, where the system has them: it clears those faster, and finds them faster later."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(nbytes, np.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
