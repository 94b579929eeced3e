"""In many groups at once, the n entries of the lowest keys, at most one per document.

What is kept depends on the set of entries offered alone: of each document its lowest, of these the n lowest. So entries may
come in any order, and what two parts keep, offered to one, gives what the whole would have kept.

G groups, n slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate.grouping import Ints, group, rank_in_group, starts_of

FREE = np.uint64(2**64 - 1)  # the key of a free slot


class Lowest:
    """Slots of each group, unsorted. `records` holds the number, from 0 up, under which the owner keeps an entry."""

    def __init__(self, groups: int, n: int) -> None:
        self.n = n
        self.keys = np.full((groups, n), FREE)
        self.documents = np.full((groups, n), -1, np.int64)
        self.records = np.full((groups, n), -1, np.int32)
        self.worst = np.full(groups, FREE)  # an entry at or above it cannot enter

    def offer(self, groups: Ints, keys: NDArray[np.uint64], documents: Ints) -> tuple[Ints, Ints]:
        """Let entries compete; returns (indices of those that are in at the end, their slots in `records.ravel()`).

        Their records are the caller's to write. Keys of a group differ.
        """
        chosen, rank = self._few(groups, keys, documents)
        by_rank, starts = group(rank, self.n)
        number = -2 - np.arange(len(keys), dtype=np.int32)
        for turn in range(self.n):
            now = chosen[by_rank[starts[turn] : starts[turn + 1]]]  # at most one per group
            if len(now) == 0:
                break
            self._insert(groups[now], keys[now], documents[now], number[now])
        touched = groups[chosen[rank == 0]]
        held = self.records[touched]
        row, slot = np.nonzero(held < -1)
        return -2 - held[row, slot], touched[row] * self.n + slot

    def point(self, slots: Ints, records: Ints) -> None:
        self.records.reshape(-1)[slots] = records

    def _few(self, groups: Ints, keys: NDArray[np.uint64], documents: Ints) -> tuple[Ints, Ints]:
        """(indices, rank in its group) of each group's n lowest, one per document; sorted by group and key."""
        order = np.argsort(keys)
        order = order[np.argsort(documents[order], kind="stable")]
        order = self._by_group(order, groups)
        first = order[starts_of(groups[order], documents[order])]
        first = first[np.argsort(keys[first])]
        first = self._by_group(first, groups)
        rank = rank_in_group(groups[first])
        return first[rank < self.n], rank[rank < self.n]

    def _by_group(self, order: Ints, groups: Ints) -> Ints:
        return order[group(groups[order], len(self.worst))[0]]

    def _insert(self, groups: Ints, keys: NDArray[np.uint64], documents: Ints, records: Ints) -> None:
        """One entry per group."""
        held = self.keys[groups]
        same = (self.documents[groups] == documents[:, None]) & (held != FREE)
        slot = np.where(same.any(1), same.argmax(1), held.argmax(1))
        enters = keys < held[np.arange(len(groups)), slot]
        place = (groups[enters], slot[enters])
        self.keys[place], self.documents[place], self.records[place] = (
            keys[enters],
            documents[enters],
            records[enters],
        )
        self.worst[place[0]] = self.keys[place[0]].max(1)

    def clear(self, groups: Ints, slots: Ints) -> None:
        """Free slots."""
        self.keys[groups, slots], self.records[groups, slots], self.documents[groups, slots] = FREE, -1, -1
        self.worst[groups] = FREE

    def arrays(self) -> dict[str, NDArray]:
        return {"keys": self.keys, "documents": self.documents, "records": self.records}

    def restore(self, arrays: dict[str, NDArray]) -> None:
        self.keys, self.documents, self.records = arrays["keys"], arrays["documents"], arrays["records"]
        self.worst = self.keys.max(1)
