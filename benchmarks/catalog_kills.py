"""Kills catalog builds and looks whether anything is lost: `python -m benchmarks.catalog_kills [--kills 10] [--seed 0]`.

Catalogs of two SAEs, built over older ones on the embedded model, are killed with SIGKILL and started again, in two ways:

    moments   at random moments of the build's wall time, its start and its end included; again until it is done
    writes    right before a system call that changes its folders (open, write, fsync, rename, remove, lock …), one
              after the other (`--every n`: each n-th of them), from the start to the end

Each has to end with every file byte-equal to that of a build nobody touched, and with no other file beside. While none is
done, the older catalogs are there, whole. The state is saved as often as it can be. Prints a table; exit code 1 if
anything differs. One process loads everything and forks the builds. Needs `fork`: not Windows.
"""

from __future__ import annotations

from benchmarks.kills import HANGS, Call, Failed, contents, die, differences, ended, sentences, watch  # isort: skip  (sets OMP_NUM_THREADS before torch comes)

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from saekit import SAE, load_model, tokenize
from saekit.catalog import build as building
from saekit.tokens import Tokens

SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")


@dataclass(frozen=True)
class Builder:
    """Forks processes that build, or go on building, the catalogs in `<folder>/catalogs`."""

    model: Any
    saes: Sequence[SAE]
    tokens: Tokens
    folder: Path

    def at(self, name: str) -> Builder:
        return Builder(self.model, self.saes, self.tokens, self.folder.parent / name)

    def build(self, tokens: Tokens | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        building.build(self.model, self.saes, tokens or self.tokens, self.folder / "catalogs", window=16)

    def start(self, arm: Callable[[], None] = lambda: None) -> int:
        """The pid of a process that builds to the end. arm: called in it first."""
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            building.SAVE_EVERY, building.SAVING_TAKES = 0.0, 0.5
            arm()
            self.build()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def finish(self, arm: Callable[[], None] = lambda: None) -> bool:
        """Build; True when it came to its end, False when it was killed."""
        return ended(self.start(arm), time.perf_counter() + HANGS)


Files = dict[str, bytes | None]


def torn(builder: Builder, old: Files, new: Files) -> bool:
    """Whether a catalog is neither the old one nor the new one. (Between two renames it is in the working folder.)"""
    names = {name for name, content in new.items() if content is not None}
    for site in SITES:
        own = {name for name in names if name.startswith(f"catalogs/{site}/")}
        found = {name: content for name, content in contents(builder.folder).items() if name in own}
        if found and found not in ({name: old[name] for name in own}, {name: new[name] for name in own}):
            return True
    return False


def at_moments(builder: Builder, kills: int, draw: random.Random, old: Files, new: Files) -> list[str]:
    """Kill at random moments until `kills` have happened, in as many builds as that takes; returns what went wrong."""
    untouched, wrong, number = builder.at("timed"), [], 0
    shutil.copytree(builder.at("older").folder, untouched.folder)
    start = time.perf_counter()
    untouched.finish()
    seconds = time.perf_counter() - start
    while kills > 0:
        one = builder.at(f"moments-{number}")
        shutil.copytree(builder.at("older").folder, one.folder)
        number += 1
        while True:
            moment = draw.uniform(0, seconds) if kills > 0 else HANGS
            if ended(one.start(), time.perf_counter() + moment):
                break
            kills -= 1
            if torn(one, old, new):
                wrong.append(f"a catalog was torn by a kill after {moment:.3f} s")
        wrong += differences(one.folder, new)
        shutil.rmtree(one.folder)
    return wrong


def at_writes(builder: Builder, every: int, old: Files, new: Files) -> tuple[int, list[str]]:
    """(kills, what went wrong) of builds that are killed before a call each, and started again."""
    wrong: list[str] = []
    number = 1
    while True:
        one = builder.at(f"writes-{number}")
        shutil.copytree(builder.at("older").folder, one.folder)

        def at(count: int, call: Call, number: int = number) -> None:
            if count == number:
                die()

        if one.finish(lambda one=one, at=at: watch(one.folder, at)):  # type: ignore[misc]
            return number // every, wrong
        if torn(one, old, new):
            wrong.append(f"a catalog was torn by a kill before call {number}")
        one.finish()
        wrong += [f"call {number}: {difference}" for difference in differences(one.folder, new)]
        shutil.rmtree(one.folder)
        number += every


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.catalog_kills", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--kills", type=int, default=10, help="kills at random moments (default: 10)")
    parser.add_argument("--every", type=int, default=1, help="kill before each n-th call (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, good = Console(highlight=False), True
    model = load_model("tiny", dtype="float32", device="cpu")
    saes = [SAE.new("topk", d_in=256, d_sae=32, k=4, site=site, seed=seed) for seed, site in enumerate(SITES)]
    texts = [tokenize([*sentences(n, random.Random(n))], model, 32) for n in (5, 20)]
    with tempfile.TemporaryDirectory() as name:
        builder = Builder(model, saes, texts[1], Path(name).resolve() / "older")
        builder.build(texts[0])
        untouched = builder.at("untouched")
        untouched.build()
        old, new = contents(builder.folder), contents(untouched.folder)
        gc.collect()
        gc.freeze()  # their collections leave the pages of what is loaded shared
        for title in ("random moments", "writes"):
            start, kills = time.perf_counter(), options.kills
            wrong: list[str]
            try:
                if title == "writes":
                    kills, wrong = at_writes(builder, options.every, old, new)
                else:
                    wrong = at_moments(builder, kills, random.Random(options.seed), old, new)
            except Failed:
                wrong = ["a build that was started again ended with an error, printed above"]
            good &= not wrong
            verdict = "; ".join(wrong) or "every file equal to those of a build nobody touched"
            console.print(f"{title}: {kills} kills, {verdict}, {time.perf_counter() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
