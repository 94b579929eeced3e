"""Quality at equal tokens, saekit against SAELens: `python -m benchmarks.quality [--tokens N] [--quick]`.

Both libraries train on the same activations of the embedded model, batch for batch; one evaluator
(`saekit.evaluate`, on held-out contexts) judges both. Each library gets its best learning rate of one grid,
climbed from the middle until both neighbours are worse:

    topk       the highest explained variance wins
    standard   at each rate the L1 coefficient is corrected until L0 is near the wanted one; the lowest FVU wins,
               interpolated to exactly that L0, and its coefficient is corrected further

Every try is a whole run unless `--search-share` shortens it: what suits a short run need not suit a long one.

Prints one table and writes it, with all settings and every run, to `benchmarks/results/quality.json`.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sae_lens
import torch
from rich.console import Console
from rich.table import Table

import saekit
from benchmarks.data import Batches, corpora, materialise
from benchmarks.libraries import LIBRARIES, Setting, Trained
from benchmarks.timing import alternate, matmul_rate
from saekit.files import write_json
from saekit.sites import site_width

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SITE = "blocks.3.hook_resid_pre"
RESULTS = Path(__file__).parent / "results" / "quality.json"
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
FIRST_RATE = 2e-3
K = 32
L0 = 30.0  # wanted of standard
NEAR, CLOSE = 0.25, 0.03  # how far log L0 may be off: while searching, and in the end
TRIES = 4  # runs to get there, each time
FIRST_L1 = 3.0
L1_SLOPE = -1.0  # d log L0 / d log coefficient, until two runs tell
FVU_SLOPE = -0.7  # d log FVU / d log L0, likewise
SAME = 1e-4  # relative difference allowed between two readers of one file


Found = TypeVar("Found")


@dataclass(frozen=True)
class Result:
    """One training run and its figures."""

    library: str
    setting: Setting
    figures: dict[str, float]
    trained: Trained

    @property
    def l0(self) -> float:
        return max(self.figures["l0"], 0.1)  # its logarithm is taken

    @property
    def fvu(self) -> float:
        return self.figures["fvu"]

    def record(self) -> dict[str, Any]:
        return {"library": self.library, **asdict(self.setting), **self.figures}


class Bench:
    """What all runs share: the data, the evaluator, the log of runs."""

    def __init__(self, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.console, self.folder = console, folder
        self.model: TransformerBridge = saekit.load_model("tiny")
        self.search_share = args.search_share
        self.tries = 1 if args.quick else TRIES
        self.rates = (FIRST_RATE,) if args.quick else LEARNING_RATES
        train, self.held_out = corpora(self.model, 4096 if args.quick else 32_768)
        self.batches = materialise(
            self.model, SITE, train, batch_size=args.batch_size, steps=max(8, args.tokens // args.batch_size)
        )
        tokens = self.batches.steps * args.batch_size
        self.base = Setting(
            architecture="topk",
            site=SITE,
            d_in=site_width(self.model, SITE),
            d_sae=512 if args.quick else args.d_sae,
            k=K,
            dead_after=min(1_000_000, tokens // 5),
            lr=0.0,
            l1=0.0,
            seed=args.seed,
        )
        self.results: list[Result] = []

    def run(self, library: str, setting: Setting, share: float = 1.0) -> Result:
        batches = self.batches.first(share)
        dead_after = max(batches.batch_size, round(self.base.dead_after * share))
        setting = replace(setting, dead_after=dead_after)
        trained = LIBRARIES[library](setting, batches, self.folder / f"{len(self.results)}")
        if trained.difference > SAME:
            raise RuntimeError(
                f"{library}: saekit reads another SAE than was trained: {trained.difference:.1e}"
            )
        figures = saekit.evaluate(self.model, trained.sae, self.held_out)
        figures["dead_in_training"] = dead_share(trained.sae, self.batches, setting.dead_after)
        figures |= {"steps": batches.steps, "difference": trained.difference}
        result = Result(library, setting, figures, trained)
        self.results.append(result)
        self.console.print(
            f"  {library:8} {setting.architecture:8} lr {setting.lr:.0e}  l1 {setting.l1:5.2f}  "
            f"{batches.steps} steps: L0 {figures['l0']:6.1f}  FVU {figures['fvu']:.4f}  "
            f"dead {figures['dead_in_training']:.1%}",
            highlight=False,
        )
        return result

    def best_topk(self, library: str) -> Result:
        def attempt(lr: float) -> tuple[float, Result]:
            result = self.run(library, replace(self.base, lr=lr), self.search_share)
            return result.fvu, result

        best = climb(self.rates, FIRST_RATE, attempt)
        return best if self.search_share == 1 else self.run(library, replace(self.base, lr=best.setting.lr))

    def best_standard(self, library: str) -> Result:
        l1 = FIRST_L1

        def attempt(lr: float) -> tuple[float, list[Result]]:
            nonlocal l1
            setting = replace(self.base, architecture="standard", lr=lr, l1=l1)
            runs = self.reach(library, setting, NEAR, [], self.search_share)
            l1 = min(runs, key=off).setting.l1
            return fvu_at_wanted_l0(runs), runs

        runs = climb(self.rates, FIRST_RATE, attempt)
        if self.search_share < 1:
            runs = [self.run(library, replace(runs[-1].setting, l1=corrected(runs)))]
        runs = self.reach(library, runs[-1].setting, CLOSE, runs)
        return min(runs, key=off)

    def reach(
        self, library: str, setting: Setting, within: float, runs: list[Result], share: float = 1.0
    ) -> list[Result]:
        """Further runs, with the coefficient corrected each time, until one has the wanted L0."""
        runs = list(runs) or [self.run(library, setting, share)]
        for _ in range(self.tries):
            if min(map(off, runs)) <= within:
                break
            runs.append(self.run(library, replace(setting, l1=corrected(runs)), share))
        return runs


def climb(grid: Sequence[float], start: float, attempt: Callable[[float], tuple[float, Found]]) -> Found:
    """What `attempt` finds at the point of the grid with the lowest cost, supposing that there is one valley."""
    tried = {grid.index(start): attempt(start)}
    for step in (1, -1):
        at = min(tried, key=lambda i: tried[i][0])
        while 0 <= at + step < len(grid) and at + step not in tried:
            tried[at + step] = attempt(grid[at + step])
            if tried[at + step][0] >= tried[at][0]:
                break
            at += step
    return min(tried.values(), key=lambda found: found[0])[1]


def off(result: Result) -> float:
    """How far L0 is from the wanted one: the size of the logarithm of their ratio."""
    return abs(math.log(result.l0 / L0))


def corrected(runs: list[Result]) -> float:
    """The L1 coefficient that should bring L0 to the wanted value, by the two runs that came nearest."""
    nearest, *others = sorted(runs, key=off)
    slope = L1_SLOPE
    if others:
        slope = math.log(others[0].l0 / nearest.l0) / math.log(others[0].setting.l1 / nearest.setting.l1)
    factor = math.pow(L0 / nearest.l0, 1 / min(-0.5, max(-4.0, slope)))
    return nearest.setting.l1 * min(3.0, max(1 / 3, factor))


def fvu_at_wanted_l0(runs: list[Result]) -> float:
    """FVU interpolated (or extended) along log L0 through the two runs that came nearest."""
    nearest, *others = sorted(runs, key=off)
    slope = FVU_SLOPE
    if others and others[0].l0 != nearest.l0:
        slope = math.log(others[0].fvu / nearest.fvu) / math.log(others[0].l0 / nearest.l0)
    return nearest.fvu * math.pow(L0 / nearest.l0, min(0.0, slope))


@torch.no_grad()
def dead_share(sae: saekit.SAE, batches: Batches, tokens: int) -> float:
    """Share of latents that fire on none of `tokens` training activations (evaluation text is shorter)."""
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    for step in range(-(-tokens // batches.batch_size)):
        fired[sae.encode_active(batches[step]).latents] = True
    return 1 - float(fired.float().mean())


def table_of(pairs: dict[str, list[Result]], seconds: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Quality at equal tokens")
    for name in ("library", "architecture", "L0", "EV", "FVU", "CE recovered", "dead", "lr", "L1 coeff.",
                 "s/step: median (min–max)", "FVU ratio"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("library", "architecture") else "right")
    for architecture, results in pairs.items():
        for result in results:
            f, s = result.figures, seconds[architecture][result.library]
            table.add_row(
                result.library,
                architecture,
                f"{f['l0']:.1f}",
                f"{f['explained_variance']:.4f}",
                f"{f['fvu']:.4f}",
                f"{f['ce_recovered']:.4f}",
                f"{f['dead_in_training']:.1%}",
                f"{result.setting.lr:g}",
                f"{result.setting.l1:.2f}" if architecture == "standard" else "",
                f"{s.median:.3f} ({s.least:.3f}–{s.most:.3f})",
                f"{fvu_ratio(results):.3f}" if result.library == "saekit" else "",
            )
    return table


def fvu_ratio(results: list[Result]) -> float:
    """FVU of saekit over that of SAELens; below 1 saekit reconstructs better."""
    fvu = {result.library: result.fvu for result in results}
    return fvu["saekit"] / fvu["SAELens"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="activations each run trains on")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument(
        "--search-share", type=float, default=1.0, help="of the run, for each try of the searches"
    )
    parser.add_argument("--seed", type=int, default=0, help="of both initialisations")
    parser.add_argument(
        "--architectures", nargs="+", default=["topk", "standard"], choices=["topk", "standard"]
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: figures mean nothing, nothing is written"
    )
    args = parser.parse_args()
    if args.quick:
        args.tokens = 16 * args.batch_size
    return args


def main() -> None:
    args, console = parse(), Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder), console)
        console.print(
            f"{bench.batches.steps} steps of {args.batch_size}, d_sae {bench.base.d_sae}, {SITE} of tiny"
        )
        pairs: dict[str, list[Result]] = {}
        seconds: dict[str, dict[str, Any]] = {}
        for architecture in args.architectures:
            search = bench.best_topk if architecture == "topk" else bench.best_standard
            pairs[architecture] = [search(library) for library in LIBRARIES]
            # On the trained SAEs, whose learning rate has come down to 0: what most steps of a long run cost.
            seconds[architecture] = alternate(
                {r.library: r.trained.step for r in pairs[architecture]},
                bench.batches[0],
                rounds=2 if args.quick else 6,
            )
    rates = {str(d).removeprefix("torch."): matmul_rate(d) for d in (torch.float32, torch.bfloat16)}
    console.print(table_of(pairs, seconds))
    console.print("matmul GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    for result in (r for results in pairs.values() for r in results if len(bench.rates) > 2):
        if result.setting.lr in (bench.rates[0], bench.rates[-1]):
            console.print(
                f"note: {result.library} {result.setting.architecture}: best rate at the grid's edge"
            )
    if not args.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, report(args, bench, pairs, seconds, rates))
        console.print(
            f"written to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS.name}"
        )


def report(
    args: argparse.Namespace,
    bench: Bench,
    pairs: dict[str, list[Result]],
    seconds: dict[str, dict[str, Any]],
    rates: dict[str, float],
) -> dict[str, Any]:
    """The content of `quality.json`."""
    return {
        "arguments": vars(args),
        "versions": {
            "saekit": saekit.__version__,
            "sae_lens": sae_lens.__version__,
            "torch": torch.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "model_dtype": str(bench.model.cfg.dtype).removeprefix("torch."),
            "matmul_gflops": rates,
        },
        "learning_rates": list(bench.rates),
        "fvu_ratio": {architecture: fvu_ratio(results) for architecture, results in pairs.items()},
        "seconds_per_step": {
            architecture: {library: s._asdict() for library, s in by.items()}
            for architecture, by in seconds.items()
        },
        "best": [result.record() for results in pairs.values() for result in results],
        "runs": [result.record() for result in bench.results],
    }


if __name__ == "__main__":
    main()
