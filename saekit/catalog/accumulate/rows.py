"""The corpus rows themselves: their token ids and documents, and all that fired on a few of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import Batch, Floats
from saekit.catalog.accumulate.grouping import Ints
from saekit.catalog.accumulate.spill import Spill
from saekit.catalog.draws import draw
from saekit.files import read_tensors, write_tensors

HELD = 1 << 19  # tokens in memory, and in one file


class Corpus(NamedTuple):
    """Some rows, ascending."""

    rows: Ints  # [n] of the stream
    ids: Ints  # [n, T]
    documents: Ints  # [n, T]


class SeenRows:
    """Every row that went by, in files of about HELD tokens: any of them may be referred to at the end."""

    def __init__(self, folder: Path) -> None:
        self._spill = Spill(folder, "rows")
        self._held: list[Corpus] = []
        self._tokens = 0

    def add(self, batch: Batch) -> None:
        self._take(Corpus(batch.rows, batch.ids, batch.documents))

    def _take(self, rows: Corpus) -> None:
        self._held.append(rows)
        self._tokens += rows.ids.size
        if self._tokens >= HELD:
            tensors = {name: torch.from_numpy(values) for name, values in self._pending().items()}
            write_tensors(self._spill.new(), tensors)
            self._held, self._tokens = [], 0

    def _pending(self) -> dict[str, NDArray]:
        if not self._held:
            return {}
        columns = zip(*self._held, strict=True)
        return {name: np.concatenate(column) for name, column in zip(Corpus._fields, columns, strict=True)}

    def some(self, wanted: Ints) -> Corpus:
        """The rows of these numbers (ascending), which went by."""
        found = []
        for part in (*(_read(path) for path in self._spill.files), *self._held):
            here = np.isin(part.rows, wanted)
            found.append(Corpus(*(column[here] for column in part)))
        rows, ids, documents = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.argsort(rows)
        return Corpus(rows[order], ids[order], documents[order])

    def merge(self, other: SeenRows) -> None:
        self._spill.take(other._spill.files)
        for rows in other._held:
            self._take(rows)

    def save(self, folder: Path) -> tuple[dict[str, NDArray], list[str]]:
        """(arrays, files); the files are put into the folder."""
        return self._pending(), self._spill.share(folder)

    def restore(self, arrays: dict[str, NDArray], saved: Path, files: list[str]) -> None:
        self._spill.take(saved / name for name in files)
        if arrays:
            self._take(Corpus(**arrays))


def _read(path: Path) -> Corpus:
    tensors = read_tensors(path)
    return Corpus(*(tensors[name].numpy() for name in Corpus._fields))


class Sample(NamedTuple):
    """All activations at evaluated positions of the rows sampled, sorted by feature, row and position."""

    rows: Ints  # [n] of the stream, ascending
    feature: Ints  # [k]
    row: Ints  # [k]
    position: Ints  # [k]
    activation: Floats  # [k]


class SampledRows:
    """The n rows of lowest draw with all that fired on them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._fired: dict[int, tuple[Ints, Ints, Floats]] = {}  # row → latents, positions, values

    def add(self, batch: Batch) -> None:
        lowest = self._lowest([*self._fired, *batch.rows.tolist()])
        T = batch.context_size
        wanted = np.isin(batch.rows, lowest)
        some = np.flatnonzero(np.repeat(wanted, T)[batch.tokens])
        latents, tokens, values = batch.latents[some], batch.tokens[some], batch.values[some]
        for i in np.flatnonzero(wanted):
            here = tokens // T == i
            self._fired[int(batch.rows[i])] = (latents[here], tokens[here] % T, values[here])
        self._only(lowest)

    def _lowest(self, rows: list[int]) -> list[int]:
        draws = draw(np.array(rows, np.int64))
        return [rows[i] for i in np.argsort(draws)[: self.n]]

    def _only(self, rows: list[int]) -> None:
        self._fired = {row: self._fired[row] for row in rows}

    def merge(self, other: SampledRows) -> None:
        self._fired |= other._fired
        self._only(self._lowest([*self._fired]))

    def result(self) -> Sample:
        rows = sorted(self._fired)
        columns = [
            np.concatenate([np.zeros(0, kind), *(self._fired[row][i] for row in rows)])
            for i, kind in enumerate((np.int32, np.int32, np.float32))
        ]
        latents, positions, values = columns
        row = np.repeat(np.array(rows, np.int64), [len(self._fired[r][0]) for r in rows])
        order = np.lexsort((positions, row, latents))
        return Sample(np.array(rows, np.int64), latents[order], row[order], positions[order], values[order])

    def arrays(self) -> dict[str, NDArray]:
        return self.result()._asdict()

    def restore(self, arrays: dict[str, NDArray]) -> None:
        for row in arrays["rows"].tolist():
            here = arrays["row"] == row
            self._fired[row] = (
                arrays["feature"][here], arrays["position"][here], arrays["activation"][here]
            )  # fmt: skip
