"""Speed against peers: `python -m benchmarks.speed [--clock step,lm,end,catalog,steer,linear,quality] [--quick]`.

Installs the peers in an environment of their own (`benchmarks.peers`), gives each contender a process of its own on the
same two processors and the same files, and times them strictly in turn, A B C A B C …, five rounds of four steps after
five to warm up. What is to be read are ratios of one run, peer over saekit, round by round:

    step       one optimizer step on activations, several architectures and widths
    lm         the language model's forward up to the site
    end        from tokens to a trained SAE
    catalog    every feature's catalog, against SAEDashboard's page
    steer      generation with a direction added
    linear     saekit against itself: twice the latents, eight times the k, twice the tokens
    quality    no clock: FVU at equal tokens of what saekit chose on this machine and of its fp32 twin

Prints a table for each, and writes `benchmarks/results/speed.json`, in which a run replaces the rows it timed and leaves
the others, and a picture of all rows, `speed.png`. What each contender's step consists of is said in its file, `speed_*.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import saekit
from benchmarks import peers
from benchmarks.speed_clocks import CLOCKS, MODULES, Contender, Entry, Row, Shape, Spread, Wanted, measure
from benchmarks.speed_inputs import Inputs
from benchmarks.speed_plot import draw
from benchmarks.speed_process import Failed, Worker
from benchmarks.timing import copy_rate, matmul_rate
from saekit.files import read_json, write_json
from saekit.sae.architectures import ARCHITECTURES

RESULTS = Path(__file__).parent / "results" / "speed.json"
SHAPES = (Shape(512, 8192, 2048), Shape(512, 8192, 4096), Shape(768, 24_576, 2048), Shape(768, 24_576, 4096))
TINY = (Shape(64, 512, 256),)


class Workers:
    """A process for each contender of a clock, started when it is first asked."""

    def __init__(self, missing: dict[str, str], folder: Path, threads: int) -> None:
        self._missing, self._folder, self._threads = missing, folder, threads
        self._running: dict[str, Worker] = {}

    def of(self, contender: Contender) -> Worker:
        if why := self._missing.get(contender.library):
            raise Failed(f"not installed: {why}")
        if contender.name not in self._running:
            python = sys.executable if contender.library == "saekit" else peers.PYTHON
            log = self._folder / f"{len(self._running)}.log"
            log.unlink(missing_ok=True)
            self._running[contender.name] = Worker(python, MODULES[contender.library], log, self._threads)
        return self._running[contender.name]

    def stop(self) -> None:
        for worker in self._running.values():
            worker.stop()
        self._running.clear()


def record(row: Row, entries: list[Entry]) -> dict[str, Any]:
    """A row for the JSON file."""
    ratios = row.ratios(entries)
    timed = []
    for entry in entries:
        figures: dict[str, Any] = {"name": entry.name, **entry.figures}
        if entry.failed is None:
            figures["seconds"] = entry.spread(row.whole_rounds)._asdict()
            figures["tokens_per_second"] = row.tokens / figures["seconds"]["median"]
            figures["rounds"] = entry.seconds
        else:
            figures["failed"] = entry.failed
        if entry.name in ratios:
            figures["ratio"] = ratios[entry.name]._asdict()
        timed.append(figures)
    return {"name": row.name, "tokens": row.tokens, "entries": timed}


def table_of(clock: str, rows: list[tuple[Row, list[Entry]]]) -> Table:
    table = Table(title=f"{clock}: {(CLOCKS[clock].__doc__ or '').strip()}")
    last = "times the first" if clock in ("linear", "quality") else "times saekit"
    for name in ("", "seconds: median (min–max)", "tokens/s", "peak MB", "", f"{last}: median (min–max)"):
        table.add_column(name, justify="right" if name else "left")
    for row, entries in rows:
        ratios = row.ratios(entries)
        table.add_row(row.name, style="bold")
        for entry in entries:
            if entry.failed is not None:
                table.add_row(f"  {entry.name}", entry.failed)
                continue
            seconds = entry.spread(row.whole_rounds)
            others = {name: value for name, value in entry.figures.items() if name != "memory_mb"}
            table.add_row(
                f"  {entry.name}",
                shown(seconds, ".4f"),
                f"{row.tokens / seconds.median:,.0f}",
                f"{entry.figures['memory_mb']:,.0f}",
                ", ".join(f"{name} {value:.4g}" for name, value in others.items()),
                shown(ratios[entry.name], ".2f") if entry.name in ratios else "",
            )
        table.add_section()
    return table


def shown(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.least:{form}}–{spread.most:{form}})"


def at_equal_tokens(rows: list[tuple[Row, list[Entry]]]) -> dict[str, dict[str, float]]:
    """FVU by row: saekit's own and their ratio, and beside them what `benchmarks.quality` last found for the peers."""
    path = RESULTS.with_name("quality.json")
    found = read_json(path)["sources"].get("tiny", {}) if path.exists() else {}
    table: dict[str, dict[str, float]] = {}
    for row, entries in rows:
        figures = {entry.name: entry.figures["fvu"] for entry in entries if entry.failed is None}
        if len(figures) == len(entries) > 1:
            first, second = figures.values()
            figures["ratio"] = first / second
        kind = found.get(row.name.split(",")[0], {"rows": []})
        figures |= {f"{r['library']} in quality.json": r["fvu_at_l0"] for r in kind["rows"]}
        table[row.name] = figures
    return table


def rates() -> dict[str, float]:
    return {
        "matmul_fp32_gflops": round(matmul_rate(torch.float32), 1),
        "matmul_bf16_gflops": round(matmul_rate(torch.bfloat16), 1),
        "copy_gb_s": round(copy_rate(), 1),
    }


def merged(path: Path, clock: str, found: dict[str, Any]) -> dict[str, Any]:
    """The results file with this run's rows of a clock in the place of older ones of the same name."""
    report = read_json(path) if path.exists() else {"clocks": {}}
    older = report["clocks"].get(clock, {"rows": []})["rows"]
    new = {row["name"]: row for row in found["rows"]}
    kept = [new.pop(row["name"], row) for row in older]
    report["clocks"][clock] = {**found, "rows": [*kept, *new.values()]}
    return report


def parse() -> argparse.Namespace:
    def words(known: Any) -> Any:
        def read(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [word for word in given if word not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return given

        return read

    def shapes(text: str) -> list[Shape]:
        try:
            return [Shape(*map(int, part.split("/"))) for part in text.split(",")]
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected d_in/d_sae/batch_size, such as 512/8192/2048"
            ) from None

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--clock", type=words(CLOCKS), default=list(CLOCKS), help="comma-separated; all by default"
    )
    parser.add_argument(
        "--shapes", type=shapes,
        help="of the step, d_in/d_sae/batch_size, comma-separated; by default 512/8192/2048 with all architectures and "
        "768/24576/4096 with topk alone, which takes a third of the time of all of the four",
    )  # fmt: skip
    parser.add_argument(
        "--all-shapes", action="store_true", help="d_in 512 and 768 by batches of 2048 and 4096"
    )
    parser.add_argument(
        "--architectures", type=words(ARCHITECTURES), default=["topk", "batchtopk", "standard", "jumprelu"],
        help="of the step, comma-separated; gated and matryoshka are there too",
    )  # fmt: skip
    parser.add_argument("--libraries", type=words(MODULES), default=list(MODULES), help="comma-separated")
    parser.add_argument(
        "--contenders", type=lambda text: set(text.split(",")), default=set(), metavar="NAME,…",
        help="as a table names them, e.g. 'saekit,SAELens autocast'; all by default",
    )  # fmt: skip
    parser.add_argument("--features", type=int, default=512, help="of the catalog clock's SAE")
    parser.add_argument("--threads", type=int, default=2, help="of every contender")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: figures mean nothing, nothing is written"
    )
    return parser.parse_args()


def wanted_of(args: argparse.Namespace) -> Wanted:
    shapes: Any = args.shapes or (SHAPES if args.all_shapes else SHAPES[:1])
    wide: Any = () if args.shapes or args.all_shapes else SHAPES[-1:]
    if args.quick:
        shapes, wide = args.shapes or TINY, ()
    return Wanted(
        shapes,
        wide,
        args.architectures,
        {"saekit", *args.libraries},
        contenders=args.contenders | {"saekit"} if args.contenders else set(),
        features=args.features,
        quick=args.quick,
    )


def main() -> None:
    args, console = parse(), Console(width=150)
    wanted = wanted_of(args)
    torch.set_num_threads(args.threads)
    missing = peers.prepare() if wanted.libraries - {"saekit"} else {}
    with tempfile.TemporaryDirectory() as folder:
        inputs, workers = Inputs(Path(folder)), Workers(missing, Path(folder), args.threads)
        for clock in args.clock:
            start, before = time.perf_counter(), rates()
            rows: list[tuple[Row, list[Entry]]] = []
            try:
                for row in CLOCKS[clock](inputs, wanted):
                    console.print(f"{clock}: {row.name} …", highlight=False)
                    rows.append((row, measure(row, workers.of, args.quick)))
            finally:
                workers.stop()
            seconds, after = time.perf_counter() - start, rates()
            around = {name: [before[name], after[name]] for name in before}
            console.print(table_of(clock, rows))
            found: dict[str, Any] = {
                "seconds": round(seconds),
                "arguments": {"threads": args.threads, "libraries": sorted(wanted.libraries)},
                "versions": {
                    "saekit": saekit.__version__,
                    "torch": torch.__version__,
                    "peers": [pin for package in peers.PACKAGES[1:] for pin in package.requirements],
                },
                "machine": {"processor": platform.machine(), "system": platform.system()},
                "rows": [record(row, entries) | {"rates": around} for row, entries in rows],
            }
            if clock == "quality":
                found["fvu"] = at_equal_tokens(rows)
                for name, figures in found["fvu"].items():
                    console.print(f"FVU, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            console.print(
                f"{seconds:.0f} s; " + ", ".join(f"{k} {a:g} → {b:g}" for k, (a, b) in around.items())
            )
            if not args.quick:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                report = merged(args.out, clock, found)
                write_json(args.out, report)
                draw(report, args.out.with_suffix(".png"))
                console.print(f"written to {args.out} and {args.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
