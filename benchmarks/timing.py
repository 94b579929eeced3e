"""Seconds per step of several trainers, a few steps of each in turn so that the machine's moods hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Seconds(NamedTuple):
    median: float
    least: float
    most: float


def alternate(
    steps: Mapping[str, Callable[[Tensor], Any]],
    x: Tensor,
    *,
    rounds: int,
    at_once: int = 4,
    warm_up: int = 3,
) -> dict[str, Seconds]:
    """Time each step function on x: `rounds` × `at_once` steps each, A B A B …, after `warm_up` untimed ones."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warm_up):
            step(x)
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(at_once):
                start = time.perf_counter()
                step(x)
                taken[name].append(time.perf_counter() - start)
    return {name: Seconds(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


def matmul_rate(dtype: torch.dtype, rounds: int = 10) -> float:
    """GFLOP/s of a 2048 × 512 × 2048 product on this machine now (median)."""
    a, b = torch.randn(2048, 512).to(dtype), torch.randn(512, 2048).to(dtype)
    a @ b
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - start)
    return 2 * 2048 * 512 * 2048 / statistics.median(taken) / 1e9


def copy_rate(rounds: int = 10) -> float:
    """GB/s written by a copy of 256 MB on this machine now (median); as many are read."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - start)
    return source.numel() * source.element_size() / statistics.median(taken) / 1e9
