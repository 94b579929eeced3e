"""Keys and values of a text so far, with room for those to come.

Transformers' `DynamicLayer` copies all of them for every token, so that time grows with the square of a text's length. Here they
lie in a buffer that is made twice as long when it is full.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """`DynamicLayer` whose `keys` and `values` [N, heads, T, d_head] are the first T of what there is room for."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = self._longer("keys", self.keys, key_states)
        self.values = self._longer("values", self.values, value_states)
        return self.keys, self.values

    def _longer(self, name: str, so_far: Tensor, new: Tensor) -> Tensor:
        T, end = so_far.shape[-2], so_far.shape[-2] + new.shape[-2]
        room = self._rooms.get(name)
        fits = room is not None and room.shape[-2] >= end and room.shape[0] == len(so_far)
        if room is None or not fits or room.data_ptr() != so_far.data_ptr():  # full, or rows were chosen anew
            N, heads, _, d_head = so_far.shape
            room = self._rooms[name] = so_far.new_empty(N, heads, 2 * end, d_head)
            room[:, :, :T] = so_far
        room[:, :, T:end] = new
        return room[:, :, :end]


def roomy(cache: Any) -> Any:
    """The cache, with room in each layer that does nothing but grow; sliding windows and states stay as they are."""
    for i, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.get_seq_length():
            assert layer.keys is not None
            assert layer.values is not None
            cache.layers[i] = RoomyLayer(layer.keys, layer.values)
    return cache
