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


def test_memory_is_the_ring(model) -> None:
    stream = Activations(model, SITE, tokenize(TEXTS, model, 32), 64, ring=256, contexts=2)
    iterator = iter(stream)
    next(iterator)
    assert iterator.gi_frame.f_locals["ring"].shape == (256, model.cfg.d_model)


def test_wrong_calls(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    with pytest.raises(InvalidInput, match="ring: 10 rows cannot hold a batch_size of 64"):
        Activations(model, SITE, tokens, 64, ring=10)
    with pytest.raises(UnknownName, match="Did you mean"):
        Activations(model, "blocks.3.hook_resid", tokens)


def test_plain_ids_stream_too(model) -> None:
    ids = torch.randint(1, 200, (6, 16))
    assert len(rows(Activations(model, SITE, ids, 10, ring=50))) == 96
