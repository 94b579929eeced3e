"""What the pass hands over, a unit of corpus rows at a time, and several units made ready for the accumulators.

R rows of T tokens, n firings, S d_sae, B tokens of a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.grouping import Ints, group
from saekit.catalog.draws import draw, explains
from saekit.errors import InvalidInput

UNIT_ROWS = 8
LARGEST = float(1 << 20)  # an activation from here on would fill the fixed-point sums
LONGEST = (1 << 15) - 1  # tokens in a row

Floats = NDArray[np.float32]


class Firings(NamedTuple):
    """The non-zero activations of a unit, at evaluated positions, in any order."""

    latents: Ints  # [n]
    values: Floats  # [n]
    rows: Ints  # [n] corpus row, counted over the whole stream
    positions: Ints  # [n] in the row


class Unit(NamedTuple):
    """UNIT_ROWS rows of the corpus (fewer at its end) with all that fired on them."""

    ids: Ints  # [R, T]
    documents: Ints  # [R, T]
    special: NDArray[np.bool_]  # [R, T] not evaluated
    norms: Floats  # [R, T] ‖x‖ at the site; what stands at special positions is not looked at
    first_row: int  # a multiple of UNIT_ROWS
    firings: Firings

    @property
    def number(self) -> int:
        return self.first_row // UNIT_ROWS


class Batch:
    """Units together: arrays over B tokens, and firings sorted by latent and token."""

    def __init__(self, units: list[Unit], d_sae: int) -> None:
        T = units[0].ids.shape[1]
        self.context_size = T
        self.rows = np.concatenate([unit.first_row + np.arange(len(unit.ids)) for unit in units])  # [R]
        self.ids = np.concatenate([unit.ids for unit in units]).astype(np.int32)  # [R, T]
        self.documents = np.concatenate([unit.documents for unit in units]).astype(np.int64)
        self.special = np.concatenate([unit.special for unit in units])
        self.norms = np.concatenate([unit.norms for unit in units]).astype(np.float32)
        self.draws = draw(np.repeat(self.rows, T), np.tile(np.arange(T), len(self.rows)))  # [B]
        self.explaining = explains(self.documents)  # [R, T]
        tokens, latents, values, first = [], [], [], 0
        for unit in units:
            f = unit.firings
            tokens.append((f.rows - unit.first_row + first) * T + f.positions)
            latents.append(f.latents)
            values.append(f.values)
            first += len(unit.ids)
        at, latent = np.concatenate(tokens).astype(np.int32), np.concatenate(latents).astype(np.int32)
        order, _ = group(at, self.ids.size)
        within, self.starts = group(latent[order], d_sae)  # starts [S + 1]
        order = order[within]
        self.tokens, self.latents = at[order], latent[order]  # [n] token of the batch, latent
        self.values = np.concatenate(values).astype(np.float32)[order]
        self.fixed = np.rint(self.values.astype(np.float64) * 2**24).astype(np.int64)  # to be summed exactly
        self.logs = np.log10(self.values.astype(np.float64))

    def windows(self, tokens: Ints, window: int) -> tuple[Ints, Ints]:
        """(start in the row, length) of the window around each token, inside its document and clear of special tokens."""
        R, T = self.documents.shape
        # A stretch ends where the document changes or a special token stands.
        breaks = np.ones((R, T), bool)
        breaks[:, 1:] = (
            (self.documents[:, 1:] != self.documents[:, :-1]) | self.special[:, 1:] | self.special[:, :-1]
        )
        columns = np.arange(T)
        begins = np.maximum.accumulate(np.where(breaks, columns, 0), axis=1)
        after = np.full((R, T), T)
        after[:, :-1] = np.where(breaks[:, 1:], columns[1:], T)
        ends = np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]
        before = window * 5 // 8  # what led to the peak says more than what follows it
        start = np.maximum(begins.ravel()[tokens], tokens % T - before)
        end = np.minimum(ends.ravel()[tokens], start + window)
        return start, end - start


def check(unit: Unit, *, d_sae: int, vocabulary: int, context_size: int | None) -> None:
    """Raises `InvalidInput` for a unit that cannot be counted; what is said is what is wrong with the SAE or the corpus."""
    R, T = unit.ids.shape
    f = unit.firings
    if unit.first_row % UNIT_ROWS or not 0 < R <= UNIT_ROWS:
        raise InvalidInput(
            f"catalog: a unit is {UNIT_ROWS} rows from a multiple of {UNIT_ROWS}, got {R} from {unit.first_row}"
        )
    if T > LONGEST or (context_size is not None and context_size != T):
        wanted = (
            f"of up to {LONGEST:,} tokens" if context_size is None else f"of {context_size} tokens as before"
        )
        raise InvalidInput(f"catalog: rows {wanted} are expected, got {T}")
    if unit.ids.min() < 0 or unit.ids.max() >= vocabulary:
        raise InvalidInput(
            f"catalog: token ids from {unit.ids.min()} to {unit.ids.max()}, the vocabulary has {vocabulary}"
        )
    if len(f.values) and not _all(f.values > 0, f.values < LARGEST):
        odd = f.values[~((f.values > 0) & (f.values < LARGEST))][0]
        raise InvalidInput(
            f"catalog: an activation of {odd}; expected numbers above 0 and below {LARGEST:,.0f}"
        )
    if len(f.latents) and not _all(f.latents >= 0, f.latents < d_sae):
        raise InvalidInput(f"catalog: latents from {f.latents.min()} to {f.latents.max()}, d_sae is {d_sae}")
    norms = unit.norms[~unit.special]
    if not _all(norms >= 0, norms < np.inf):
        raise InvalidInput("catalog: the model's activations at the site are not finite")


def _all(*conditions: Any) -> bool:
    return all(bool(condition.all()) for condition in conditions)
