"""The kill harness, shortened: SIGKILL at a few random moments and at every stage of writing in one going on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_kill_loses_anything() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--kills", "3", "--quick", "--d-sae", "64"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"random moments: 3 kills, (\d+) of \1 runs equal", done.stdout)
    kills, equal, runs = map(int, re.findall(r"every write: (\d+) kills, (\d+) of (\d+)", done.stdout)[0])
    assert kills == equal == runs
    assert kills > 25
    for stage in (
        "open .lock",
        "final.tmp",
        "remove .lock",
        "within a row of metrics.jsonl",
    ):
        assert stage in done.stdout
    assert " no: " not in done.stdout
