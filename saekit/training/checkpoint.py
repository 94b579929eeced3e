"""Exact checkpoints: a folder that is whole or not there, and the newest one that is.

    run/step-1200/  state.safetensors · state.json · manifest.json (SHA-256 of the others, written last)

The folder is built beside its place, made durable and renamed (`files.staged`), so a kill at any moment
leaves the checkpoints before it untouched. Old ones are pruned only after the new one is in place.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from saekit.errors import InvalidInput
from saekit.files import read_json, read_tensors, sha256_of_file, staged, write_json, write_tensors

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write `run/step-<step>` and keep the newest `keep` checkpoints."""
    folder = run / f"step-{step}"
    try:
        with staged(folder) as building:
            write_tensors(building / TENSORS, tensors)
            write_json(building / STATE, state)
            sums = {name: sha256_of_file(building / name) for name in (TENSORS, STATE)}
            write_json(building / MANIFEST, sums)
    except OSError as error:
        raise InvalidInput(
            f"checkpoint {folder}: could not be written ({error}); earlier ones are whole"
        ) from error
    for old in _folders(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over."""
    return next((folder for folder in reversed(_folders(run)) if _is_whole(folder)), None)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint whose sums are right."""
    if not _is_whole(folder):
        raise InvalidInput(f"checkpoint {folder}: files are missing or differ from its manifest")
    return read_tensors(folder / TENSORS, finite=False), read_json(folder / STATE)


def _folders(run: Path) -> list[Path]:
    numbered = [
        (int(path.name.removeprefix("step-")), path)
        for path in run.glob("step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return [path for _, path in sorted(numbered)]


def _is_whole(folder: Path) -> bool:
    try:
        sums = read_json(folder / MANIFEST)
        return all(sha256_of_file(folder / name) == sums[name] for name in (TENSORS, STATE))
    except (OSError, InvalidInput, KeyError):
        return False


class StopFlag:
    """Whether a signal has asked the run to end at the next step boundary."""

    asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM only set a flag, so that the state saved is that of a whole step."""
    flag = StopFlag()
    try:
        before = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
