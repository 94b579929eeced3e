"""What several SAEs from one forward cost: `python -m benchmarks.sweep [--tokens N] [--rounds R]`.

Four SAEs on the embedded model, whole runs with their checkpoint and evaluation: as one sweep, one after
the other, and one alone, in turn so that the machine's moods hit all alike. Beside them the language model by itself, which
is what a sweep saves. The four of the sweep must be, bit for bit, the four trained alone.

Prints one table and writes it to `benchmarks/results/sweep.json`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import saekit
from benchmarks.timing import matmul_rate
from saekit.activations import Activations
from saekit.files import write_json
from saekit.recipe import parse_recipe
from saekit.training.run import corpora

RESULTS = Path(__file__).parent / "results" / "sweep.json"
SAES: list[dict[str, Any]] = [
    {"name": "k16", "architecture": "topk", "d_sae": 1024, "k": 16},
    {"name": "k32", "architecture": "topk", "d_sae": 1024, "k": 32},
    {"name": "k64", "architecture": "topk", "d_sae": 1024, "k": 64},
    {"name": "batchtopk", "architecture": "batchtopk", "d_sae": 1024, "k": 32, "seed": 1},
]


def recipe(saes: Any, tokens: int) -> Any:
    raw = {
        "name": "run",
        "model": "tiny",
        "data": {"text": "tiny", "held_out": 0.02},
        "site": "blocks.3.hook_resid_pre",
        "sae": saes,
        "training": {
            "tokens": tokens, "batch_size": 2048, "lr": 2e-3, "ring": 32_768, "evaluate_tokens": 4096, "log_every": 1000
        },
    }  # fmt: skip
    return parse_recipe(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    args, console = parser.parse_args(), Console(width=110)
    model = saekit.load_model("tiny")

    def trained(saes: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return saekit.train(recipe(saes, args.tokens), model=model, runs=folder)

    def alone() -> list[Any]:
        return [trained({key: value for key, value in sae.items() if key != "name"}) for sae in SAES]

    def language_model() -> None:
        made = recipe(SAES, args.tokens)
        stream = Activations(model, made.site, corpora(made, model)[0], 2048, ring=32_768)
        for _ in itertools.islice(stream, args.tokens // 2048):
            pass

    ways: dict[str, Callable[[], Any]] = {
        "one SAE": lambda: trained(SAES[1]),
        "four, one forward": lambda: trained(SAES),
        "four, one after the other": alone,
        "the language model alone": language_model,
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for round_ in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            if round_:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    same = all(
        torch.equal(a, b)
        for one, other in zip(found["four, one forward"], found["four, one after the other"], strict=True)
        for a, b in zip(one.sae.state_dict().values(), other.sae.state_dict().values(), strict=True)
    )
    base = statistics.median(taken["one SAE"])
    table = Table(title=f"{args.tokens:,} tokens, four SAEs of 1024 latents")
    for column in ("", "seconds: median (min–max)", "times one SAE"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        table.add_row(name, f"{median:.1f} ({min(seconds):.1f}–{max(seconds):.1f})", f"{median / base:.2f}")
    console.print(table)
    console.print(f"weights of the sweep equal those trained alone, bit for bit: {same}")
    if not same:
        raise SystemExit(1)
    write_json(
        RESULTS,
        {
            "arguments": vars(args),
            "seconds": taken,
            "same_bits": same,
            "threads": torch.get_num_threads(),
            "matmul_gflops": {"bfloat16": matmul_rate(torch.bfloat16), "float32": matmul_rate(torch.float32)},
        },
    )


if __name__ == "__main__":
    main()
