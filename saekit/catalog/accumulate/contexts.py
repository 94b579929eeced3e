"""Per latent, the strongest contexts and a sample of each band of its active range, with the activations around each peak.

    firings ──value above the n-th──────────────────────────▶ top     [S] groups of n, strongest first
        └─────bin of log v, draw below the bin's n-th draw──▶ bands   [S · SLOTS] groups of per_band, lowest draw first
                                          both point to ─────▶ records: where the peak is, what fires around it

The range is known at the end only; so chance samples log bins of 1/16 decade, those of a decade below the maximum apart and the
rest as one, and at the end what the bins hold is dealt out to the bands.

S d_sae, n contexts, m records, k activations in their windows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.batch import Batch, Floats
from saekit.catalog.accumulate.grouping import Ints, ranges, rank_in_group, starts_of
from saekit.catalog.accumulate.lowest import Lowest

PER_DECADE = 16
APART = 17  # bins kept apart: the maximum's and the decade below it
SLOTS = APART + 1  # and one for all below
REST = APART
NEVER = -(1 << 15)  # bin of the maximum of a latent that has not fired
NUMBERED = 33  # bits of a token's number in the stream
AT_ONCE = 1 << 16  # records moved, latents' slots looked at, at once


class Contexts(NamedTuple):
    """Sorted by feature, band and rank; the last three by `which`, then offset."""

    feature: Ints  # [m]
    band: Ints  # 0: the strongest; b of the bands: peaks in ((b − 1)/bands, b/bands] of the maximum
    rank: Ints  # strongest first; in a band, as drawn
    document: Ints
    row: Ints  # of the stream
    start: Ints  # in the row
    length: Ints
    peak: Ints  # counted from start
    value: Floats  # at the peak
    norm: Floats  # ‖x‖ at the peak
    which: Ints  # [k] index of the context
    offset: Ints  # [k] from its start
    activation: Floats  # [k]


def bin_of(values: NDArray[Any]) -> Ints:
    return np.floor(PER_DECADE * np.log10(values.astype(np.float64))).astype(np.int32)


def band_of(values: NDArray[Any], highest: NDArray[Any], bands: int) -> Ints:
    """1 … bands."""
    share = values.astype(np.float64) / highest.astype(np.float64)
    return np.ceil(share * bands).astype(np.int64).clip(1, bands)


def _groups(latents: Ints, bins: Ints, highest: Ints) -> Ints:
    """Group of each firing among the bins of its latent."""
    apart = bins > highest[latents] - APART
    return latents.astype(np.int64) * SLOTS + np.where(apart, bins % APART, REST)


def _strength(values: Floats, numbers: Ints) -> NDArray[np.uint64]:
    """Lower where the value is higher; of equal ones, where the token comes earlier. Numbers stay below 2^NUMBERED."""
    weak = np.uint64(0x7F800000) - values.view(np.uint32)  # floats above 0 are ordered as their bits are
    return (weak.astype(np.uint64) << np.uint64(NUMBERED)) | numbers.astype(np.uint64)


def _distinct(*numbers: Ints) -> Ints:
    """Ascending. (numpy's `unique` hashes, which is slow.)"""
    ordered = np.sort(np.concatenate(numbers))
    return ordered[starts_of(ordered)]


class Records:
    """Peaks and the activations in their windows, one after the other; what nothing points to goes now and then."""

    def __init__(self) -> None:
        self.token = np.zeros(0, np.int64)  # row · T + position of the peak
        self.value, self.norm = np.zeros(0, np.float32), np.zeros(0, np.float32)
        self.start, self.length, self.count = (np.zeros(0, np.int16) for _ in range(3))
        self.at = np.zeros(0, np.int64)  # where its activations are
        self.offset, self.activation = np.zeros(0, np.int16), np.zeros(0, np.float32)
        self.n = self.k = 0  # used of the arrays above, which are longer

    FIELDS = ("token", "value", "norm", "start", "length", "count", "at")
    RAGGED = ("offset", "activation")

    def append(self, *, count: Ints, offset: Ints, activation: Floats, **fields: NDArray[Any]) -> Ints:
        """Numbers of the new records. count: [n] activations of each, in `offset` and `activation`."""
        first, m, k = self.n, len(count), len(offset)
        self._make_room(m, k)
        at = self.k + np.cumsum(count, dtype=np.int64) - count
        for name, values in {**fields, "count": count, "at": at}.items():
            getattr(self, name)[first : first + m] = values
        self.offset[self.k : self.k + k], self.activation[self.k : self.k + k] = offset, activation
        self.n, self.k = first + m, self.k + k
        return np.arange(first, first + m)

    def _make_room(self, m: int, k: int) -> None:
        for names, used, more in ((self.FIELDS, self.n, m), (self.RAGGED, self.k, k)):
            array = getattr(self, names[0])
            if used + more > len(array):
                longer = max(used + more, len(array) + len(array) // 8)
                for name in names:
                    getattr(self, name).resize(longer, refcheck=False)

    def taken(self, records: Ints) -> dict[str, Any]:
        """What `append` takes."""
        ragged = ranges(self.at[records], self.count[records])
        fields = {name: getattr(self, name)[records] for name in self.FIELDS if name != "at"}
        return {**fields, "offset": self.offset[ragged], "activation": self.activation[ragged]}

    def keep(self, kept: Ints) -> None:
        """Only these records, ascending; they are moved down, a few at a time, within the arrays."""
        n = k = 0
        for i in range(0, len(kept), AT_ONCE):
            some = self.taken(kept[i : i + AT_ONCE])
            count = some["count"]
            some["at"] = k + np.cumsum(count, dtype=np.int64) - count
            for name in self.FIELDS:
                getattr(self, name)[n : n + len(count)] = some[name]
            more = len(some["offset"])
            for name in self.RAGGED:
                getattr(self, name)[k : k + more] = some[name]
            n, k = n + len(count), k + more
        self.n, self.k = n, k

    def arrays(self) -> dict[str, NDArray]:
        used = {name: getattr(self, name)[: self.n] for name in self.FIELDS}
        return used | {name: getattr(self, name)[: self.k] for name in self.RAGGED}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        for name in (*self.FIELDS, *self.RAGGED):
            setattr(self, name, arrays[name].copy())  # of its own, so that it can grow
        self.n, self.k = len(self.token), len(self.offset)


class ContextLists:
    """The lists of all latents. n: strongest contexts; bands, per_band: of the sample; window: tokens."""

    def __init__(self, d_sae: int, n: int, window: int, bands: int, per_band: int) -> None:
        self.window, self.bands, self.per_band = window, bands, per_band
        self.top = Lowest(d_sae, n)
        self.drawn = Lowest(d_sae * SLOTS, per_band)
        self.highest = np.full(d_sae, NEVER, np.int32)  # bin of the maximum
        self.records = Records()
        self._kept = 0  # records when they were last looked through

    def add(self, batch: Batch) -> None:
        latents = batch.latents
        if len(latents) == 0:
            return
        bins = np.floor(PER_DECADE * batch.logs).astype(np.int32)
        starts = batch.starts[:-1]
        there = np.flatnonzero(np.diff(batch.starts))
        self._raise(there, np.maximum.reduceat(bins, starts[there]))
        T = batch.context_size
        numbers = (batch.rows * T)[batch.tokens // T] + batch.tokens % T  # row · T + position
        documents = batch.documents.ravel()[batch.tokens]

        groups = _groups(latents, bins, self.highest)
        draws = batch.draws[batch.tokens]
        low = np.flatnonzero(draws < self.drawn.worst[groups])
        new, drawn_slots = self.drawn.offer(groups[low], draws[low], documents[low])
        drawn = low[new]

        strength = _strength(batch.values, numbers)
        high = np.flatnonzero(strength < self.top.worst[latents])
        new, top_slots = self.top.offer(latents[high], strength[high], documents[high])
        top = high[new]

        entered = np.zeros(len(latents), bool)
        entered[drawn] = entered[top] = True
        found = np.flatnonzero(entered)
        records = self._record(batch, numbers, found)
        self.drawn.point(drawn_slots, records[np.searchsorted(found, drawn)])
        self.top.point(top_slots, records[np.searchsorted(found, top)])
        self._prune_at_times()

    def _record(self, batch: Batch, numbers: Ints, found: Ints) -> Ints:
        """Write down some firings; returns the numbers of their records."""
        tokens, T = batch.tokens[found], batch.context_size
        start, length = batch.windows(tokens, self.window)
        # Firings are sorted by latent and token, so a latent's firings in a window lie together.
        size = batch.ids.size
        keys = batch.latents * np.int64(size) + batch.tokens
        begin = batch.latents[found] * np.int64(size) + (tokens - tokens % T + start)
        first = np.searchsorted(keys, begin)
        count = np.searchsorted(keys, begin + length) - first
        inside = ranges(first, count)
        return self.records.append(
            token=numbers[found],
            value=batch.values[found],
            norm=batch.norms.ravel()[tokens],
            start=start,
            length=length,
            count=count,
            offset=batch.tokens[inside] % T - np.repeat(start, count),
            activation=batch.values[inside],
        )

    def _raise(self, latents: Ints, bins: Ints) -> None:
        """New maxima: bins that fell too far below them join the rest."""
        higher = bins > self.highest[latents]
        latents, bins = latents[higher], bins[higher]
        known = latents[self.highest[latents] != NEVER]
        self.highest[latents] = bins
        for i in range(0, len(known), AT_ONCE // SLOTS):
            some = known[i : i + AT_ONCE // SLOTS]
            groups = (some[:, None] * SLOTS + np.arange(APART)).ravel()
            where, slots = np.nonzero(self.drawn.records[groups] >= 0)
            at = groups[where]
            records = self.drawn.records[at, slots]
            fell = bin_of(self.records.value[records]) < self.highest[at // SLOTS] - (APART - 1)
            at, slots, records = at[fell], slots[fell], records[fell]
            keys, documents = self.drawn.keys[at, slots], self.drawn.documents[at, slots]
            self.drawn.clear(at, slots)
            entered, free = self.drawn.offer(at // SLOTS * SLOTS + REST, keys, documents)
            self.drawn.point(free, records[entered])

    def _prune_at_times(self) -> None:
        if self.records.n > self._kept + self._kept // 8 + AT_ONCE:
            self.prune()

    def prune(self) -> None:
        """Throw away records that no list points to."""
        used = np.zeros(self.records.n, bool)
        for lists in (self.top, self.drawn):
            used[lists.records[lists.records >= 0]] = True
        kept = np.flatnonzero(used)
        if len(kept) < self.records.n:
            numbers = np.cumsum(used, dtype=np.int32) - np.int32(1)
            for lists in (self.top, self.drawn):
                held = lists.records >= 0
                lists.records[held] = numbers[lists.records[held]]
            self.records.keep(kept)
        self._kept = len(kept)

    def merge(self, other: ContextLists) -> None:
        there = np.flatnonzero(other.highest != NEVER)
        self._raise(there, other.highest[there])
        step = AT_ONCE // (SLOTS * self.per_band + self.top.n) + 1
        for i in range(0, len(other.highest), step):
            self._take(other, i, min(i + step, len(other.highest)))
            self._prune_at_times()

    def _take(self, other: ContextLists, first: int, last: int) -> None:
        """Offer what another's latents hold."""
        top, drawn = other.top.records[first:last], other.drawn.records[first * SLOTS : last * SLOTS]
        theirs = _distinct(top[top >= 0], drawn[drawn >= 0])
        if len(theirs) == 0:
            return
        numbers = self.records.append(**other.records.taken(theirs))
        for mine, lists, records, begin in (
            (self.top, other.top, top, first),
            (self.drawn, other.drawn, drawn, first * SLOTS),
        ):
            groups, slots = np.nonzero(records >= 0)
            new = numbers[np.searchsorted(theirs, records[groups, slots])]
            groups = groups + begin
            keys, documents = lists.keys[groups, slots], lists.documents[groups, slots]
            if mine is self.drawn:
                latents = groups // SLOTS
                groups = _groups(latents, bin_of(self.records.value[new]), self.highest)
            entered, free = mine.offer(groups, keys, documents)
            mine.point(free, new[entered])

    def result(self, highest: Floats, context_size: int) -> Contexts:
        """highest: [S] maxima of the activations."""
        step = AT_ONCE // (SLOTS * self.per_band + self.top.n) + 1
        parts = [self._listed(i, min(i + step, len(highest)), highest) for i in range(0, len(highest), step)]
        feature, band, rank, document, record = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        held = self.records
        count = held.count[record].astype(np.int32)
        inside = ranges(held.at[record], count)
        position = (held.token[record] % context_size).astype(np.int32)
        start = held.start[record].astype(np.int32)
        return Contexts(
            feature=feature,
            band=band,
            rank=rank,
            document=document,
            row=held.token[record] // context_size,
            start=start,
            length=held.length[record].astype(np.int32),
            peak=position - start,
            value=held.value[record],
            norm=held.norm[record],
            which=np.repeat(np.arange(len(record), dtype=np.int32), count),
            offset=held.offset[inside],
            activation=held.activation[inside],
        )

    def _listed(self, first: int, last: int, highest: Floats) -> tuple[Ints, ...]:
        """(feature, band, rank, document, record) of some latents, sorted by the first three."""
        top, drawn = self.top, self.drawn
        feature, slots = np.nonzero(top.records[first:last] >= 0)
        feature = feature + first
        strongest = (feature, np.zeros_like(feature), top.keys[feature, slots], top.documents[feature, slots])
        records = top.records[feature, slots]

        group, slots = np.nonzero(drawn.records[first * SLOTS : last * SLOTS] >= 0)
        group = group + first * SLOTS
        found = drawn.records[group, slots]
        latents = group // SLOTS
        band = band_of(self.records.value[found], highest[latents], self.bands)
        sampled = (latents, band, drawn.keys[group, slots], drawn.documents[group, slots])
        feature, bands, keys, documents = (
            np.concatenate(pair) for pair in zip(strongest, sampled, strict=True)
        )
        records = np.concatenate([records, found])

        # A document may have been drawn in two bins of one band.
        order = np.lexsort((keys, documents, bands, feature))
        order = order[starts_of(feature[order], bands[order], documents[order])]
        order = order[np.lexsort((keys[order], bands[order], feature[order]))]
        rank = rank_in_group(feature[order] * (self.bands + 1) + bands[order])
        kept = rank < np.where(bands[order] == 0, top.n, self.per_band)
        order, rank = order[kept], rank[kept]
        small = (feature[order].astype(np.int32), bands[order].astype(np.int8), rank.astype(np.int16))
        return *small, documents[order], records[order]

    def arrays(self) -> dict[str, NDArray]:
        self.prune()
        parts = {"top": self.top.arrays(), "drawn": self.drawn.arrays(), "records": self.records.arrays()}
        named = {
            f"{part}.{name}": values for part, arrays in parts.items() for name, values in arrays.items()
        }
        return {**named, "highest": self.highest}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        for name in ("top", "drawn", "records"):
            part = {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(f"{name}.")}
            getattr(self, name).restore(part)
        self.highest = arrays["highest"]
        self._kept = self.records.n
