"""The kill harness of catalog builds, shortened: SIGKILL at five random moments, and before some of the calls that write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_kill_loses_anything() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.catalog_kills", "--kills", "5", "--every", "29"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random moments: 5 kills, every file equal" in done.stdout
    (kills,) = map(int, re.findall(r"writes: (\d+) kills, every file equal", done.stdout))
    assert kills >= 5
