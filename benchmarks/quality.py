"""Quality at equal tokens, saekit against its peers: `python -m benchmarks.quality [--sources tiny stories260k]`.

All libraries train on the same activations, batch for batch, at the same width and learning rate; one evaluator
(`saekit.evaluate`, on held-out contexts) judges all. What is compared is the FVU at one L0:

    topk                         k is the L0
    batchtopk, matryoshka        each library's threshold as it delivers it is reported; for the comparison every one is
                                 set so that its SAE fires k times a token on training activations, by one function
    standard, gated, jumprelu    each library's own coefficient is corrected run by run until L0 is near the wanted one,
                                 and FVU is interpolated to it along log L0 through the two nearest runs

Every try is a whole run. Prints one table and writes it, with all settings and every run, to
`benchmarks/results/quality.json`.
"""

from __future__ import annotations

import argparse
import math
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import saekit
from benchmarks.data import SOURCES, Data
from benchmarks.libraries import LIBRARIES, VERSIONS, Library, Setting, Trained
from benchmarks.timing import Seconds, alternate, matmul_rate
from saekit.files import write_json
from saekit.sae.architectures import ARCHITECTURES

RESULTS = Path(__file__).parent / "results" / "quality.json"
CLOSE = 0.03  # how far log L0 may be off
TRIES = 4  # further runs to get there
SLOPE = -1.0  # d log L0 / d log coefficient, until two runs tell
FVU_SLOPE = -0.7  # d log FVU / d log L0, likewise
SAME = 1e-4  # relative difference allowed between two readers of one file
THRESHOLD_BATCHES = 8  # training batches on which a BatchTopK threshold is set for the comparison


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
    def off(self) -> float:
        """How far L0 is from the wanted one: the size of the logarithm of their ratio."""
        return abs(math.log(self.l0 / self.setting.l0))

    def record(self) -> dict[str, Any]:
        return {"library": self.library, **asdict(self.setting), **self.figures}


@dataclass(frozen=True)
class Row:
    """A library's best run of an architecture, its FVU at the wanted L0, and its runs."""

    result: Result
    fvu: float
    runs: list[Result]


class Bench:
    """What all runs on one source share: the data, the evaluator."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, console: Console) -> None:
        self.console, self.folder = console, folder
        steps = max(8, args.tokens // args.batch_size)
        source = SOURCES[name]
        self.data = Data(
            source,
            batch_size=args.batch_size,
            steps=steps,
            evaluate_tokens=4096 if args.quick else 32_768,
        )
        self.tries = 1 if args.quick else TRIES
        self.base = Setting(
            architecture="topk",
            site=source.site,
            d_in=self.data.d_in,
            d_sae=256 if args.quick else source.d_sae,
            l0=source.l0,
            dead_after=min(1_000_000, args.tokens // 5),
            lr=args.lr,
            coefficient=0.0,
            seed=args.seed,
        )

    def run(self, library: Library, setting: Setting) -> Result:
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "sae"
        trained = library.train(setting, self.data.batches, folder)
        if trained.difference > SAME:
            raise RuntimeError(
                f"{library.name}: saekit reads another SAE than was trained: {trained.difference:.1e}"
            )
        figures = saekit.evaluate(self.data.model, trained.sae, self.data.held_out, faithfulness=False)
        figures["dead_in_training"] = self.dead_share(trained.sae, setting.dead_after)
        figures["difference"] = trained.difference
        self.console.print(
            f"  {library.name:20} {setting.architecture:10} coefficient {setting.coefficient:8.4f}  "
            f"L0 {figures['l0']:6.1f}  FVU {figures['fvu']:.4f}  dead {figures['dead_in_training']:.1%}",
            highlight=False,
        )
        return Result(library.name, setting, figures, trained)

    def row(self, library: Library, architecture: str) -> Row:
        setting = replace(self.base, architecture=architecture, coefficient=library.first[architecture])
        runs = [self.run(library, setting)]
        if not setting.has_k:
            for _ in range(self.tries):
                if min(run.off for run in runs) <= CLOSE:
                    break
                runs.append(self.run(library, replace(setting, coefficient=corrected(runs))))
            fvu = fvu_at_wanted_l0(runs)
        elif ARCHITECTURES[architecture].running_threshold:
            fvu = self.fvu_at_k(runs[0])
        else:
            fvu = runs[0].figures["fvu"]
        best = min(runs, key=lambda run: run.off)
        best.figures.update(saekit.evaluate(self.data.model, best.trained.sae, self.data.held_out))
        return Row(best, fvu, runs)

    @torch.no_grad()
    def fvu_at_k(self, result: Result) -> float:
        """FVU with the threshold at which the SAE fires k times a token on training activations."""
        sae, batches = result.trained.sae, self.data.batches
        p = torch.cat([sae.preactivations(batches[step]) for step in range(THRESHOLD_BATCHES)])
        before = sae.threshold.clone()
        sae.threshold.fill_(float(p.flatten().topk(result.setting.l0 * len(p)).values[-1]))
        fvu = saekit.evaluate(self.data.model, sae, self.data.held_out, faithfulness=False)["fvu"]
        sae.threshold.copy_(before)
        return fvu

    @torch.no_grad()
    def dead_share(self, sae: saekit.SAE, tokens: int) -> float:
        """Share of latents that fire on none of `tokens` training activations (evaluation text is shorter)."""
        batches = self.data.batches
        fired = torch.zeros(sae.d_sae, dtype=torch.bool)
        for step in range(-(-tokens // batches.batch_size)):
            fired[sae.encode_active(batches[step]).latents] = True
        return 1 - float(fired.float().mean())


def corrected(runs: list[Result]) -> float:
    """The coefficient that should bring L0 to the wanted value, by the two runs that came nearest."""
    nearest, *others = sorted(runs, key=lambda run: run.off)
    slope = SLOPE
    if others and others[0].setting.coefficient != nearest.setting.coefficient:
        slope = math.log(others[0].l0 / nearest.l0) / math.log(
            others[0].setting.coefficient / nearest.setting.coefficient
        )
    factor = math.pow(nearest.setting.l0 / nearest.l0, 1 / min(-0.5, max(-4.0, slope)))
    return nearest.setting.coefficient * min(3.0, max(1 / 3, factor))


def fvu_at_wanted_l0(runs: list[Result]) -> float:
    """FVU interpolated (or extended) along log L0 through the two runs that came nearest."""
    nearest, *others = sorted(runs, key=lambda run: run.off)
    slope = FVU_SLOPE
    if others and others[0].l0 != nearest.l0:
        slope = math.log(others[0].figures["fvu"] / nearest.figures["fvu"]) / math.log(
            others[0].l0 / nearest.l0
        )
    return nearest.figures["fvu"] * math.pow(nearest.setting.l0 / nearest.l0, min(0.0, max(-3.0, slope)))


def ratio(rows: dict[str, Row]) -> float | None:
    """FVU of saekit over that of the best peer, both at the wanted L0; below 1 saekit reconstructs better."""
    peers = [row.fvu for name, row in rows.items() if name != "saekit"]
    return rows["saekit"].fvu / min(peers) if peers and "saekit" in rows else None


def table_of(source: str, found: dict[str, dict[str, Row]], seconds: dict[str, dict[str, Seconds]]) -> Table:
    table = Table(title=f"Quality at equal tokens: {source}")
    for name in ("architecture", "library", "L0", "CE recovered", "dead", "FVU", "FVU at L0", "ratio to best peer",
                 "s/step: median (min–max)"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("library", "architecture") else "right")
    for architecture, rows in found.items():
        for name, row in rows.items():
            f, s = row.result.figures, seconds[architecture][name]
            ours = ratio(rows) if name == "saekit" else None
            table.add_row(
                architecture,
                name,
                f"{f['l0']:.1f}",
                f"{f['ce_recovered']:.4f}",
                f"{f['dead_in_training']:.1%}",
                f"{f['fvu']:.4f}",
                f"{row.fvu:.4f} ({row.result.setting.l0})",
                "" if ours is None else f"{ours:.3f}",
                f"{s.median:.3f} ({s.least:.3f}–{s.most:.3f})",
            )
        table.add_section()
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--libraries", nargs="+", default=[library.name for library in LIBRARIES])
    parser.add_argument("--tokens", type=int, default=400_000, help="activations each run trains on")
    parser.add_argument("--lr", type=float, default=2e-3, help="of every run of every library")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0, help="of all initialisations")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: figures mean nothing, nothing is written"
    )
    args = parser.parse_args()
    if args.quick:
        args.tokens = 16 * args.batch_size
    return args


def main() -> None:
    args, console = parse(), Console(width=150)
    libraries = [library for library in LIBRARIES if library.name in args.libraries]
    if "dictionary_learning" not in VERSIONS:
        console.print("dictionary_learning is not installed and left out (see benchmarks/README.md)")
    report: dict[str, Any] = {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "versions": VERSIONS,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "sources": {},
    }
    tables = []
    for source in args.sources:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(source, args, Path(folder), console)
            console.print(
                f"{source}: {bench.data.batches.steps} steps of {args.batch_size}, lr {args.lr:g}, "
                f"d_sae {bench.base.d_sae}, {bench.base.site}"
            )
            found: dict[str, dict[str, Row]] = {}
            seconds: dict[str, dict[str, Seconds]] = {}
            for architecture in args.architectures:
                found[architecture] = {
                    library.name: bench.row(library, architecture) for library in libraries
                }
                # On trained SAEs, whose learning rate has come down to 0: what most steps of a long run cost.
                seconds[architecture] = alternate(
                    {name: row.result.trained.step for name, row in found[architecture].items()},
                    bench.data.batches[0],
                    rounds=2 if args.quick else 5,
                )
        tables.append(table_of(source, found, seconds))
        report["sources"][source] = {
            architecture: {
                "ratio": ratio(rows),
                "rows": [
                    row.result.record()
                    | {"fvu_at_l0": row.fvu, "seconds": seconds[architecture][name]._asdict()}
                    for name, row in rows.items()
                ],
                "runs": [run.record() for row in rows.values() for run in row.runs],
            }
            for architecture, rows in found.items()
        }
    rates = {str(d).removeprefix("torch."): matmul_rate(d) for d in (torch.float32, torch.bfloat16)}
    report["machine"]["matmul_gflops"] = rates
    for table in tables:
        console.print(table)
    console.print("matmul GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, report)
        console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
