"""Activations on disk: what one run paid the language model for, later runs and sweeps read.

    folder/cache.json                    what the rows are of: model, sites, context size, first tokens …
           shard-0-000000.safetensors    site → [rows, D] bf16; its forwards and SHA-256 sums in the header
           .lock-0                       held by the process that writes

A forward (some contexts, one call of the model) is known by a digest of its token ids, so rows can only ever be those
of the ids that are asked for: an edited text, or another order, is a miss and not a wrong answer. Forwards are written
as a stream asks for them, special tokens dropped, in that order and in every epoch anew, since contexts are cut and
shuffled differently in each. A shard appears whole or not at all, so what a killed process leaves is a cache of fewer
forwards, and the next run goes on with it.

The writer holds one shard in memory (`SHARD_BYTES`); rows are read from memory-mapped files, and each tensor's sum is
checked once per opening, when it is first needed. Processes that share a stream (`share`) write shards of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import InvalidInput, first_line
from saekit.files import read_json, read_metadata, replace_text, replacing, write_tensors
from saekit.locks import LOCK, exclusive

Rows = dict[str, Tensor]  # by site, [n, D]
Tell = Callable[[str], None]

FORMAT = 1
MANIFEST = "cache.json"
DTYPE = torch.bfloat16
SHARD_BYTES = 64 * 2**20
OURS = (f"{LOCK}-", "shard-", MANIFEST)  # how names in a cache folder begin


class _Place(NamedTuple):
    """Where a forward's rows lie."""

    shard: Path
    at: int
    rows: int


class ActivationCache:
    """An opened cache. Opening reads headers only, says what will be written, and writes nothing.

    folder: where it is, or will be. made_of: what rows depend on besides their ids, by name; equal to that of the cache
    that is there. widths: D by site that is wanted; a cache may hold more sites. rows: how many the stream will ask for;
    a cache that has as many is only read. spare: rows that may be written beyond those, for a ring that is filled ahead.
    writer: number of this process among those that share the stream. tell: gets a line of text.

    Raises `InvalidInput` for a cache that does not fit, naming what differs, for a folder that is something else, for a
    damaged shard, and for a disk without room.
    """

    def __init__(
        self,
        folder: str | Path,
        made_of: Mapping[str, Any],
        widths: Mapping[str, int],
        rows: int,
        *,
        spare: int = 0,
        writer: int = 0,
        tell: Tell = print,
    ) -> None:
        self.folder = Path(folder)
        self._made_of = {"format": FORMAT, **made_of}
        self._wanted = tuple(widths)
        self._writer = writer
        self._tell = tell
        self.widths = self._fitting(widths)  # of the sites it holds
        self._row_bytes = DTYPE.itemsize * sum(self.widths.values())
        self._places: dict[str, _Place] = {}
        self._sums: dict[Path, dict[str, str]] = {}
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            self._index(shard)
        self._checked: set[tuple[Path, str]] = set()
        there = sum(place.rows for place in self._places.values())
        self._room = rows + spare - there if there < rows else 0  # rows that may still be written
        self._announce(there)
        self._shard: Rows = {}
        self._held: list[tuple[str, int]] = []  # digest and rows of the forwards in `_shard`
        self._number = 0
        self._told_full = False

    @property
    def writes(self) -> bool:
        """Whether forwards that are not there will be kept."""
        return self._room > 0

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that a forward has to capture to be kept."""
        return tuple(self.widths)

    def get(self, digest: str) -> Rows | None:
        """A forward's rows at the wanted sites, [n, D] bf16 each, or None. Raises `InvalidInput` for a damaged shard."""
        if (place := self._places.get(digest)) is None:
            return None
        shard, at, rows = place
        try:
            with safe_open(shard, framework="pt") as file:
                for site in self._wanted:
                    self._check(shard, site, file)
                return {site: file.get_slice(site)[at : at + rows] for site in self._wanted}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise _damaged(shard, first_line(error)) from error

    def add(self, digest: str, rows: Rows) -> None:
        """Keep a forward's rows, [n, D] bf16 at each of `sites`, as long as what was announced lasts."""
        n = len(next(iter(rows.values())))
        if self._room < n:
            if not self._told_full:
                self._tell(f"cache {self.folder}: does not hold all of this stream; the rest is not kept")
                self._told_full = True
            return
        self._room -= n
        filled = sum(count for _, count in self._held)
        if self._shard and filled + n > len(next(iter(self._shard.values()))):
            self._write()
            filled = 0
        if not self._shard:
            length = max(n, SHARD_BYTES // self._row_bytes)
            self._shard = {site: torch.empty(length, D, dtype=DTYPE) for site, D in self.widths.items()}
        for site, held in self._shard.items():
            held[filled : filled + n] = rows[site]
        self._held.append((digest, n))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While open, this process is the one that writes; on exit, also by an exception, all whole forwards are kept.

        Raises `InvalidInput` where another process writes the cache.
        """
        if not self.writes:
            yield
            return
        with exclusive(self.folder, self._tell, what="cache", name=f"{LOCK}-{self._writer}"):
            with self._told():
                for leftover in self.folder.glob(f"shard-{self._writer}-*.tmp-*"):  # of a killed process
                    leftover.unlink()
                manifest = self._made_of | {"sites": self.widths}
                replace_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            try:
                yield
            finally:
                self._write()

    def _fitting(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """D by site that the cache holds: those of its manifest, or the wanted ones where there is none yet."""
        if not (self.folder / MANIFEST).exists():
            if self.folder.exists() and any(not path.name.startswith(OURS) for path in _entries(self.folder)):
                raise InvalidInput(f"cache {self.folder}: this folder holds something else; name another one")
            return dict(wanted)
        found = read_json(self.folder / MANIFEST)
        sites = found.pop("sites", None)
        if not isinstance(sites, dict):
            raise InvalidInput(f"{self.folder / MANIFEST}: expected the widths of its sites under 'sites'")
        wrong = [
            f"{key} was {_short(found.get(key))}, is {_short(self._made_of.get(key))}"
            for key in dict.fromkeys([*self._made_of, *found])
            if found.get(key) != self._made_of.get(key)
        ]
        wrong += [f"it has no {site}, only {', '.join(sites)}" for site in wanted if site not in sites]
        if wrong:
            raise InvalidInput(
                f"cache {self.folder} does not fit: {'; '.join(wrong)}. Name another folder, or remove this one"
            )
        return sites

    def _index(self, shard: Path) -> None:
        """Read which forwards a shard holds."""
        try:
            header = read_metadata(shard)
            sums = json.loads(header["sha256"])
            if sums.pop("forwards") != _sum(header["forwards"].encode()):
                raise ValueError("its list of forwards differs from its sum")
            forwards = json.loads(header["forwards"])
        except (InvalidInput, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _damaged(shard, first_line(error)) from error
        at = 0
        for digest, rows in forwards:
            self._places[digest] = _Place(shard, at, rows)
            at += rows
        self._sums[shard] = sums

    def _check(self, shard: Path, site: str, file: Any) -> None:
        if (shard, site) not in self._checked:
            if _sum(_bytes(file.get_tensor(site))) != self._sums[shard].get(site):
                raise _damaged(shard, f"{site} differs from its sum")
            self._checked.add((shard, site))

    def _announce(self, there: int) -> None:
        """Say what is there and what will be written; refuse a disk without room for it."""
        has = f"{_size(there * self._row_bytes)} of activations are there"
        if not self.writes:
            self._tell(f"cache {self.folder}: {has}, nothing will be written")
            return
        needed = self._room * self._row_bytes
        free = shutil.disk_usage(_nearest(self.folder)).free
        if needed > free:
            raise InvalidInput(
                f"cache {self.folder}: up to {_size(needed)} would be written, its disk has {_size(free)} free. "
                "Make room, name another disk, or train on fewer tokens"
            )
        self._tell(
            f"cache {self.folder}: {has}, up to {_size(needed)} will be written ({_size(free)} free on its disk)"
        )

    def _write(self) -> None:
        """Write the shard that is held, if it holds anything: durable, then under its name."""
        forwards, self._held = self._held, []
        tensors, self._shard = self._shard, {}
        if not forwards:
            return
        while (shard := self.folder / f"shard-{self._writer}-{self._number:06d}.safetensors").exists():
            self._number += 1
        filled = sum(rows for _, rows in forwards)
        listed = json.dumps(forwards)
        tensors = {site: held[:filled] for site, held in tensors.items()}
        sums = {site: _sum(_bytes(rows)) for site, rows in tensors.items()} | {
            "forwards": _sum(listed.encode())
        }
        with self._told(), replacing(shard) as building:
            write_tensors(building, tensors, {"forwards": listed, "sha256": json.dumps(sums)})
        self._index(shard)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidInput(
                f"cache {self.folder}: cannot be written ({first_line(error)}); what is there stays whole. "
                "Make room, or name another folder"
            ) from error


def digest_of(ids: Tensor) -> str:
    """What a forward is known by. ids: [N, T] int64 on the CPU."""
    return hashlib.blake2b(_bytes(ids), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory, not copied."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _sum(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _damaged(shard: Path, problem: str) -> InvalidInput:
    return InvalidInput(
        f"cache file {shard} is damaged ({problem}); remove it, and its rows are computed again"
    )


def _entries(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InvalidInput(f"cache {folder}: expected a folder, this is a file")
    return folder.iterdir()


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) >= 32 else text
