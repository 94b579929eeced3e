"""The operations at pairs, and everywhere, against dense autograd: values and every gradient.

In float64 plain torch does the work; in float32, where there is a compiler, the compiled kernels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.sae.pairs import Grid, Pairs

DTYPES = [torch.float64, torch.float32]
B, D, E, S = 33, 16, 10, 24


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(dtype, B=B, S=S):
    """x, W_enc, W_dec, b_enc, shift, rest: as an SAE holds them."""
    shapes = ((B, D), (S, D), (S, E), (S,), (D,), (B, E))
    x, rows, *others = (randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return x, rows.t(), *others


def rows(K, B=B, S=S):
    """K latents for each token, in no order, as AuxK has them."""
    return Pairs.of_rows(torch.rand(B, S, generator=torch.Generator().manual_seed(1)).topk(K).indices, S)


def ragged(chosen):
    """The pairs of a mask [B, S]."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    return Pairs(chosen.nonzero()[:, 1], starts, chosen.shape[1])


def some_of(share):
    """Some tokens get no latent, some get many."""
    chosen = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < share
    chosen[::3] = False
    return ragged(chosen)


PAIRS = {
    "one each": rows(1), "three each": rows(3), "all": rows(S),
    "few": some_of(0.05), "half": some_of(0.5), "none": some_of(0.0),
}  # fmt: skip


def everywhere(values, pairs):
    """values [n] as [B, S], 0 elsewhere."""
    dense = values.new_zeros(len(pairs.starts) - 1, pairs.d_sae)
    return dense.index_put((pairs.tokens, pairs.latents), values)


def assert_gradients(fast, plain, leaves):
    """Of two scalars, for all leaves."""
    got = torch.autograd.grad(fast, leaves, retain_graph=True)
    wanted = torch.autograd.grad(plain, leaves, allow_unused=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, **CLOSE[one.dtype])


CLOSE = {torch.float64: {}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}
over_pairs = pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@over_dtypes
@over_pairs
@pytest.mark.parametrize("shifted", [True, False])
def test_preactivations(pairs, shifted, dtype) -> None:
    x, W_enc, _, bias, shift, _ = weights(dtype)
    leaves = [W_enc, bias, shift] if shifted else [W_enc, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    dense = ((x - shift if shifted else x) @ W_enc + bias)[pairs.tokens, pairs.latents]
    p = pairs.preactivations(
        dense.detach(), (x - shift if shifted else x).detach(), W_enc, bias, shift if shifted else None
    )
    assert torch.equal(p, dense)
    g = randn(len(p), dtype=dtype, seed=9)
    assert_gradients((p * g).sum(), (dense * g).sum(), leaves)


@over_dtypes
@over_pairs
def test_of_a_vector(pairs, dtype) -> None:
    vector = randn(S, dtype=dtype).requires_grad_()
    g = randn(len(pairs.latents), dtype=dtype, seed=9)
    at = pairs.of(vector)
    assert torch.equal(at, vector[pairs.latents])
    assert_gradients((at * g).sum(), (vector[pairs.latents] * g).sum(), [vector])


@over_dtypes
@over_pairs
def test_the_total_weighted_by_latent(pairs, dtype) -> None:
    leaves = [
        t.requires_grad_() for t in (randn(len(pairs.latents), dtype=dtype), randn(S, dtype=dtype, seed=1))
    ]
    f, vector = leaves
    total, plain = pairs.total(f, vector), (everywhere(f, pairs) @ vector).sum()
    torch.testing.assert_close(total, plain, **CLOSE[dtype])
    assert_gradients(2 * total, 2 * plain, leaves)
    dense = everywhere(f, pairs)
    torch.testing.assert_close(Grid(dtype).total(dense, vector), plain, **CLOSE[dtype])


LOSSES = {
    "the sum": lambda total, error, g: 3 * total,
    "the error": lambda total, error, g: (error * g).sum(),
    "both": lambda total, error, g: 3 * total + (error * g).sum(),
    "both, tangled": lambda total, error, g: total * (error * g).sum(),
}


@over_dtypes
@over_pairs
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_squared_error(loss, pairs, dtype) -> None:
    _, _, W_dec, _, _, rest = weights(dtype)
    f, g = randn(len(pairs.latents), dtype=dtype, seed=8), randn(B, E, dtype=dtype, seed=9)
    leaves = [t.requires_grad_() for t in (f, W_dec, rest)]
    total, error = pairs.squared_error(f, W_dec, rest)
    plain = rest - everywhere(f, pairs) @ W_dec
    torch.testing.assert_close(error, plain, **CLOSE[dtype])
    torch.testing.assert_close(total, plain.square().sum(), **CLOSE[dtype])
    assert_gradients(loss(total, error, g), loss(plain.square().sum(), plain, g), leaves)


@over_dtypes
@over_pairs
def test_errors_that_build_on_one_another(pairs, dtype) -> None:
    """Matryoshka: nested prefixes, each one's error the rest of the next."""
    _, _, W_dec, _, _, rest = weights(dtype)
    f = randn(len(pairs.latents), dtype=dtype, seed=8)
    leaves = [t.requires_grad_() for t in (f, W_dec, rest)]
    totals, left, plain = [], rest, []
    for start, end in ((0, 3), (3, 4), (4, S)):
        here = pairs.before(end) & ~pairs.before(start)
        total, left = pairs.where(here).squared_error(f[here], W_dec, left)
        totals.append(total)
        first = torch.where(pairs.latents < end, f, 0)
        plain.append((rest - everywhere(first, pairs) @ W_dec).square().sum())
    for total, wanted in zip(totals, plain, strict=True):
        torch.testing.assert_close(total, wanted, **CLOSE[dtype])
    fast = sum(i * total for i, total in enumerate(totals, 1))
    assert_gradients(fast, sum(i * total for i, total in enumerate(plain, 1)), leaves)


@over_dtypes
@pytest.mark.parametrize("held", ["W_dec", "rest", "both"])
def test_what_is_held_fast_gets_no_gradient_and_changes_no_other(held, dtype) -> None:
    pairs = PAIRS["half"]
    _, _, W_dec, _, _, rest = weights(dtype)
    f = randn(len(pairs.latents), dtype=dtype, seed=8).requires_grad_()
    leaves = [f]
    leaves += [W_dec.requires_grad_()] if held == "rest" else []
    leaves += [rest.requires_grad_()] if held == "W_dec" else []
    plain = (rest - everywhere(f, pairs) @ W_dec).square().sum()
    assert_gradients(pairs.squared_error(f, W_dec, rest)[0], plain, leaves)


@over_pairs
def test_which_latents_fired_and_which_pairs_are_kept(pairs) -> None:
    fires = torch.rand(len(pairs.latents), generator=torch.Generator().manual_seed(4)) < 0.3
    assert torch.equal(pairs.fired(fires), everywhere(fires.int(), pairs).bool().any(0))
    kept = pairs.where(fires)
    assert torch.equal(kept.tokens, pairs.tokens[fires])
    assert torch.equal(kept.latents, pairs.latents[fires])
    assert len(kept.starts) == B + 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 12), st.data())
def test_any_set_of_pairs(B, S, data) -> None:
    flat = torch.tensor(data.draw(st.lists(st.integers(0, B * S - 1), unique=True)), dtype=torch.int64)
    pairs = ragged(torch.zeros(B * S, dtype=torch.bool).index_fill(0, flat, True).view(B, S))
    for dtype in DTYPES:
        x, W_enc, W_dec, bias, shift, rest = weights(dtype, B, S)
        leaves = [t.requires_grad_() for t in (W_enc, W_dec, bias, shift, rest)]
        dense = (x - shift) @ W_enc + bias
        p = pairs.preactivations(
            dense.detach()[pairs.tokens, pairs.latents], (x - shift).detach(), W_enc, bias, shift
        )
        fast = pairs.squared_error(p.relu() * pairs.of(bias), W_dec, rest)[0]
        mask = everywhere(torch.ones(len(p), dtype=dtype), pairs)
        assert_gradients(fast, (rest - mask * dense.relu() * bias @ W_dec).square().sum(), leaves)


def test_latents_nobody_chose_get_no_gradient() -> None:
    x, W_enc, W_dec, bias, _, rest = weights(torch.float32, 4, 10)
    pairs = Pairs.of_rows(torch.tensor([[2], [2], [7], [2]]), 10)
    W_enc.requires_grad_()
    bias.requires_grad_()
    W_dec.requires_grad_()
    p = pairs.preactivations((x @ W_enc + bias).detach()[pairs.tokens, pairs.latents], x, W_enc, bias, None)
    (p.sum() + pairs.squared_error(p, W_dec, rest)[0]).backward()
    others = [0, 1, 3, 4, 5, 6, 8, 9]
    assert not W_enc.grad[:, others].any()
    assert not W_dec.grad[others].any()
    p = pairs.preactivations(p.detach(), x, W_enc, bias, None)
    assert torch.autograd.grad(p.sum(), bias)[0].tolist() == [0, 0, 3, 0, 0, 0, 0, 1, 0, 0]


@over_dtypes
def test_a_grid_is_plain_algebra(dtype) -> None:
    x, W_enc, W_dec, bias, shift, rest = weights(dtype)
    leaves = [t.requires_grad_() for t in (W_enc, W_dec, bias, shift, rest)]
    grid = Grid(dtype)
    p = grid.preactivations(x - shift, W_enc, bias)
    assert torch.equal(p, (x - shift) @ W_enc + bias)
    total, error = grid.squared_error(p.relu() * grid.of(bias), W_dec, rest)
    plain = rest - (((x - shift) @ W_enc + bias).relu() * bias) @ W_dec
    torch.testing.assert_close(error, plain, **CLOSE[dtype])
    torch.testing.assert_close(total, plain.square().sum(), **CLOSE[dtype])
    assert_gradients(total + error.sum(), plain.square().sum() + plain.sum(), leaves)
    assert torch.equal(grid.fired(p > 1), (p > 1).any(0))


def test_a_grid_of_rounded_operands_is_near_the_exact_one() -> None:
    x, W_enc, W_dec, bias, _, rest = weights(torch.float32)
    leaves = [t.requires_grad_() for t in (x, W_enc, W_dec, bias, rest)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        grid = Grid(dtype)
        f = grid.preactivations(x, W_enc, bias).relu()
        total, error = grid.squared_error(f, W_dec, rest)
        mean = grid.total(f, bias)
        gradients = torch.autograd.grad(total + error.sum() + mean, leaves)
        assert all(t.dtype == torch.float32 for t in (total, error, mean, *gradients)), "as the weights are"
        found.append([f.float(), total, error, mean, *gradients])
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_lie_in_memory_as_the_weights_do(dense) -> None:
    x, W_enc, W_dec, bias, shift, rest = weights(torch.float32)
    for leaf in (W_enc, W_dec):
        leaf.requires_grad_()
    p = (x - shift) @ W_enc.detach() + bias
    if dense:
        at = Grid(torch.float32)
        p = at.preactivations(x - shift, W_enc, bias)
    else:
        at = PAIRS["half"]
        p = at.preactivations(p[at.tokens, at.latents], x - shift, W_enc, bias, shift)
    # Asked of autograd, not of `.grad`, which would be copied into the weight's layout
    g_enc, g_dec = torch.autograd.grad(at.squared_error(p, W_dec, rest)[0], (W_enc, W_dec))
    assert g_enc.stride() == W_enc.stride() == (1, D)
    assert g_dec.stride() == W_dec.stride() == (E, 1)
