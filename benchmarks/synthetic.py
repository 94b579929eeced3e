"""Every architecture on data whose directions are known: `python -m benchmarks.synthetic [--seeds N] [--quick]`.

Two worlds (`saekit.evaluation.synthetic`), the same number of samples for all, L0 near the same number:

    flat    64 features in 32 dimensions, independent, equally frequent: is the truth found?
    trees   8 parents with 5 exclusive children each, orthogonal; two of three parents have a child with them, and L0
            is below the number of features that fire, so sparsity rewards absorption: are parents left whole?

Each architecture gets its learning rate from one grid, by a run with a seed of its own: the lowest FVU among those
whose L0 is near the wanted one. The truth has no say in that. Then one run for each seed.

Prints one table and writes it, with every run, to `benchmarks/results/synthetic.json`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import saekit
from saekit.evaluation.absorption import tree_absorption
from saekit.evaluation.synthetic import Superposition, forest, recovery
from saekit.files import write_json

RESULTS = Path(__file__).parent / "results" / "synthetic.json"
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
TAKE_K = ("topk", "batchtopk", "matryoshka")
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
PILOT_SEED = 1000
STEPS, BATCH = 600, 256
NEAR = 0.25  # |log L0 / wanted| of a run that may be chosen
SAMPLES = 16_384
COLUMNS = ("l0", "fvu", "mmcs", "recovered", "f1", "absorption")


class World(NamedTuple):
    truth: Superposition
    d_sae: int
    l0: int
    prefixes: tuple[int, ...]


WORLDS = {
    "flat": World(Superposition(32, 64, max_cosine=0.3, rate=0.03), 96, 2, (12, 24, 48, 96)),
    "trees": World(
        Superposition(
            48, 48, max_cosine=0.0, rate=0.2, parents=forest(8, 5), child_rate=0.13, exclusive=True
        ),
        64,
        2,
        (8, 16, 64),
    ),
}


def run(architecture: str, world: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once, and everything there is to say of it."""
    truth, d_sae, l0, prefixes = WORLDS[world]
    takes_k = architecture in TAKE_K
    sae = saekit.SAE.new(
        architecture,
        d_in=truth.d_in,
        d_sae=d_sae,
        k=l0 if takes_k else None,
        prefixes=prefixes if architecture == "matryoshka" else None,
        seed=seed,
    )
    trainer = saekit.Trainer(
        sae,
        lr=lr,
        tokens=steps * BATCH,
        batch_size=BATCH,
        dead_after=max(BATCH, steps * BATCH // 10),
        target_l0=None if takes_k else float(l0),
    )
    start = time.perf_counter()
    for x in itertools.islice(truth.batches(BATCH, seed), steps):
        trainer.step(x)
    seconds = time.perf_counter() - start
    figures = {"world": world, "architecture": architecture, "lr": lr, "seed": seed, "seconds": seconds}
    figures |= reconstruction(trainer.sae, truth) | recovery(trainer.sae, truth, samples=SAMPLES)
    return figures | (tree_absorption(trainer.sae, truth, samples=SAMPLES) if truth.children else {})


@torch.no_grad()
def reconstruction(sae: saekit.SAE, truth: Superposition) -> dict[str, float]:
    """L0 and FVU on a sample that was not trained on."""
    x, _ = truth.sample(SAMPLES)
    error, spread = (x - sae(x)).square().sum(), (x - x.mean(0)).square().sum()
    return {"l0": float((sae.encode(x) > 0).float().sum(1).mean()), "fvu": float(error / spread)}


def chosen(pilots: list[dict[str, Any]], wanted: float) -> float:
    """The learning rate of the pilot with the lowest FVU near the wanted L0; else of the nearest one."""

    def off(pilot: dict[str, Any]) -> float:
        return abs(math.log(max(pilot["l0"], 1e-3) / wanted))

    near = [pilot for pilot in pilots if off(pilot) < NEAR]
    best = min(near, key=lambda pilot: pilot["fvu"]) if near else min(pilots, key=off)
    return float(best["lr"])


def summary(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """(median, least, most) over the seeds, of the columns that the world has."""
    values = {name: [run[name] for run in runs] for name in COLUMNS if name in runs[0]}
    return {name: (statistics.median(v), min(v), max(v)) for name, v in values.items()}


def table_of(rows: dict[tuple[str, str], list[dict[str, Any]]]) -> Table:
    table = Table(title="Known directions: median (least–most) over seeds")
    for name in ("world", "architecture", *COLUMNS, "lr"):
        table.add_column(name, justify="left" if name in ("world", "architecture") else "right")
    for (world, architecture), runs in rows.items():
        figures = summary(runs)
        cells = [
            f"{figures[name][0]:.2f} ({figures[name][1]:.2f}–{figures[name][2]:.2f})"
            if name in figures
            else ""
            for name in COLUMNS
        ]
        table.add_row(world, architecture, *cells, f"{runs[0]['lr']:g}")
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each architecture")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} samples, for each run")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=WORLDS)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: figures mean nothing, nothing is written"
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 20, 1
    return args


def main() -> None:
    args, console = parse(), Console(width=150)
    start = time.perf_counter()
    pilots: list[dict[str, Any]] = []
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for world, architecture in itertools.product(args.worlds, args.architectures):
        tried = [run(architecture, world, lr, PILOT_SEED, args.steps) for lr in LEARNING_RATES]
        lr = chosen(tried, WORLDS[world].l0)
        rows[world, architecture] = [
            run(architecture, world, lr, seed, args.steps) for seed in range(args.seeds)
        ]
        pilots += tried
    console.print(table_of(rows))
    console.print(f"{time.perf_counter() - start:.0f} s")
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(
            RESULTS,
            {
                "arguments": vars(args),
                "versions": {"saekit": saekit.__version__, "torch": torch.__version__},
                "worlds": {
                    name: {"d_sae": world.d_sae, "l0": world.l0, "prefixes": world.prefixes}
                    | vars_of(world.truth)
                    for name, world in WORLDS.items()
                },
                "learning_rates": LEARNING_RATES,
                "summary": [
                    {"world": world, "architecture": architecture, "lr": runs[0]["lr"]} | summary(runs)
                    for (world, architecture), runs in rows.items()
                ],
                "runs": [run for runs in rows.values() for run in runs],
                "pilots": pilots,
            },
        )
        console.print(f"written to {RESULTS.parent.name}/{RESULTS.name}")


def vars_of(truth: Superposition) -> dict[str, Any]:
    return {name: getattr(truth, name) for name in truth.__dataclass_fields__} | {"expected_l0": truth.l0}


if __name__ == "__main__":
    main()
