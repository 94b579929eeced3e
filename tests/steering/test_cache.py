"""A cache with room: what transformers' own holds, whatever is done to it between two tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer

from saekit.steering.cache import RoomyLayer, roomy

N, HEADS, D_HEAD = 3, 2, 4


def states(T: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, T, D_HEAD, generator=draw) for _ in range(2))
    return keys, values


STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 9)),
    st.tuples(st.just("crop"), st.integers(0, 6)),
    st.tuples(st.just("choose"), st.lists(st.integers(0, N - 1), min_size=N, max_size=N)),
    st.tuples(st.just("reorder"), st.permutations(range(N))),
)


@settings(max_examples=60)
@given(st.integers(1, 5), st.lists(STEPS, max_size=25))
def test_it_holds_what_transformers_own_holds(T, steps) -> None:
    caches: list[Any] = []
    for _ in range(2):
        cache = DynamicCache()
        cache.update(*states(T, N, 0), 0)
        caches.append(cache)
    plain, ours = caches[0], roomy(caches[1])
    assert type(ours.layers[0]) is RoomyLayer
    for i, (what, how) in enumerate(steps):
        for cache in (plain, ours):
            layer = cache.layers[0]
            if what == "add":
                found = layer.update(*states(how, N, i), {})
                assert found[0] is layer.keys
            elif what == "crop":
                layer.crop(-min(how, layer.get_seq_length() - 1))
            elif what == "choose":
                layer.batch_select_indices(torch.tensor(how))
            else:
                layer.reorder_cache(torch.tensor(how))
        assert plain.get_seq_length() == ours.get_seq_length()
        assert plain.layers[0].get_mask_sizes(1) == ours.layers[0].get_mask_sizes(1)
        assert torch.equal(plain.layers[0].keys, ours.layers[0].keys)
        assert torch.equal(plain.layers[0].values, ours.layers[0].values)


def test_tokens_are_not_copied_again() -> None:
    cache = DynamicCache()
    cache.update(*states(4, N, 0), 0)
    layer = roomy(cache).layers[0]
    places = set()
    for i in range(60):
        layer.update(*states(1, N, i))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) <= 5, "room for 10, 22, 46 and 94"


def test_other_layers_stay_as_they_are() -> None:
    class Own(DynamicLayer):
        pass

    cache: Any = DynamicCache()
    cache.layers = [Own(), DynamicLayer()]
    before = list(cache.layers)
    assert roomy(cache).layers == before, "what holds nothing yet may be another layer's to fill"
    assert roomy(None) is None


def test_the_rooms_are_those_of_a_model_that_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    import saekit

    model, seen = saekit.load_model("tiny", device="cpu"), []
    update = RoomyLayer.update

    def watched(self: RoomyLayer, *given: Any, **more: Any) -> Any:
        seen.append(self)
        return update(self, *given, **more)

    monkeypatch.setattr(RoomyLayer, "update", watched)
    saekit.generate(model, ["The king"], 5, stop_at_eos=False)
    assert len(seen) == 4 * model.cfg.n_layers
    assert len(set(map(id, seen))) == model.cfg.n_layers
