"""Where each millisecond of a training step goes, and what it could cost at least.

    python -m benchmarks.profile_step [topk|batchtopk|standard|jumprelu|…] [--d-in 512 --d-sae 8192 --batch 2048 --k 32]

Every stage of `Trainer.step` is timed where it is called, in the step itself; what no stage claims is the rest: autograd,
losses, schedules, allocation. A stage's floor is the larger of its arithmetic at the product rate and its memory traffic at
the copy rate, both measured in the same run; tables that fit a cache may go below.

B tokens, D = d_in, S = d_sae, n chosen pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

import saekit
from benchmarks.timing import copy_rate, matmul_rate
from saekit.console import table
from saekit.sae import choosing, kernels, native
from saekit.sae.architectures import ARCHITECTURES
from saekit.training.optimizer import Optimizer

WARM_UP, STEPS = 5, 30


class Shape(NamedTuple):
    B: int
    D: int
    S: int
    n: float  # pairs
    operand: int  # bytes of the product's operands


class Stage(NamedTuple):
    """A function of the step, and the least it has to compute and move."""

    label: str
    owner: Any
    name: str
    flop: Callable[[Shape], float]
    bytes: Callable[[Shape], float]


STAGES = [
    Stage(
        "encode: dense product",
        choosing.torch,
        "mm",
        lambda s: 2 * s.B * s.D * s.S,
        lambda s: s.operand * (s.B * s.D + s.D * s.S),
    ),
    Stage("choose: top k", kernels, "top_k", lambda s: 0, lambda s: s.operand * s.B * s.S),
    Stage("choose: above a bound", kernels, "above", lambda s: 0, lambda s: s.operand * s.B * s.S),
    Stage("choose: cut at the n-th", kernels, "kth_largest", lambda s: 0, lambda s: 4 * s.n),
    Stage(
        "decode, error, ∂ latents",
        kernels,
        "decode_error",
        lambda s: 4 * s.n * s.D,
        lambda s: 4 * s.S * s.D + 12 * s.B * s.D,
    ),
    Stage("sort pairs by latent", kernels, "by_latent", lambda s: 0, lambda s: 48 * s.n),
    Stage(
        "∂W: sums over pairs (both)",
        kernels,
        "segment_sum",
        lambda s: 4 * s.n * s.D,
        lambda s: 8 * (s.S * s.D + s.B * s.D),
    ),
    Stage(
        "∂ of other tokens' errors", kernels, "pair_dots", lambda s: 2 * s.n * s.D, lambda s: 4 * s.S * s.D
    ),
    Stage("norms for clipping, ∥ part", Optimizer, "_products", lambda s: 0, lambda s: 12 * s.S * s.D),
    Stage("Adam, unit rows", Optimizer, "_update", lambda s: 0, lambda s: 56 * s.S * s.D),
]


def profile(
    architecture: str, *, B: int, D: int, S: int, k: int, precision: str | None
) -> tuple[dict[str, list[float]], list[float], float]:
    """Seconds by stage and step, of whole steps, and the mean L0 of the steps."""
    takes_k = ARCHITECTURES[architecture].takes_k
    sae = saekit.SAE.new(architecture, d_in=D, d_sae=S, k=k if takes_k else None)
    trainer = saekit.Trainer(sae, lr=3e-4, batch_size=B, tokens=B * 10_000, precision=precision)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(B, D, generator=draw) for _ in range(4)]
    trainer.step(batches[0])
    if not takes_k:
        fire(sae, batches[0], k)
    spent: dict[str, list[float]] = {stage.label: [] for stage in STAGES}
    whole, l0 = [], []
    for step in range(WARM_UP + STEPS):
        own: dict[str, float] = defaultdict(float)
        with ExitStack() as stack:
            for stage in STAGES:
                function = _timed(getattr(stage.owner, stage.name), stage.label, own)
                stack.enter_context(mock.patch.object(stage.owner, stage.name, function))
            start = time.perf_counter()
            out = trainer.step(batches[step % 4])
            seconds = time.perf_counter() - start
        if step >= WARM_UP:
            whole.append(seconds)
            l0.append(float(out.l0))
            for label, times in spent.items():
                times.append(own[label])
    return spent, whole, statistics.mean(l0)


@torch.no_grad()
def fire(sae: saekit.SAE, x: Tensor, l0: int) -> None:
    """Move the encoder's bias until l0 latents fire on each of x, as late in training."""
    p = sae.preactivations(x)
    bound = sae.threshold if sae.architecture == "jumprelu" else 0.0
    sae.encoder_bias.sub_((p - bound).flatten().kthvalue(p.numel() - l0 * len(x)).values)


def _timed(function: Callable[..., Any], label: str, own: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = function(*args, **kwargs)
        own[label] += time.perf_counter() - start
        return found

    return timed


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    operand = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    B, D, S = args.batch, args.d_in, args.d_sae
    rates = {dtype: matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    copied = copy_rate()
    spent, whole, l0 = profile(args.architecture, B=B, D=D, S=S, k=args.k, precision=args.precision)
    shape = Shape(B, D, S, l0 * B, operand.itemsize)
    rows, total = [], statistics.median(whole)
    for stage in STAGES:
        if not any(spent[stage.label]):
            continue
        rate = rates[operand] if stage.owner is choosing.torch else rates[torch.float32]
        floor = max(stage.flop(shape) / rate / 1e9, stage.bytes(shape) / (2 * copied) / 1e9)
        rows.append([stage.label, *_milliseconds(spent[stage.label]), f"{1e3 * floor:.1f}"])
    rest = [w - sum(times[i] for times in spent.values()) for i, w in enumerate(whole)]
    rows.append(["the rest: autograd, losses, schedules", *_milliseconds(rest), ""])
    rows.append(["the step", *_milliseconds(whole), f"{sum(float(row[-1] or 0) for row in rows):.1f}"])
    console = Console()
    console.print(
        f"{args.architecture}, d_in {D}, d_sae {S:,}, batch {B:,}, L0 {l0:.0f}, {args.precision} operands, "
        f"{torch.get_num_threads()} threads, kernels {'compiled' if native.library() else 'plain'}: "
        f"{B / total:,.0f} tokens/s"
    )
    console.print(table(["stage", "ms, median", "least", "most", "floor"], rows))
    console.print(
        f"product rates {rates[torch.float32]:.0f} (float32) and {rates[torch.bfloat16]:.0f} GFLOP/s (bfloat16), "
        f"copies {copied:.0f} GB/s"
    )


def _milliseconds(seconds: list[float]) -> tuple[str, str, str]:
    return tuple(f"{1e3 * f(seconds):.1f}" for f in (statistics.median, min, max))  # type: ignore[return-value]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architecture", nargs="?", default="topk", choices=ARCHITECTURES)
    for name, value in (("d-in", 512), ("d-sae", 8192), ("batch", 2048), ("k", 32), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
