from __future__ import annotations

import itertools

import pytest
import torch
from conftest import SITE, sentences

from saekit.activations import Activations, StreamPosition
from saekit.errors import InvalidInput, UnknownName
from saekit.sites import capture
from saekit.tokens import tokenize

TEXTS = sentences(60)


def rows(batches) -> torch.Tensor:
    return torch.cat(list(batches))


def in_order(x: torch.Tensor) -> torch.Tensor:
    return x[x.double().sum(1).argsort()]


def test_one_pass_gives_each_ordinary_position_once(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    expected = torch.cat([capture(model, [SITE], b.ids)[SITE][b.ids != 0] for b in tokens.batches(4)])
    stream = Activations(model, SITE, tokens, 128, ring=500, contexts=4)
    batches = list(stream)
    assert {len(b) for b in batches[:-1]} == {128}
    got = rows(batches)
    assert got.shape == expected.shape
    torch.testing.assert_close(in_order(got), in_order(expected))
    assert not torch.equal(got, expected)  # shuffled
    assert got.dtype == model.cfg.dtype


def test_special_positions_can_be_kept(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    n, t = tokens.shape
    assert len(rows(Activations(model, SITE, tokens, 64, include_special=True))) == n * t


def test_same_seed_same_stream_other_seed_other_order(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    one, two, other = (rows(Activations(model, SITE, tokens, 64, ring=700, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
def test_a_position_resumes_with_the_same_bits(model, at) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    stream = Activations(model, SITE, tokens, 100, ring=450, contexts=3)
    whole, positions = [], []
    for batch in itertools.islice(stream, 20):
        whole.append(batch)
        positions.append(stream.position)
    again = Activations(
        model, SITE, tokens, 100, ring=450, contexts=3, start=StreamPosition(*positions[at - 1])
    )
    for expected, got in zip(whole[at:], again, strict=False):
        assert torch.equal(expected, got)


def test_memory_is_the_rings(model) -> None:
    stream = Activations(model, SITES, tokenize(TEXTS, model, 32), 64, ring=256, contexts=2)
    batches = stream.batches()
    next(batches)
    rings = batches.gi_frame.f_locals["rings"]
    assert {site: ring.shape for site, ring in rings.items()} == dict.fromkeys(
        SITES, (256, model.cfg.d_model)
    )
    places = [ring.data_ptr() for ring in rings.values()]
    for _ in range(12):  # three fills
        next(batches)
    assert [ring.data_ptr() for ring in rings.values()] == places


SITES = ["blocks.4.hook_mlp_out", SITE, "blocks.1.hook_resid_pre"]


@pytest.mark.parametrize("riders", [[], SITES[:1], SITES[2:], SITES])
def test_a_sites_bits_do_not_depend_on_which_others_ride_along(model, riders) -> None:
    tokens = tokenize(TEXTS[:20], model, 32)
    alone = list(Activations(model, SITE, tokens, 100, ring=250, contexts=3))
    batches = list(Activations(model, [*riders, SITE], tokens, 100, ring=250, contexts=3))
    assert len(batches) == len(alone)
    for one, among in zip(alone, batches, strict=True):
        assert set(among) == {*riders, SITE}
        assert torch.equal(one, among[SITE])


def test_rows_of_several_sites_belong_together(model) -> None:
    """Row i of every site is the same position: what follows from one site gives the other."""
    mid, mlp, post = (f"blocks.3.hook_{name}" for name in ("resid_mid", "mlp_out", "resid_post"))
    for batch in Activations(model, [post, mid, mlp], tokenize(TEXTS[:20], model, 32), 64, ring=300):
        torch.testing.assert_close(batch[mid] + batch[mlp], batch[post])


def test_one_forward_serves_all_sites_and_stops_at_the_last(model) -> None:
    seen = []
    ids = torch.randint(1, 200, (6, 16))
    hooks = [
        (f"blocks.{block}.hook_in", lambda x, hook, block=block: seen.append(block)) for block in range(6)
    ]
    stream = Activations(model, [SITE, "blocks.1.hook_resid_pre"], ids, 10, ring=50, contexts=6)
    with model.hooks(fwd_hooks=hooks):
        assert sum(len(batch[SITE]) for batch in stream) == 96
    assert seen == [0, 1, 2, 3]  # the site is what block 3 reads


def test_a_position_of_several_sites_is_that_of_one(model) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    several, one = (Activations(model, sites, tokens, 100, ring=450, contexts=3) for sites in (SITES, SITE))
    for _ in zip(range(7), several.batches(), one.batches(), strict=False):
        assert several.position == one.position
    again = Activations(model, SITES[1:], tokens, 100, ring=450, contexts=3, start=several.position)
    torch.testing.assert_close(next(iter(again))[SITE], next(iter(one)), rtol=0, atol=0)


def test_wrong_calls(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    with pytest.raises(InvalidInput, match="ring: 10 rows cannot hold a batch_size of 64"):
        Activations(model, SITE, tokens, 64, ring=10)
    with pytest.raises(UnknownName, match="Did you mean"):
        Activations(model, "blocks.3.hook_resid", tokens)
    with pytest.raises(UnknownName, match="Did you mean"):
        Activations(model, [SITE, "blocks.3.hook_resid"], tokens)
    with pytest.raises(InvalidInput, match="site: expected a name .* got none"):
        Activations(model, [], tokens)


def test_plain_ids_stream_too(model) -> None:
    ids = torch.randint(1, 200, (6, 16))
    assert len(rows(Activations(model, SITE, ids, 10, ring=50))) == 96
