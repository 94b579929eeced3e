"""Exact checkpoints: a folder that is whole or not there, the newest one that is, and one writer at a time.

    run/step-1200/  state.safetensors · state.json · manifest.json (SHA-256 of the others, written last)
                    shard-*.safetensors instead of the first, where processes share the latents: each wrote its own
    run/.lock       held while a process writes the run (`locks.exclusive`), with its pid; gone when it is done

A checkpoint is built beside its place, made durable and renamed (`files.staged`), so a kill at any moment
leaves those before it untouched. Old ones are pruned only after the new one is in place and durable. Either kind goes on
in any number of processes: shards are written and read by torch.distributed.checkpoint, as slices of whole tensors.
"""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput, first_line
from saekit.files import (
    LEFTOVER,
    clear_leftovers,
    read_json,
    read_tensors,
    remove,
    sha256_of_file,
    staged,
    write_json,
    write_tensors,
)
from saekit.locks import LOCK, exclusive
from saekit.sae.ranks import ALONE, Ranks

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
SHARD = re.compile(r"shard-[0-9]+-[A-Za-z0-9.-]+\.safetensors")
STEP = re.compile("step-(0|[1-9][0-9]*)")
SETTLED = 2.0  # seconds after which a change to a file is sure to change its time stamp
Report = Callable[[str], None]
Axis = Callable[
    [str, Tensor], int | None
]  # along which a tensor of that name is shared by processes; None: not at all


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    *,
    ranks: Ranks = ALONE,
    axis: Axis = lambda *_: None,
) -> Path:
    """Write `run/step-<step>`, then prune.

    ranks: of processes that train together all call this, the first writes, and where they share the latents each writes
    its own blocks of the tensors, along `axis`.

    What is kept: the newest `keep` checkpoints up to this one (at least this one). The others go, earlier ones and
    later ones: a run goes on from its newest whole checkpoint, so a later one is damaged and was passed over.
    Pruning waits until the new one is durable, so the disk holds up to `keep + 1` for a moment; what cannot
    be removed is no reason to end a run, and is tried again the next time.

    Raises `InvalidInput` where it cannot be written (no space left, say): no part of it is left, and those
    before it are untouched.
    """
    folder = run / f"step-{step}"
    try:
        with contextlib.ExitStack() as stack:
            building = Path(ranks.first(lambda: str(stack.enter_context(staged(folder)))))
            if ranks.latents.size > 1:
                _write_shards(building, tensors, ranks, axis)

            def finish() -> None:
                if ranks.latents.size == 1:
                    write_tensors(building / TENSORS, tensors)
                write_json(building / STATE, state)
                write_json(
                    building / MANIFEST, {p.name: sha256_of_file(p) for p in sorted(building.iterdir())}
                )
                stack.close()
                _prune(run, step, keep)

            ranks.first(finish)
    except OSError as error:
        raise InvalidInput(
            f"checkpoint {folder}: could not be written ({first_line(error)}); earlier ones are whole. "
            "Make room or choose another disk, then resume"
        ) from error
    return folder


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks, axis: Axis) -> None:
    """Each process's blocks, a file each, safetensors. Raises OSError on all of them where one cannot write."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save_shards(_distributed(tensors, ranks, axis), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(first_line(next(iter(error.failures.values()))[0])) from error


def _distributed(tensors: Mapping[str, Tensor], ranks: Ranks, axis: Axis) -> dict[str, Any]:
    """Blocks as the whole tensors that they are slices of: DTensors over contiguous memory on the CPU."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    found = {}
    for name, tensor in tensors.items():
        along = axis(name, tensor)
        placements = [Replicate(), Replicate() if along is None else Shard(along)]
        found[name] = DTensor.from_local(
            tensor.detach().cpu().contiguous(), ranks.mesh, placements, run_check=False
        )
    return found


def _prune(run: Path, step: int, keep: int) -> None:
    kept = [path for path in _folders(run) if _step(path) <= step][-max(1, keep) :]
    for path in _folders(run):
        if path not in kept:
            with contextlib.suppress(OSError):
                remove(path)


def newest(run: Path, report: Report | None = None) -> Path | None:
    """The newest whole checkpoint of a run. report: gets one line for each damaged one that is passed over."""
    for folder in reversed(_folders(run)):
        problem = _problem(folder)
        if problem is None:
            return folder
        if report:
            report(f"passed over a damaged checkpoint, {folder}: {problem}")
    return None


def load(
    folder: Path, *, ranks: Ranks = ALONE, axis: Axis = lambda *_: None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint whose sums are right; those that `newest` has just found right are not read twice.

    Whoever wrote it, in however many processes: each gets its block of what has an `axis`, and all of the rest.
    """
    if (problem := ranks.first(lambda: _problem(folder))) is not None:
        raise InvalidInput(
            f"checkpoint {folder}: files are missing or differ from its manifest ({problem}); "
            "remove the folder, and a resume takes the one before it"
        )
    state = read_json(folder / STATE)
    if ranks.latents.size == 1 and (folder / TENSORS).exists():
        return read_tensors(folder / TENSORS, finite=False), state
    return _read_blocks(folder, ranks, axis), state


def _read_blocks(folder: Path, ranks: Ranks, axis: Axis) -> dict[str, Tensor]:
    """This process's blocks of tensors that lie in one file or in shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    about = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    blocks: dict[str, Any] = {}
    for name, one in about.items():
        assert isinstance(one, TensorStorageMetadata)  # safetensors hold nothing else
        shape, along = list(one.size), axis(name, torch.empty(one.size, device="meta"))
        if along is not None:
            shape[along] //= ranks.latents.size
        blocks[name] = torch.empty(shape, dtype=one.properties.dtype)
    if ranks.latents.size == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it reads alone, as it was told to
            load_shards(blocks, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    else:
        load_shards(_distributed(blocks, ranks, axis), storage_reader=HuggingFaceStorageReader(str(folder)))
    return blocks


def _folders(run: Path) -> list[Path]:
    """The run's checkpoints by step, whole or not."""
    return sorted((path for path in run.glob("step-*") if STEP.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# Checkpoints found whole in this process, by what `stat` said of their files: they may be gigabytes.
_whole: dict[Path, tuple[tuple[int, ...], ...]] = {}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None for a whole one."""
    try:
        shards = sorted(path.name for path in folder.iterdir() if SHARD.fullmatch(path.name))
        names = (*(shards or [TENSORS]), STATE)
        before = [(folder / name).stat() for name in (*names, MANIFEST)]
        signature = tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in before)
        if _whole.get(folder) == signature:
            return None
        sums = read_json(folder / MANIFEST)
        if sums.keys() - {*names}:
            return f"{MANIFEST} lists {min(sums.keys() - {*names})!r:.80}, which is not there"
        for name in names:
            if sums.get(name) != sha256_of_file(folder / name):
                return f"{name} differs from {MANIFEST}"
    except (OSError, InvalidInput) as error:
        return first_line(error)
    if time.time() - max(s.st_ctime for s in before) > SETTLED:
        _whole[folder] = signature
    return None


def check_new(run: Path) -> None:
    """Raises `InvalidInput` where a run was begun before."""
    if run.exists() and any(entry.name != LOCK for entry in run.iterdir()):
        raise InvalidInput(
            f"run {run} exists: resume it (--resume), choose another name, or remove the folder"
        )


@contextlib.contextmanager
def disk_errors_told(run: Path) -> Iterator[None]:
    """A disk that is full or fails under a run's rows or its `final` is one clear error: the checkpoints are whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            raise
        raise InvalidInput(
            f"run {run}: could not be written ({first_line(error)}); its checkpoints are whole. Make room, then go on with "
            "--resume"
        ) from error


def clean(run: Path) -> None:
    """Remove what killed processes left in the run folder and one level down; call it inside `exclusive`.

    A folder that was being replaced when its process died (`final.old-<pid>` without `final`) is put back: it is
    whole, and the new one is made again from the checkpoint before it, which is what makes a run finished.
    """
    clear_leftovers(run)
    for folder in _subfolders(run):
        clear_leftovers(folder)


def _subfolders(run: Path) -> list[Path]:
    return [path for path in run.iterdir() if path.is_dir() and not path.is_symlink()]


def settle(run: Path, keep: int) -> None:
    """Tidy a run whose last checkpoint is in place, if a kill right after that left something to tidy."""
    folders = [run, *_subfolders(run)]
    leftovers = any(LEFTOVER.fullmatch(path.name) for folder in folders for path in folder.iterdir())
    if leftovers or (run / LOCK).exists() or len(_folders(run)) > keep:
        with exclusive(run):
            clean(run)
            if (last := newest(run)) is not None:
                _prune(run, _step(last), keep)


def check_origin(then: Mapping[str, str], now: Mapping[str, str], where: Path | str) -> None:
    """Refuse to go on from what another model, text or program made: the steps to come would not be the same bits.

    then, now: what the checkpoint was made of and what is there, by kind (`torch`, `transformer_lens`, `saekit` …:
    versions; `model`, `tokenizer`, `text`: fingerprints). where: the checkpoint.
    Raises `InvalidInput` that lists every difference with its remedy.
    """
    wrong = [
        f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}: {_remedy(key, then.get(key))}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    if wrong:
        raise InvalidInput(
            f"{where} cannot be resumed exactly: " + "; ".join(wrong) + "; or start a run with another name"
        )


def _short(value: str | None) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:12]}…" if re.fullmatch("[0-9a-f]{16,}", value) else value


def _remedy(key: str, then: str | None) -> str:
    what = {
        "model": "load the model it was started with",
        "tokenizer": "load the tokenizer it was started with",
        "text": "put the text back as it was",
    }
    return what.get(key, f"install {key} {then}" if then else "go on with what it was started with")


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
