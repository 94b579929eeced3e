"""All that the pass keeps. What it gives depends on the set of units that went by, not on their order, grouping or place.

Units gather until there is enough to do (PENDING firings), then every accumulator takes them as one batch. State is
O(S · contexts); what grows with the corpus (the token table, the rows) goes to files in the state's folder.

S d_sae, T tokens of a row.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import LONGEST, Batch, Unit, check
from saekit.catalog.accumulate.contexts import NUMBERED, ContextLists, Contexts
from saekit.catalog.accumulate.firing import Neighbours, Sketches
from saekit.catalog.accumulate.moments import Moments
from saekit.catalog.accumulate.norms import Norms
from saekit.catalog.accumulate.rows import Corpus, Sample, SampledRows, SeenRows
from saekit.catalog.accumulate.token_table import Ranked, TokenTable
from saekit.errors import InvalidInput
from saekit.files import read_json, read_tensors, write_json, write_tensors

PENDING = 1 << 18  # firings that wait
ARRAYS, ABOUT = "state.safetensors", "state.json"
SINK = 10.0  # times the median norm


class State:
    """See `tables` for what is computed. folder: where the state keeps files of its own; it has to outlive the state.

    contexts: strongest per latent. window: tokens around a peak. bands, per_band: of the active range, contexts drawn of each.
    sample_rows: rows of which everything is kept.
    """

    def __init__(
        self,
        d_sae: int,
        vocabulary: int,
        *,
        contexts: int,
        window: int,
        bands: int,
        per_band: int,
        sample_rows: int,
        folder: Path,
    ) -> None:
        self.options = {
            "d_sae": d_sae,
            "vocabulary": vocabulary,
            "contexts": contexts,
            "window": window,
            "bands": bands,
            "per_band": per_band,
            "sample_rows": sample_rows,
        }
        self.context_size: int | None = None
        self.tokens = 0  # evaluated
        self.units: set[int] = set()  # numbers of those that went by
        folder.mkdir(parents=True, exist_ok=True)
        self._waiting: list[Unit] = []
        self._firings = 0
        self._fired = np.zeros(d_sae, bool)
        self._moments = Moments(d_sae)
        self._table = TokenTable(d_sae, vocabulary, folder)
        self._contexts = ContextLists(d_sae, contexts, window, bands, per_band)
        self._sketches = Sketches(d_sae)
        self._norms = Norms()
        self._sample = SampledRows(sample_rows)
        self._rows = SeenRows(folder)

    @property
    def alive(self) -> int:
        """Latents that fired."""
        return int(self._fired.sum())

    def add(self, unit: Unit) -> None:
        """Take a unit in. Its arrays are held until enough units wait: they must not be written to afterwards.

        Raises `InvalidInput` for one that went by already, or that cannot be counted.
        """
        d_sae, vocabulary = self.options["d_sae"], self.options["vocabulary"]
        check(unit, d_sae=d_sae, vocabulary=vocabulary, context_size=self.context_size)
        if unit.number in self.units:
            raise InvalidInput(f"catalog: unit {unit.number} (rows from {unit.first_row}) went by already")
        T = unit.ids.shape[1]
        if (unit.first_row + len(unit.ids)) * T > 1 << NUMBERED:
            raise InvalidInput(f"catalog: more than {1 << NUMBERED:,} tokens; build a catalog of fewer")
        self.context_size = T
        self.units.add(unit.number)
        self.tokens += int(unit.special.size - np.count_nonzero(unit.special))
        self._fired[unit.firings.latents] = True
        self._waiting.append(unit)
        self._firings += max(1024, len(unit.firings.latents))
        self._forget()
        if self._firings >= PENDING:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        batch = Batch(self._waiting, self.options["d_sae"])
        self._waiting, self._firings = [], 0
        for part in self._parts():
            part.add(batch)

    def _parts(self) -> tuple[Any, ...]:
        return (
            self._moments, self._table, self._contexts, self._sketches, self._norms, self._sample, self._rows,
        )  # fmt: skip

    def merge(self, other: State) -> None:
        """Take in what another state of the same options saw, which is left as it was in effect."""
        if different := [name for name, value in self.options.items() if other.options[name] != value]:
            said = ", ".join(f"{n} {self.options[n]} and {other.options[n]}" for n in different)
            raise InvalidInput(f"catalog: parts that were built differently: {said}")
        if both := self.units & other.units:
            raise InvalidInput(f"catalog: {len(both)} units are in both parts, the first is {min(both)}")
        sizes = {self.context_size, other.context_size} - {None}
        if len(sizes) > 1:
            raise InvalidInput(
                f"catalog: parts of rows of {' and '.join(map(str, sorted(sizes, key=str)))} tokens"
            )
        self._settle()
        other._settle()
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.merge(theirs)
        self.context_size = self.context_size or other.context_size
        self.tokens += other.tokens
        self.units |= other.units
        self._fired |= other._fired
        self._forget()

    # Results

    @property
    def moments(self) -> Moments:
        self._settle()
        return self._moments

    def tokens_top(self, per_latent: int = 20, at_least: int = 2) -> Ranked:
        self._settle()
        return self._table.tokens_top(per_latent, at_least)

    def evidence_top(self, per_latent: int = 32) -> Ranked:
        self._settle()
        return self._table.evidence_top(per_latent)

    def contexts(self) -> Contexts:
        """The norms are in units of the median one. Computed once for a state that does not change."""
        return self._found_contexts

    @cached_property
    def _found_contexts(self) -> Contexts:
        self._settle()
        found = self._contexts.result(self._moments.max, self.context_size or LONGEST)
        return found._replace(norm=found.norm / np.float32(self._norms.median() or 1.0))

    def _forget(self) -> None:
        self.__dict__.pop("_found_contexts", None)

    def rows(self) -> Corpus:
        """Token ids and documents of the rows that contexts and the sample refer to."""
        return self._rows.some(np.union1d(self.contexts().row, self.sample().rows))

    def sample(self) -> Sample:
        self._settle()
        return self._sample.result()

    def firing_neighbours(self, k: int = 10) -> Neighbours:
        self._settle()
        return self._sketches.neighbours(k, self._moments.count)

    def median_norm(self) -> float:
        self._settle()
        return self._norms.median()

    @property
    def sinks(self) -> int:
        """Evaluated tokens whose norm is more than SINK times the median one."""
        return self._norms.above(SINK * self.median_norm())

    # Files

    def save(self, folder: Path) -> None:
        """Write the state into an empty folder; putting that in its place at once is the caller's part."""
        self._settle()
        table, runs = self._table.save(folder)
        rows, segments = self._rows.save(folder)
        arrays = {
            "table": table,
            "rows": rows,
            "seen": {"latents": self._fired, "units": np.array(sorted(self.units), np.int64)},
        }
        arrays |= {name: getattr(self, f"_{name}").arrays() for name in _SIMPLE}
        named = {f"{part}/{name}": _tensor(v) for part, own in arrays.items() for name, v in own.items()}
        write_tensors(folder / ARRAYS, named)
        write_json(
            folder / ABOUT,
            {
                "options": self.options,
                "context_size": self.context_size,
                "tokens": self.tokens,
                "token_runs": runs,
                "row_files": segments,
            },
        )

    @staticmethod
    def load(saved: Path, folder: Path) -> State:
        """The state that was saved, in a folder of its own. What is in `saved` stays as it is."""
        about = read_json(saved / ABOUT)
        arrays: dict[str, dict[str, NDArray]] = {}
        for name, tensor in read_tensors(saved / ARRAYS).items():
            part, _, own = name.partition("/")
            arrays.setdefault(part, {})[own] = _array(tensor, own)
        state = State(**about["options"], folder=folder)
        state.context_size, state.tokens = about["context_size"], about["tokens"]
        state.units, state._fired = set(arrays["seen"]["units"].tolist()), arrays["seen"]["latents"]
        state._table.restore(arrays["table"], saved, about["token_runs"])
        state._rows.restore(arrays.get("rows", {}), saved, about["row_files"])
        for name in _SIMPLE:
            getattr(state, f"_{name}").restore(arrays[name])
        return state


_SIMPLE = ("moments", "contexts", "sketches", "norms", "sample")
_UNSIGNED = ("keys", "draws")  # uint64, kept as int64 of the same bits


def _tensor(array: NDArray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int64) if array.dtype == np.uint64 else array)


def _array(tensor: torch.Tensor, name: str) -> NDArray:
    array = tensor.numpy()
    return array.view(np.uint64) if name.rpartition(".")[2] in _UNSIGNED else array
