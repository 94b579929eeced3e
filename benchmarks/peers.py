"""An environment of their own for the libraries that saekit is measured against: `python -m benchmarks.peers`.

`.venv-peers`, beside the `.venv` that `make test` makes and as pinned as that one. Made once: what was installed is
noted in it, and only what is missing or pinned otherwise is installed again. A library that cannot be installed is
reported with pip's reason and leaves the others alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from saekit.files import read_json, replace_text

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-peers"
PYTHON = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = FOLDER / "installed.json"


class Package(NamedTuple):
    """What pip is told, in this order. `alone`: without the dependencies it asks for, and with those it needs here."""

    peer: str
    requirements: tuple[str, ...]
    alone: bool = False
    needs: tuple[str, ...] = ()


PACKAGES = (
    Package("torch", ("torch==2.13.0",)),  # first: what is asked for later finds it there
    Package("SAELens", ("sae-lens==6.54.12",)),
    # Asks for nnsight and an interpretability stack around it; its trainers need none of them (nnsight is stood in for).
    Package("dictionary_learning", ("dictionary-learning==0.1.0",), alone=True),
    Package(
        "sparsify", ("eai-sparsify==1.3.3",), alone=True, needs=("natsort==8.4.0", "schedulefree==1.4.1")
    ),
    # Asks for versions of transformers, datasets and TransformerLens older than SAELens 6.54 takes, and runs on these.
    Package(
        "SAEDashboard",
        ("sae-dashboard==0.8.0",),
        alone=True,
        needs=("eindex-callum==0.1.2", "dataclasses-json==0.6.7", "matplotlib"),
    ),
    # Asks for an older numpy.
    Package("repeng", ("repeng==0.4.0",), alone=True, needs=("scikit-learn==1.9.1", "gguf==0.19.0")),
)


def prepare() -> dict[str, str]:
    """Make the environment ready → {peer: why it is missing}, empty when all are there."""
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
        (FOLDER / ".gitignore").write_text("*\n", "utf-8")
    installed = read_json(STAMP) if STAMP.exists() else {}
    missing: dict[str, str] = {}
    for package in PACKAGES:
        pins = [*package.requirements, *package.needs]
        if installed.get(package.peer) == pins:
            continue
        print(f"installing {package.peer} into {FOLDER.name} …", flush=True)
        if why := _install(package):
            missing[package.peer] = why
            continue
        installed[package.peer] = pins
        replace_text(STAMP, json.dumps(installed, indent=2) + "\n")
    if "torch" in missing:
        return {package.peer: missing["torch"] for package in PACKAGES if package.peer != "torch"}
    return missing


def _install(package: Package) -> str | None:
    """None, or the last line of what pip said."""
    pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    calls = [[*pip, *(["--no-deps"] if package.alone else constraints), *package.requirements]]
    if package.needs:
        calls.append([*pip, *constraints, *package.needs])
    for call in calls:
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            return lines[-1] if lines else f"pip ended with {done.returncode}"
    return None


if __name__ == "__main__":
    for peer, why in prepare().items():
        print(f"{peer}: not installed: {why}")
