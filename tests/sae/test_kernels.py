"""Every kernel against its plain twin: values and all gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.sae.kernels import Pairs, decode_at, decode_at_plain, preacts_at, preacts_at_plain

SHAPES = [(1, 3, 4, 1), (7, 5, 16, 3), (64, 8, 32, 32), (33, 16, 8, 2)]  # B, D, S, K
RAGGED = [(1, 3, 4, 0.0), (7, 5, 16, 0.2), (64, 8, 32, 1.0), (33, 16, 8, 0.05)]  # B, D, S, share of pairs


def weights(B, D, S, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, W_enc_rows, W_dec, b_enc, b_dec = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((B, D), (S, D), (S, D), (S,), (D,))
    )
    return x, W_enc_rows.t(), W_dec, b_enc, b_dec


def leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def rows(B, S, K):
    latents = torch.rand(B, S, generator=torch.Generator().manual_seed(1)).topk(K).indices
    return Pairs.of_rows(latents, S)


def ragged(B, S, share):
    """Some tokens get no latent, some get many."""
    chosen = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < share
    chosen[::3] = False
    tokens, latents = chosen.nonzero(as_tuple=True)
    return Pairs(tokens, latents, B, S)


PAIRS = [(B, D, S, rows(B, S, K)) for B, D, S, K in SHAPES] + [
    (B, D, S, ragged(B, S, share)) for B, D, S, share in RAGGED
]


def both(kernel, plain, inputs, upstream):
    """(value, gradients…) of each of the two."""
    results = []
    for function in (kernel, plain):
        copies = leaves(*inputs)
        out = function(copies)
        wanted = [t for t in copies if t is not None]
        results.append([out, *torch.autograd.grad(out, wanted, upstream(out))])
    return zip(*results, strict=True)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("B", "D", "S", "pairs"), PAIRS)
def test_preacts_at_equals_its_twin_with_all_gradients(B, D, S, pairs, shifted) -> None:
    x, W_enc, _, b_enc, b_dec = weights(B, D, S)
    shift = b_dec if shifted else None
    p = (x - b_dec if shifted else x) @ W_enc + b_enc
    upstream = lambda out: torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(9))  # noqa: E731
    compared = both(
        lambda t: preacts_at(p, *t, pairs),
        lambda t: preacts_at_plain(p, *t, pairs),
        (x, W_enc, b_enc, shift),
        upstream,
    )
    for fast, plain in compared:
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize(("B", "D", "S", "pairs"), PAIRS)
def test_decode_at_equals_its_twin_with_all_gradients(B, D, S, pairs) -> None:
    x, _, W_dec, _, _ = weights(B, D, S)
    n = len(pairs.tokens)
    values = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    compared = both(
        lambda t: decode_at(*t, pairs), lambda t: decode_at_plain(*t, pairs), (values, W_dec), lambda _: x
    )
    for fast, plain in compared:
        torch.testing.assert_close(fast, plain)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_any_set_of_pairs(B, S, data) -> None:
    chosen = data.draw(st.lists(st.integers(0, B * S - 1), unique=True, max_size=B * S).map(sorted))
    flat = torch.tensor(chosen, dtype=torch.long)
    pairs = Pairs(flat // S, flat % S, B, S)
    x, _, W_dec, _, _ = weights(B, 3, S)
    values = torch.ones(len(flat), dtype=torch.float64)
    for fast, plain in both(
        lambda t: decode_at(*t, pairs), lambda t: decode_at_plain(*t, pairs), (values, W_dec), lambda _: x
    ):
        torch.testing.assert_close(fast, plain)


def test_latents_nobody_chose_get_no_gradient() -> None:
    x, W_enc, _, b_enc, b_dec = weights(4, 3, 10)
    pairs = Pairs.of_rows(torch.tensor([[2], [2], [7], [2]]), 10)
    inputs = leaves(x, W_enc, b_enc, b_dec)
    p = (x - b_dec) @ W_enc + b_enc
    g = torch.autograd.grad(preacts_at(p, *inputs, pairs).sum(), inputs[2])[0]
    assert g.tolist() == [0, 0, 3, 0, 0, 0, 0, 1, 0, 0]


def test_gradients_lie_in_memory_as_the_weights_do() -> None:
    x, W_enc, _, b_enc, b_dec = weights(4, 3, 10)
    inputs = leaves(x, W_enc, b_enc, b_dec)
    p = (x - b_dec) @ W_enc + b_enc
    preacts_at(p, *inputs, Pairs.of_rows(p.topk(2).indices, 10)).sum().backward()
    assert inputs[1].grad.stride() == W_enc.stride() == (1, 3)
