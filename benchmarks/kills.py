"""Kills runs and looks whether anything is lost: `python -m benchmarks.kills [--kills 50] [--seed 0]`.

A small run on the embedded model is killed with SIGKILL and resumed, again and again, in three ways:

    moments   at random moments of its wall time, start and finish included; resumed until it is done
    writes    right before each system call that changes its folder (create, write, fsync, rename, unlink, lock …),
              one kill per call, from the start over a checkpoint with pruning to a `final` that replaces an older one;
              but for the call after an fsync, which finds what the fsync found
    torn      in the middle of each file it writes: after 1 byte and after 100, and within a row of metrics.jsonl

The run has to end with every file byte-equal to that of a run nobody touched: final/, metrics.jsonl, recipe.yaml and
the checkpoints kept, and with no other file in its folder. Prints one table of the moments and one of the writes,
torn ones included (a row for each stretch of calls that ended alike); exit code 1 if anything differs.

One process imports and loads everything, with one thread, and forks the runs, so that a kill costs a fraction of a
second; `--quick` sketches pictures instead of drawing them, which takes longer than all else. SIGKILL leaves what the
kernel holds: whether the fsyncs come in the right order is tested in tests/training/test_checkpoint.py. Needs `fork`:
not Windows.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a pool of threads does not survive a fork
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # neither do autograd's threads, one for each
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import saekit
from saekit import files
from saekit.locks import LOCK
from saekit.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

STEPS = 60  # of the run that is killed at random moments
EARLIER, LATER = 3, 7  # of the run that is killed at its writes: it was finished, and is made longer
BETWEEN = 5  # the step after which it is first killed: two checkpoints are there, a third is due
TORN = (1, 100)  # bytes of a file that get written
WRITING = os.O_WRONLY | os.O_RDWR
IDLE = {"fsync", "flock"}  # change nothing that a kill would leave behind
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "fcntl.flock"}
HANGS = 120.0  # seconds


FAILED = "the resumed run ended with an error, printed above"


class Failed(Exception):
    """A run ended with an error of its own."""


@dataclass(frozen=True)
class Call:
    """A system call about to change the run's folder."""

    kind: str  # open, write, fsync, rename, remove …
    path: str  # relative to the run's folder where it is known

    @property
    def writes(self) -> bool:
        return self.kind in ("open", "write")

    @property
    def hidden(self) -> bool:
        """Within a folder that is not in its place, yet or any more. (Of a folder's files that go, only names are seen.)"""
        return ".tmp-" in Path(self.path).parent.name or (self.kind == "remove" and self.path != LOCK)

    def __str__(self) -> str:
        return re.sub("-[0-9]+", "", f"{self.kind} {self.path}".strip())  # the names hold steps and pids


@dataclass(frozen=True)
class Outcome:
    """A run that was killed, and how it ended."""

    what: str  # where the kills came
    kills: tuple[str, ...]  # of each: the last row's step → the checkpoint it was resumed from
    wrong: tuple[str, ...]  # what differs from the run nobody touched; empty: nothing


@dataclass
class Reporter:
    """Keeps a run's lines in a file, and does something at a step."""

    said: Path
    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)

    def line(self, text: str) -> None:
        with self.said.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def progress(self, step: int, *_: object) -> None:
        if action := self.at_step.get(step):
            action()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_beyond(size: int) -> None:
    """Let the kernel end this process once a file it writes would grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_within_a_row(path: Path) -> None:
    die_beyond(path.stat().st_size + 40)


def watch(folder: Path, before: Callable[[int, Call], None]) -> None:
    """From now on, in this process, `before(n, call)` comes before its nth call that changes `folder`."""
    inside, count = f"{folder}{os.sep}", 0

    def seen(kind: str, path: str) -> None:
        nonlocal count
        count += 1
        before(count, Call(kind, path.removeprefix(inside)))

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | os.PathLike) and flags & WRITING and os.fspath(path).startswith(inside):
                seen("open", os.fspath(path))
        elif event == "fcntl.flock":
            seen("flock", "")
        elif event in CHANGES:
            given = args[1 if event == "os.rename" else 0]
            path = "" if isinstance(given, int) else os.fspath(given)  # a descriptor: the lock's
            if not path.startswith(os.sep) or path.startswith(inside):  # relative: rmtree, by descriptors
                seen(event.removeprefix("os."), path)

    def fsync(descriptor: int, _fsync: Callable[[int], None] = os.fsync) -> None:
        seen("fsync", "")
        _fsync(descriptor)

    def save_file(tensors: Any, path: Path, *rest: Any, _save: Callable[..., None] = files.save_file) -> None:
        seen("write", str(path))  # by a library that Python's audit does not see
        _save(tensors, path, *rest)

    os.fsync, files.save_file = fsync, save_file  # type: ignore[assignment]
    sys.addaudithook(audit)


@dataclass(frozen=True)
class Runner:
    """Forks processes that train, or go on with, the recipe's run in `<folder>/runs`."""

    model: TransformerBridge
    recipe: Recipe
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.recipe.name

    @property
    def said(self) -> Path:
        return self.folder / "said"

    def start(
        self, arm: Callable[[], None] = lambda: None, at_step: dict[int, Callable[[], None]] | None = None
    ) -> int:
        """The pid of a process that runs to its end. arm: called in it first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            self.said.unlink(missing_ok=True)
            arm()
            saekit.train(
                self.recipe,
                resume=True,
                model=self.model,
                runs=self.folder / "runs",
                reporter=Reporter(self.said, at_step or {}),
            )
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, **how: Any) -> bool:
        """Run it; True when it came to its end, False when it was killed."""
        return ended(self.start(**how), time.perf_counter() + HANGS)

    def last_step(self) -> int:
        rows = self.run / "metrics.jsonl"
        steps = [0]
        if rows.exists():
            for line in rows.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a row cut short
                    steps.append(json.loads(line)["step"])
        return steps[-1]

    def resumed_from(self, done: bool) -> str:
        """What the last process said about it; done: it came to its end."""
        lines = self.said.read_text("utf-8").splitlines() if self.said.exists() else []
        found = [line.rsplit(os.sep, 1)[-1] for line in lines if line.startswith("resumed from")]
        if found:
            return found[0]
        if any("finished" in line for line in lines):
            return "done"
        return "start" if done else "killed too soon to say"


def ended(pid: int, deadline: float) -> bool:
    """Wait for a process and kill it at the deadline. True: it came to its end; False: it was killed; else `Failed`."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.perf_counter() >= deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code > 0:
        raise Failed
    return code == 0


def contents(run: Path) -> dict[str, bytes | None]:
    """Every file and folder (None) of a run."""
    return {
        str(path.relative_to(run)): path.read_bytes() if path.is_file() else None for path in run.rglob("*")
    }


def differences(run: Path, wanted: dict[str, bytes | None]) -> tuple[str, ...]:
    found = contents(run)
    return tuple(
        f"{name} {'differs' if name in found and name in wanted else 'is missing' if name in wanted else 'is left over'}"
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or found[name] != wanted[name]
    )


def sentences(documents: int, draw: random.Random) -> Iterator[str]:
    """Made-up documents."""
    nouns, verbs = "ship tree king river stone lamp horse garden".split(), "sees takes finds keeps".split()
    for number in range(documents):
        yield " ".join(
            f"The {draw.choice(nouns)} {draw.choice(verbs)} a {draw.choice(nouns)} near number {number}-{part}."
            for part in range(draw.randint(2, 9))
        )


def make_recipe(folder: Path, d_sae: int, steps: int, batch_size: int, checkpoint_every: int) -> Recipe:
    texts = folder / "text.jsonl", folder / "held_out.jsonl"
    for text, documents in zip(texts, (150, 2), strict=True):
        lines = [
            json.dumps({"text": document}) for document in sentences(documents, random.Random(documents))
        ]
        text.write_text("\n".join(lines) + "\n", "utf-8")
    return parse_recipe(
        {
            "name": "run", "model": "tiny", "dtype": "float32", "device": "cpu", "site": "blocks.1.hook_resid_pre",
            "data": {"text": str(texts[0]), "held_out_text": str(texts[1]), "context_size": 32},
            "sae": {"architecture": "topk", "d_sae": d_sae, "k": 8},
            "training": {
                "tokens": steps * batch_size, "batch_size": batch_size, "lr": 1e-3, "ring": 2 * batch_size,
                "contexts": max(1, batch_size // 32), "log_every": 1, "evaluate_every": 5 * checkpoint_every,
                "evaluate_tokens": 64, "checkpoint_every": checkpoint_every, "keep_checkpoints": 2,
            },
        }
    )  # fmt: skip


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    tokens = steps * recipe.training.batch_size
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"tokens": tokens})})


def sketch(figure: Figure, path: Path, **_: Any) -> None:
    """In the place of `Figure.savefig`: write what would be drawn as a few bytes, in the same calls."""
    shown = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    shown += [patch.get_path().vertices.tolist() for axes in figure.axes for patch in axes.patches]
    said = [text.get_text() for place in (figure, *figure.axes) for text in place.texts]
    path.write_text(hashlib.sha256(repr((shown, said)).encode()).hexdigest(), "utf-8")


def at_moments(runner: Runner, kills: int, draw: random.Random) -> list[Outcome]:
    """Kill at random moments until `kills` have happened, in as many runs as that takes."""
    untouched = replace(runner, folder=runner.folder / "untouched")
    start = time.perf_counter()
    untouched.finish()
    seconds = time.perf_counter() - start
    wanted = contents(untouched.run)
    outcomes: list[Outcome] = []
    while kills > 0:
        one = replace(runner, folder=runner.folder / f"moments-{len(outcomes)}")
        happened: list[str] = []
        try:
            while True:
                moment = draw.uniform(0, seconds) if kills > 0 else HANGS
                done = ended(one.start(), time.perf_counter() + moment)
                if happened:
                    happened[-1] += one.resumed_from(done)
                if done:
                    break
                kills -= 1
                happened.append(f"{one.last_step()} → ")
            wrong = differences(one.run, wanted)
        except Failed:
            wrong = (FAILED,)
        outcomes.append(Outcome(f"run {len(outcomes) + 1}", tuple(happened), wrong))
        shutil.rmtree(one.folder)
    return outcomes


@dataclass(frozen=True)
class Snapshot:
    """A run that was killed, to go on from again and again, and the calls that going on makes."""

    what: str
    folder: Path
    calls: tuple[Call, ...]


def snapshots(runner: Runner) -> list[Snapshot]:
    """Two states to go on from: killed between steps, and between the two renames that replace `final`."""
    between = replace(runner, folder=runner.folder / "between steps")
    replace(between, recipe=with_steps(runner.recipe, EARLIER)).finish()
    between.finish(at_step={BETWEEN: die})
    swapping = replace(runner, folder=runner.folder / "final half replaced")
    calls = counted(between)
    swap = max(n for n, call in enumerate(calls, 1) if call == Call("rename", "final"))
    shutil.copytree(between.folder, swapping.folder)
    killed_before(swapping, swap)
    return [
        Snapshot(one.folder.name, one.folder, made)
        for one, made in ((between, calls), (swapping, counted(swapping)))
    ]


def counted(snapshot: Runner) -> tuple[Call, ...]:
    """The calls that going on from a snapshot makes, found out on a copy of it."""
    copy = replace(snapshot, folder=snapshot.folder.with_name("counting"))
    shutil.copytree(snapshot.folder, copy.folder)
    log = snapshot.folder.with_name("calls")
    log.unlink(missing_ok=True)

    def note(_: int, call: Call) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([call.kind, call.path]) + "\n")

    copy.finish(arm=lambda: watch(copy.run, note))
    shutil.rmtree(copy.folder)
    return tuple(Call(*json.loads(line)) for line in log.read_text("utf-8").splitlines())


def killed_before(runner: Runner, number: int, torn: int | None = None) -> None:
    """Go on until right before the call of that number; torn: let it write so many bytes."""

    def at(count: int, _: Call) -> None:
        if count == number:
            die() if torn is None else die_beyond(torn)

    if runner.finish(arm=lambda: watch(runner.run, at)) and torn is None:
        raise SystemExit(f"call {number} did not come this time: the run does not repeat itself")


def one_case(
    runner: Runner, snapshot: Snapshot, wanted: dict[str, bytes | None], number: int, torn: int | None
) -> Outcome:
    """A copy of the snapshot, killed once, resumed to its end and compared. number 0: within a row."""
    shutil.copytree(snapshot.folder, runner.folder)
    if number:
        call = snapshot.calls[number - 1]
        what = f"{number} {call}" if torn is None else f"{number} torn after {torn}: {call}"
        killed_before(runner, number, torn)
    else:
        what = "within a row of metrics.jsonl"
        rows = runner.run / "metrics.jsonl"
        if runner.finish(at_step={BETWEEN: partial(die_within_a_row, rows)}):
            raise SystemExit("no row was cut short")
    step = runner.last_step()
    try:
        runner.finish()
        wrong = differences(runner.run, wanted)
    except Failed:
        wrong = (FAILED,)
    kill = f"{step} → {runner.resumed_from(done=True)}"
    shutil.rmtree(runner.folder)
    return Outcome(f"{snapshot.what}: {what}", (kill,), wrong)


def at_writes(runner: Runner, jobs: int, quick: bool) -> list[Outcome]:
    """Kill at each write, from two snapshots; `jobs` processes share the work. quick: from one, few torn and few hidden."""
    untouched = replace(runner, folder=runner.folder / "untouched-longer")
    replace(untouched, recipe=with_steps(runner.recipe, EARLIER)).finish()
    untouched.finish()
    wanted = contents(untouched.run)
    cases: list[tuple[Snapshot, int, int | None]] = []
    for snapshot in snapshots(runner)[: 1 if quick else None]:
        calls = list(enumerate(snapshot.calls, 1))
        cases += [
            (snapshot, n, None)
            for n, call in calls
            if (n == 1 or snapshot.calls[n - 2].kind not in IDLE) and not (quick and call.hidden and n % 8)
        ]
        if not quick:
            cases += [(snapshot, n, torn) for n, call in calls if call.writes for torn in TORN]
    cases += [(cases[0][0], 0, None)]
    pids = []
    for job in range(jobs):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            with (runner.folder / f"outcomes-{job}").open("w", encoding="utf-8") as file:
                for number, case in list(enumerate(cases))[job::jobs]:
                    one = replace(runner, folder=runner.folder / f"case-{number}")
                    outcome = one_case(one, case[0], wanted, *case[1:])
                    file.write(json.dumps([number, *vars(outcome).values()]) + "\n")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    for pid in pids:
        ended(pid, time.perf_counter() + 10 * HANGS)
    rows = [
        json.loads(line)
        for job in range(jobs)
        for line in (runner.folder / f"outcomes-{job}").read_text("utf-8").splitlines()
    ]
    return [Outcome(what, tuple(kills), tuple(wrong)) for _, what, kills, wrong in sorted(rows)]


def stretches(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, int, Outcome]]:
    """(what, kills, the first of them) of each stretch of kills that ended alike."""
    for _, alike in itertools.groupby(outcomes, lambda o: (o.what.split(":")[0], o.kills, o.wrong)):
        first, *others = alike
        last = f" … {others[-1].what.partition(': ')[2]}" if others else ""
        yield first.what + last, len(first.kills) * (1 + len(others)), first


def show(console: Console, title: str, outcomes: Sequence[Outcome], seconds: float) -> bool:
    """Print a table; True when nothing was lost."""
    table = Table("killed", "kills", "at step → resumed from", "equal", title=title)
    for what, kills, outcome in stretches(outcomes):
        verdict = "[red]no: " + ", ".join(outcome.wrong) if outcome.wrong else "yes"
        table.add_row(what, str(kills), ", ".join(outcome.kills), verdict)
    console.print(table)
    kills, equal = sum(len(o.kills) for o in outcomes), sum(not o.wrong for o in outcomes)
    console.print(
        f"{title}: {kills} kills, {equal} of {len(outcomes)} runs equal to the one nobody touched, {seconds:.0f} s"
    )
    return equal == len(outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="kills at random moments (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument(
        "--quick", action="store_true", help="a shorter run, and the writes of one going on only"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at a time")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=150 if not sys.stdout.isatty() else None, soft_wrap=False)
    model = saekit.load_model("tiny", dtype="float32", device="cpu")
    shm = Path("/dev/shm")  # where there is one, no disk has to wait for the fsyncs
    good = True
    if options.quick:
        from matplotlib.figure import Figure

        from saekit.training.report import panels

        Figure.savefig = sketch  # type: ignore[assignment]
        panels.svg = lambda *_: ""  # no calls of its own: the page is written with them in it
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        folder = Path(name).resolve()
        recipe = make_recipe(folder, options.d_sae, steps=2, batch_size=64, checkpoint_every=1)
        saekit.train(
            recipe, model=model, runs=folder / "warm"
        )  # what is imported late is there before the forks
        gc.collect()
        gc.freeze()  # their collections leave the pages of what is loaded shared
        start = time.perf_counter()
        steps, batch_size = (STEPS // 3, 64) if options.quick else (STEPS, 256)
        recipe = make_recipe(folder, options.d_sae, steps, batch_size, checkpoint_every=4)
        outcomes = at_moments(Runner(model, recipe, folder), options.kills, random.Random(options.seed))
        good &= show(console, "random moments", outcomes, time.perf_counter() - start)
        start = time.perf_counter()
        recipe = make_recipe(folder, options.d_sae, LATER, batch_size=64, checkpoint_every=2)
        outcomes = at_writes(Runner(model, recipe, folder), options.jobs, options.quick)
        good &= show(console, "every write", outcomes, time.perf_counter() - start)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
