"""The operations at pairs, and everywhere, against dense autograd: values and every gradient.

In float64 plain torch does the work; in float32, where there is a compiler, the compiled kernels.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.sae import pairs as pairs_module
from saekit.sae.pairs import Above, Grid, Pairs

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


def above(p, bound=0.0):
    """The pairs at which p [B, S] exceeds a bound, with a graph to p."""
    chosen = p.detach() > bound
    return Above(ragged(chosen), p[chosen])


def spread(f, at):
    """Latents f as [B, S]."""
    return everywhere(f, at.pairs) if isinstance(at, Above) else f


class Everything:
    """An encoder and a decoder, and p [B, S] with a graph to what made it, looked at as pairs or as a grid."""

    def __init__(self, dtype, layout, shifted=True, bound=0.0):
        self.x, self.W_enc, self.W_dec, self.bias, self.shift, self.rest = weights(dtype)
        self.vectors = [randn(S, dtype=dtype, seed=20 + i).requires_grad_() for i in range(3)]
        self.leaves = [self.W_enc, self.bias, self.W_dec, self.rest, *([self.shift] if shifted else [])]
        for leaf in self.leaves:
            leaf.requires_grad_()
        x = self.x - self.shift if shifted else self.x
        self.p = x @ self.W_enc + self.bias
        shift = self.shift if shifted else None
        grid = Grid(x.detach(), self.W_enc, self.bias, shift, dtype)
        self.at = grid if layout == "grid" else above(self.p, bound)


over_layouts = pytest.mark.parametrize("layout", ["pairs", "grid"])


@over_dtypes
@over_layouts
@pytest.mark.parametrize("shifted", [True, False])
def test_relu_and_what_follows(layout, shifted, dtype) -> None:
    """Values and every gradient of all that an objective may make of it, against dense autograd."""
    all = Everything(dtype, layout, shifted)
    v, g = all.vectors[0], randn(B, E, dtype=dtype, seed=9)
    f, sums, counts = all.at.relu()
    plain = all.p.relu()
    torch.testing.assert_close(spread(f, all.at), plain, **CLOSE[dtype])
    torch.testing.assert_close(sums, plain.sum(0), **CLOSE[dtype])
    assert torch.equal(counts, (plain > 0).sum(0).to(dtype))
    total, error = all.at.squared_error(f, all.W_dec, all.rest)
    e = all.rest - plain @ all.W_dec
    torch.testing.assert_close(error, e, **CLOSE[dtype])
    fast, slow = (
        3 * total + (error * g).sum() + sums @ v + (f * all.at.of(v)).square().sum(),
        3 * e.square().sum() + (e * g).sum() + plain.sum(0) @ v + (plain * v).square().sum(),
    )
    assert_gradients(fast, slow, [*all.leaves, v])


@over_dtypes
@over_layouts
@pytest.mark.parametrize("felt", [False, True])
def test_jump_and_what_follows(layout, felt, dtype) -> None:
    """A surrogate with the same values whose plain gradients are the estimators."""
    width = 0.6
    all = Everything(dtype, layout, bound=-1.0)
    threshold, v, w = all.vectors
    threshold.data.abs_().add_(0.1)
    f, sums, counts = all.at.jump(threshold, width, felt=felt)
    fires = (all.p > threshold).to(dtype)
    near = ((all.p - threshold).abs() < width / 2).to(dtype).detach()
    moved = threshold - threshold.detach()
    slope = near * threshold.detach() / width
    plain = all.p * fires - slope * (moved - (all.p - all.p.detach() if felt else 0))
    n = (fires - near / width * moved).sum(0)
    torch.testing.assert_close(spread(f, all.at), plain, **CLOSE[dtype])
    torch.testing.assert_close(sums, (all.p * fires).sum(0), **CLOSE[dtype])
    assert torch.equal(counts, fires.sum(0).to(dtype))
    total = all.at.squared_error(f, all.W_dec, all.rest)[0]
    e = all.rest - plain @ all.W_dec
    fast = 3 * total + sums @ v + counts @ w
    assert_gradients(
        fast, 3 * e.square().sum() + (all.p * fires).sum(0) @ v + n @ w, [*all.leaves, *all.vectors]
    )


@over_dtypes
@over_layouts
def test_gate_and_what_follows(layout, dtype) -> None:
    all = Everything(dtype, layout)
    a, b, v = all.vectors
    gate, f, sums, counts = all.at.gate(a, b)
    plain = (all.p > 0) * (a * all.p.relu() + b).relu()
    for found, wanted in ((gate, all.p.relu()), (f, plain)):
        torch.testing.assert_close(spread(found, all.at), wanted, **CLOSE[dtype])
    torch.testing.assert_close(sums, all.p.relu().sum(0), **CLOSE[dtype])
    assert torch.equal(counts, (plain > 0).sum(0).to(dtype))
    fast = 3 * all.at.squared_error(f, all.W_dec, all.rest)[0] + sums @ v
    fast = fast + all.at.squared_error(gate, all.W_dec.detach(), all.rest)[0]
    slow = 3 * (all.rest - plain @ all.W_dec).square().sum() + all.p.relu().sum(0) @ v
    slow = slow + (all.rest - all.p.relu() @ all.W_dec.detach()).square().sum()
    assert_gradients(fast / 100, slow / 100, [*all.leaves, *all.vectors])


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
def test_how_often_latents_fire_and_which_pairs_are_kept(pairs) -> None:
    fires = torch.rand(len(pairs.latents), generator=torch.Generator().manual_seed(4)) < 0.3
    f = torch.where(fires, 1.5, 0.0)
    assert torch.equal(pairs.counts(f), everywhere(fires.float(), pairs).sum(0))
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


def test_a_grid_of_rounded_operands_is_near_the_exact_one() -> None:
    x, W_enc, W_dec, bias, shift, rest = weights(torch.float32)
    leaves = [t.requires_grad_() for t in (W_enc, W_dec, bias, shift, rest)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        grid = Grid((x - shift).detach(), W_enc, bias, shift, dtype)
        f, sums, counts = grid.relu()
        total, error = grid.squared_error(f, W_dec, rest)
        mean = sums @ bias
        gradients = torch.autograd.grad(total + error.sum() + mean, leaves)
        assert f.dtype == dtype
        assert all(t.dtype == torch.float32 for t in (sums, counts, total, error, *gradients)), (
            "as the weights are"
        )
        found.append([f.float(), total, error, mean, *gradients])
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 24, 1000])
def test_a_grid_s_gradient_does_not_depend_on_its_blocks(block, dtype, monkeypatch) -> None:
    x, W_enc, _, bias, shift, _ = weights(torch.float32)
    leaves = [t.requires_grad_() for t in (W_enc, bias, shift)]
    found = []
    for size in (S, block):
        monkeypatch.setattr(pairs_module, "BLOCK", size)
        f, sums, _ = Grid((x - shift).detach(), W_enc, bias, shift, dtype).relu()
        found.append(torch.autograd.grad(f.float().square().sum() + sums.sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_gradients_lie_in_memory_as_the_weights_do(dense) -> None:
    x, W_enc, W_dec, bias, shift, rest = weights(torch.float32)
    for leaf in (W_enc, W_dec):
        leaf.requires_grad_()
    p = (x - shift) @ W_enc.detach() + bias
    if dense:
        at = Grid(x - shift, W_enc, bias, shift, torch.float32)
        p, _, _ = at.relu()
    else:
        at = PAIRS["half"]
        p = at.preactivations(p[at.tokens, at.latents], x - shift, W_enc, bias, shift)
    # Asked of autograd, not of `.grad`, which would be copied into the weight's layout
    g_enc, g_dec = torch.autograd.grad(at.squared_error(p, W_dec, rest)[0], (W_enc, W_dec))
    assert g_enc.stride() == W_enc.stride() == (1, D)
    assert g_dec.stride() == W_dec.stride() == (E, 1)
