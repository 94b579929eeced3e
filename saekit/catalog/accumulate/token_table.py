"""Count and summed activation per (latent, token id), for explaining and other documents apart; exact.

Entries are sorted by latent · 2V + 2 · token id + explaining. What is pending is merged in memory; when that is too much, it goes to a
file as a sorted run, and every FAN runs of one level are merged into one of the next. The tables at the end read all runs
side by side, a range of latents at a time.

S d_sae, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import Batch
from saekit.catalog.accumulate.grouping import Ints, group, rank_in_group, starts_of
from saekit.catalog.accumulate.spill import Spill
from saekit.errors import InvalidInput

PENDING = 1 << 18  # entries held in memory, and merged from files at once
FAN = 16
KEY, SUM, COUNT = 0, 1, 2  # columns of entries [n, 3], int64


class Ranked(NamedTuple):
    """Tokens of latents, best first; sorted by latent and rank."""

    feature: Ints
    rank: Ints
    token_id: Ints
    count: Ints  # type: ignore[assignment]  # the column's name, which tuples have a method of
    value: NDArray[np.float64]  # mean activation of `tokens_top`, expected activation of `evidence_top`
    sum: NDArray[np.float64]  # of the activations counted


class TokenTable:
    """About PENDING entries (24 bytes each) are in memory at once, or one latent's where these are more."""

    def __init__(self, d_sae: int, vocabulary: int, folder: Path) -> None:
        self._S, self._V = d_sae, vocabulary
        self.occurrences = np.zeros(vocabulary, np.int64)  # [V] of each token in explaining documents
        self._spill = Spill(folder, "tokens")
        self._level: dict[Path, int] = {}
        self._held: list[Ints] = []  # in any order
        self._n = 0

    def add(self, batch: Batch) -> None:
        seen = batch.explaining & ~batch.special
        np.add.at(self.occurrences, batch.ids[seen], 1)
        entries = np.empty((len(batch.latents), 3), np.int64)
        pairs = batch.latents * np.int64(self._V) + batch.ids.ravel()[batch.tokens]
        entries[:, KEY] = 2 * pairs + batch.explaining.ravel()[batch.tokens]
        entries[:, SUM], entries[:, COUNT] = batch.fixed, 1
        self._hold(entries)

    def _hold(self, entries: Ints) -> None:
        if len(entries) == 0:
            return
        self._held.append(entries)
        self._n += len(entries)
        if self._n >= PENDING:
            self._settle()

    def _united(self, entries: Ints) -> Ints:
        """Sorted by key, equal keys as one."""
        wide = 2 * self._V
        latents = entries[:, KEY] // wide
        order, _ = group(entries[:, KEY] - latents * wide, wide)
        latents = latents[order]
        first = int(latents.min())
        within, _ = group(latents - first, int(latents.max()) - first + 1)
        entries = entries[order[within]]
        starts = starts_of(entries[:, KEY])
        united = np.empty((len(starts), 3), np.int64)
        united[:, KEY] = entries[starts, KEY]
        for column in (SUM, COUNT):
            united[:, column] = np.add.reduceat(entries[:, column], starts)
        return united

    def _unite(self) -> None:
        """What is held as one sorted run."""
        if self._n:
            held, self._held = self._held, []
            together = np.concatenate(held)
            del held
            self._held = [self._united(together)]
            self._n = len(self._held[0])

    def _settle(self) -> None:
        """Merge what is held; put it into a file when that did not help much."""
        self._unite()
        if self._n < PENDING // 2:
            return
        entries, self._held, self._n = self._held[0], [], 0
        path = self._spill.new()
        entries.tofile(path)
        self._level[path] = 0
        self._cascade()

    def _cascade(self) -> None:
        """FAN runs of one level become one of the next, so that runs stay few and repeat little."""
        level = 0
        while len(peers := [path for path in self._spill.files if self._level[path] == level]) >= FAN:
            target = self._spill.new()
            with target.open("wb") as file:
                for entries in self._ranges(peers, []):
                    file.write(entries.tobytes())
            self._spill.drop(peers)
            self._level = {p: n for p, n in self._level.items() if p not in peers} | {target: level + 1}
            level += 1

    def _ranges(self, files: list[Path], held: list[Ints]) -> Iterator[Ints]:
        """The union of sorted runs, in pieces of whole latents and about PENDING entries."""
        runs: list[_Run | Ints] = [*(_Run(path) for path in files), *held]
        if not runs:
            return
        borders = np.arange(self._S + 1) * np.int64(2 * self._V)
        below = np.stack([_below(run, borders) for run in runs])  # entries of each below each latent
        total = below.sum(0)
        first = 0
        while first < self._S:
            last = max(first + 1, int(np.searchsorted(total, total[first] + PENDING, "right")) - 1)
            entries = np.concatenate([run[b[first] : b[last]] for run, b in zip(runs, below, strict=True)])
            first = last
            if len(entries):
                yield self._united(entries)

    def _everything(self) -> Iterator[Ints]:
        self._unite()
        return self._ranges(self._spill.files, self._held)

    def tokens_top(self, per_latent: int, at_least: int) -> Ranked:
        """The tokens of the highest mean activation, over all documents, among those with `at_least` firings.

        One firing says little about a token. Equal means: the lower token id first.
        """
        return _joined(
            self._best(entries, per_latent, at_least=at_least, only_explaining=False)
            for entries in self._everything()
        )

    def evidence_top(self, per_latent: int) -> Ranked:
        """The tokens of the largest summed activation in explaining documents; value: sum / occurrences of the token there."""
        return _joined(
            self._best(entries, per_latent, at_least=1, only_explaining=True)
            for entries in self._everything()
        )

    def _best(self, entries: Ints, per_latent: int, *, at_least: int, only_explaining: bool) -> Ranked:
        if only_explaining:
            entries = entries[entries[:, KEY] % 2 == 1]
        pairs = entries[:, KEY] // 2
        starts = starts_of(pairs)
        if len(starts) == 0:
            return _nothing()
        counts = np.add.reduceat(entries[:, COUNT], starts)
        sums = np.add.reduceat(entries[:, SUM], starts) / 2**24
        enough = counts >= at_least
        pairs, counts, sums = pairs[starts][enough], counts[enough], sums[enough]
        latents, ids = pairs // self._V, pairs % self._V
        values = sums / (self.occurrences[ids] if only_explaining else counts)
        order = np.lexsort((ids, -(sums if only_explaining else values), latents))
        ranks = rank_in_group(latents[order])
        order, ranks = order[ranks < per_latent], ranks[ranks < per_latent]
        return Ranked(latents[order], ranks, ids[order], counts[order], values[order], sums[order])

    def merge(self, other: TokenTable) -> None:
        self.occurrences += other.occurrences
        for mine, theirs in zip(self._spill.take(other._spill.files), other._spill.files, strict=True):
            self._level[mine] = other._level[theirs]
        self._cascade()
        for entries in other._held:
            self._hold(entries)

    def save(self, folder: Path) -> tuple[dict[str, NDArray], list[list[int | str]]]:
        """(arrays, [[file, level] …]); the files are put into the folder."""
        self._spill.share(folder)
        held = np.concatenate([np.zeros((0, 3), np.int64), *self._held])
        return (
            {"occurrences": self.occurrences, "held": held},
            [[path.name, self._level[path]] for path in self._spill.files],
        )

    def restore(self, arrays: dict[str, NDArray], saved: Path, files: list[list[int | str]]) -> None:
        self.occurrences = arrays["occurrences"]
        self._hold(arrays["held"])
        for path, (_, level) in zip(self._spill.take(saved / str(n) for n, _ in files), files, strict=True):
            self._level[path] = int(level)


class _Run:
    """A run in a file; slices are read. (Mapped, its pages would stay in memory.)"""

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().st_size
        if size == 0 or size % 24:
            raise InvalidInput(
                f"{path}: {size:,} bytes are no whole entries of a token table; the state is damaged"
            )
        self._n = size // 24

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, some: slice) -> Ints:
        first, last, _ = some.indices(self._n)
        return np.fromfile(self._path, np.int64, 3 * (last - first), offset=24 * first).reshape(-1, 3)


def _below(run: _Run | Ints, borders: Ints) -> Ints:
    """How many entries have keys below each border."""
    pieces = (run[i : i + PENDING][:, KEY] for i in range(0, len(run), PENDING))
    below = np.zeros(len(borders), np.int64)
    for keys in pieces:
        below += np.searchsorted(keys, borders)
    return below


def _nothing() -> Ranked:
    none, zero = np.zeros(0, np.int64), np.zeros(0)
    return Ranked(none, none, none, none, zero, zero)


def _joined(parts: Iterator[Ranked]) -> Ranked:
    return Ranked(*(np.concatenate(columns) for columns in zip(*[_nothing(), *parts], strict=True)))
