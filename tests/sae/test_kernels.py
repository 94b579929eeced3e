"""The compiled kernels against plain torch: whatever the shapes and numbers, and however many threads there are.

Compiled twice, for the processor at hand and for one of which nothing is known: the source has a way of its own for each.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saekit.sae import kernels, native

some = settings(max_examples=40, deadline=None, derandomize=True)
FLAGS = {"this processor": native.FLAGS, "any processor": native.PORTABLE}
DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")
ENOUGH = 40 * 2**15  # multiply-adds with which several threads are worth it


@pytest.fixture(scope="module", params=FLAGS.values(), ids=FLAGS, autouse=True)
def library(request):
    """The kernels as these flags build them, in place of the ones at hand."""
    with patch.object(native, "FLAGS", request.param), patch.dict(os.environ):
        os.environ.pop("SAEKIT_NATIVE", None)
        built = native.library() if request.param is native.FLAGS else native._built.__wrapped__()
        if built is None:
            pytest.skip("no C++ compiler: plain torch is all there is")
        with patch.object(native, "_built", lambda: built):
            yield built


@contextmanager
def plainly():
    with patch.dict(os.environ, {"SAEKIT_NATIVE": "0"}):
        yield


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def both(function, *arguments):
    """Of a kernel: (compiled, plain), as tuples."""
    fast = function(*arguments)
    with plainly():
        plain = function(*arguments)
    return tuple(r if isinstance(r, tuple) else (r,) for r in (fast, plain))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def pairs(lengths, S, seed=0):
    """(tokens, latents, starts) of a token each length, its latents drawn with repetition."""
    tokens = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    latents = torch.randint(S, (len(tokens),), generator=torch.Generator().manual_seed(seed))
    return tokens, latents, starts_of(lengths)


def first_of_equals(p, bias, k):
    """The k largest by a stable sort: NaN below everything, of equals the lower latents."""
    q = p + bias
    order = torch.where(q.isnan(), -INF, q).sort(dim=1, descending=True, stable=True).indices
    latents = order[:, :k].sort(dim=1).values
    return q.gather(1, latents), latents


# The k largest of each row

SIZES = st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 511, 512, 513, 600, 1030, 2048, 2500])


@some
@given(SIZES, st.sampled_from(DTYPES), st.data())
def test_top_k_of_any_numbers(S, dtype, data) -> None:
    k = data.draw(st.sampled_from([1, S, max(1, S // 2)]) | st.integers(1, min(S, 70)))
    seed = data.draw(st.integers(0, 1000))
    p = randn(3, S, seed=seed)
    coarse = data.draw(st.booleans())  # then ties are many
    p = ((p * 2).round() / 2 if coarse else p).to(dtype)
    bias = (randn(S, seed=1) * 2).round() if coarse else randn(S, seed=seed + 1)
    got = kernels.top_k(p, bias, k)
    for fast, exact in zip(got, first_of_equals(p, bias, k), strict=True):
        assert torch.equal(fast, exact)
    with plainly():
        values, _ = kernels.top_k(p, bias, k)
    assert torch.equal(got[0].sort(dim=1).values, values.sort(dim=1).values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, INF, -INF])
@pytest.mark.parametrize(("S", "k"), [(7, 3), (16, 16), (700, 1), (700, 50), (700, 700), (9000, 64)])
def test_of_equal_numbers_the_lower_latents(S, k, value, dtype) -> None:
    values, latents = kernels.top_k(torch.full((2, S), value, dtype=dtype), torch.zeros(S), k)
    assert torch.equal(latents, torch.arange(k).expand(2, k))
    assert torch.equal(values, torch.full((2, k), value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [20, 2000])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_infinities_are_numbers(S, k, dtype) -> None:
    p = randn(4, S).to(dtype)
    p[0, 1::3] = INF
    p[1, 1::3] = -INF
    p[2] = -INF
    p[2, 7] = 3.0
    p[3, -1] = INF
    for fast, exact in zip(
        kernels.top_k(p, torch.zeros(S), k), first_of_equals(p, torch.zeros(S), k), strict=True
    ):
        assert torch.equal(fast, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [20, 2000])
@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_nan_crashes_nothing_and_disturbs_no_other_row(S, share, dtype) -> None:
    p, bias = randn(5, S).to(dtype), randn(S, seed=1)
    p[2, torch.rand(S, generator=torch.Generator().manual_seed(2)) < share] = NAN
    values, latents = kernels.top_k(p, bias, 12)
    assert 0 <= latents.min() <= latents.max() < S
    assert (latents.diff(dim=1) > 0).all(), "each latent once"
    others = torch.tensor([0, 1, 3, 4])
    for fast, exact in zip((values, latents), first_of_equals(p, bias, 12), strict=True):
        assert torch.equal(fast[others], exact[others])
    found, where, starts = kernels.above(p, bias, torch.zeros(S))
    with plainly():
        for fast, exact in zip((found, where, starts), kernels.above(p, bias, torch.zeros(S)), strict=True):
            assert torch.equal(fast, exact)
    assert not found.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_latent_with_a_bias_of_minus_1e30_is_never_chosen(dtype) -> None:
    p, bias = randn(6, 1500).to(dtype), torch.zeros(1500)
    off = torch.rand(1500, generator=torch.Generator().manual_seed(3)) < 0.95
    bias[off] = -1e30
    for fast, exact in zip(kernels.top_k(p, bias, 40), first_of_equals(p, bias, 40), strict=True):
        assert torch.equal(fast, exact)
    assert not off[kernels.top_k(p, bias, 40)[1]].any()
    assert not off[kernels.above(p, bias, torch.full((1500,), -1e29))[1]].any()


def test_other_layouts_and_numbers_are_taken_by_plain_torch() -> None:
    bias = randn(30, seed=1)
    for p in (randn(30, 8).t(), randn(8, 60)[:, :30]):
        assert torch.equal(kernels.top_k(p, bias, 4)[1], first_of_equals(p, bias, 4)[1])
    p = randn(8, 30).double()
    values, latents = kernels.top_k(p, bias.double(), 4)
    assert values.dtype == torch.float64
    assert torch.equal(latents, first_of_equals(p, bias.double(), 4)[1])


# What exceeds a bound


@some
@given(
    st.integers(0, 5),
    SIZES,
    st.sampled_from(DTYPES),
    st.sampled_from([-INF, -1e30, -1.0, 0.0, 1.0, 3.0, INF]),
)
def test_above_any_bound(B, S, dtype, bound) -> None:
    p = (randn(B, S, seed=S) * 4).round() / 4  # some lie on the bound, which is not above it
    bounds = torch.full((S,), bound) if bound != 1.0 else 1.0 + randn(S, seed=2).round()
    fast, plain = both(kernels.above, p.to(dtype), randn(S, seed=1).round(), bounds)
    for one, other in zip(fast, plain, strict=True):
        assert torch.equal(one, other)
    assert len(fast[2]) == B + 1


# The k-th largest


@some
@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, INF, -INF]),
        min_size=1,
        max_size=70,
    ),
    st.data(),
)
@example([INF] * 3, None)
@example([-INF] * 3, None)
@example([-0.0, 0.0], None)
@example([2.0**-149, -(2.0**-149), 0.0], None)
@example([-3.4028234663852886e38, 3.4028234663852886e38], None)
def test_the_kth_largest_of_any_numbers(numbers, data) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    for k in [1, len(numbers)] if data is None else [data.draw(st.integers(1, len(numbers)))]:
        ((fast,), (plain,)) = both(kernels.kth_largest, values, k)
        assert fast == plain == values.sort(descending=True).values[k - 1]


# Sums over pairs

LENGTHS = st.lists(st.integers(0, 4) | st.integers(0, 40), max_size=12)
WIDTHS = st.integers(1, 40) | st.sampled_from([64, 255, 256, 257, 273, 512, 530])


@some
@given(LENGTHS, st.integers(1, 20))
def test_pairs_are_sorted_by_latent_and_keep_their_order(lengths, S) -> None:
    tokens, latents, _ = pairs(lengths, S)
    fast, plain = both(kernels.by_latent, latents, tokens, S)
    for one, other in zip(fast, plain, strict=True):
        assert torch.equal(one, other)
    order, theirs, starts = fast
    assert torch.equal(order, latents.argsort(stable=True))
    assert torch.equal(theirs, tokens[order])
    assert torch.equal(starts.diff(), latents.bincount(minlength=S))


@some
@given(LENGTHS, WIDTHS)
def test_segment_sum_of_any_segments(lengths, W) -> None:
    _, index, starts = pairs(lengths, 9)
    weights, table = randn(len(index), seed=1), randn(9, W, seed=2)
    (fast,), (plain,) = both(kernels.segment_sum, index, weights, starts, table)
    assert fast.shape == (len(lengths), W)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)


@some
@given(LENGTHS, st.integers(1, 20), WIDTHS)
def test_sums_of_pairs_in_another_order(lengths, S, W) -> None:
    tokens, latents, _ = pairs(lengths, S)
    order, theirs, starts = kernels.by_latent(latents, tokens, S)
    weights, table = randn(len(order), seed=1), randn(max(1, len(lengths)), W, seed=2)
    (fast,), (plain,) = both(kernels.segment_sum, theirs, weights, starts, table, order)
    wanted = torch.zeros(S, W).index_add(0, latents, weights[:, None] * table[tokens])
    for found in (fast, plain):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    (fast,), (plain,) = both(kernels.segment_total, weights, order, starts)
    for found in (fast, plain):
        torch.testing.assert_close(found, torch.zeros(S).index_add(0, latents, weights), rtol=1e-5, atol=1e-5)


@some
@given(LENGTHS, WIDTHS)
def test_pair_dots_of_any_pairs(lengths, W) -> None:
    tokens, latents, starts = pairs(lengths, 9)
    a, b = randn(len(lengths), W, seed=1), randn(9, W, seed=2)
    (fast,), (plain,) = both(kernels.pair_dots, tokens, latents, starts, a, b)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-4)


@some
@given(LENGTHS, WIDTHS)
def test_decode_error_of_any_pairs(lengths, W) -> None:
    tokens, latents, starts = pairs(lengths, 9)
    values, rows, rest = randn(len(latents), seed=1), randn(9, W, seed=2), randn(len(lengths), W, seed=3)
    fast, plain = both(kernels.decode_error, tokens, latents, starts, values, rows, rest)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


# Every latent of every token


def assert_alike(fast, plain, dtype):
    """Equal to rounding: of bfloat16 the last bit may differ, where a sum is rounded once instead of twice."""
    for one, other in zip(fast, plain, strict=True):
        assert one.dtype == other.dtype
        last = 2**-7 if one.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one, other, rtol=last, atol=1e-4 if dtype == torch.float32 else 2e-2)


def grid(S, B, dtype, seed=0):
    """Coarse numbers, so that some lie on thresholds and bounds; and one row of none but zeros."""
    p = ((randn(S, B, seed=seed) * 8).round() / 8).to(dtype)
    p[0] = 0
    return p


TOKENS = st.integers(1, 40) | st.sampled_from([255, 256, 257])
vectors = lambda S, n: [(randn(S, seed=9 + i) * 8).round() / 8 for i in range(n)]  # noqa: E731


@some
@given(st.integers(1, 9), TOKENS, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.125, 0.3]), st.booleans())
def test_jump_of_any_numbers(S, B, dtype, half, relu) -> None:
    p, (bias, threshold) = grid(S, B, dtype), vectors(S, 2)
    threshold = torch.zeros(S) if relu else threshold.abs() + 0.125
    found = p.clone(), p.clone()
    fast = kernels.jump(found[0], bias, threshold, half)
    with plainly():
        plain = kernels.jump(found[1], bias, threshold, half)
    assert torch.equal(*found)
    assert torch.equal(found[0].signbit(), found[1].signbit())
    assert_alike(fast, plain, dtype)
    v, bound = p.float() + bias[:, None], threshold[:, None]
    assert torch.equal(found[0], torch.where(v > bound, v, 0).to(dtype))
    assert torch.equal(found[0].signbit(), (v <= bound) & (v > bound - half))
    assert torch.equal(fast[1], (found[0] > 0).sum(1).float())


@some
@given(
    st.integers(1, 9),
    TOKENS,
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.125, 0.3]),
    st.sampled_from([0.0, 2.0]),
)
def test_the_gradient_of_a_jump(S, B, dtype, half, felt) -> None:
    f, (bias, threshold, lift), g = grid(S, B, dtype), vectors(S, 3), randn(S, B, seed=3).to(dtype)
    threshold = threshold.abs() + 0.125
    p = f.float() + bias[:, None]
    kernels.jump(f, bias, threshold, half)
    fast, plain = both(kernels.jump_back, f, g, threshold, lift, half, felt)
    assert_alike(fast, plain, dtype)
    near = (p - threshold[:, None]).abs() < half
    assert torch.equal(fast[3], near.sum(1).float())
    slope = torch.where(near, felt * threshold[:, None] * g, 0)
    wanted = torch.where(p > threshold[:, None], g + lift[:, None], 0) + slope
    assert_alike(fast[:1], (wanted.to(dtype),), dtype)


@some
@given(st.integers(1, 9), TOKENS, st.sampled_from(DTYPES))
def test_a_gate_of_any_numbers_and_its_gradient(S, B, dtype) -> None:
    p, (bias, a, b, lift) = grid(S, B, dtype), vectors(S, 4)
    found = p.clone(), p.clone()
    fast = kernels.gate(found[0], bias, a, b)
    with plainly():
        plain = kernels.gate(found[1], bias, a, b)
    assert torch.equal(*found)
    assert_alike(fast[:2], plain[:2], dtype)
    assert ((fast[2] - plain[2]).abs() <= 1).all(), "a sum that is zero but for rounding may be either"
    gate = found[0].clone()
    assert torch.equal(gate, (p.float() + bias[:, None]).relu().to(dtype))
    g_gate, g_f = (randn(S, B, seed=seed).to(dtype) for seed in (3, 4))
    assert_alike(*both(kernels.gate_back, gate, g_gate, g_f, a, b, lift), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_where_all_latents_are_looked_at(dtype) -> None:
    for function, wanted in ((kernels.jump, (0.0, 0.1)), (kernels.gate, None)):
        p = randn(3, 40).to(dtype)
        p[1, 5] = p[1, 39] = NAN
        at = [torch.zeros(3), wanted[1]] if wanted else [torch.ones(3), torch.zeros(3)]
        function(p, torch.zeros(3), *at)
        assert p.isnan().nonzero().tolist() == [[1, 5], [1, 39]]
        nan_of_all_bits = torch.tensor([0, 0, 2**31 - 1], dtype=torch.int32).view(torch.float32)
        function(p, nan_of_all_bits, *at)
        assert p[2].isnan().all()


# Products of a few rows

WIDTHS = st.sampled_from([1, 5, 16, 31, 32, 33, 64, 95, 200])
PRODUCTS = {
    "linear": torch.inference_mode()(kernels.linear),
    "conv1d": torch.inference_mode()(kernels.conv1d),
}


def factors(rows, D, S, dtype, seed=0, *, product="linear", bias=True):
    """x [rows, D], weight and bias of a product."""
    shape = (S, D) if product == "linear" else (D, S)
    given = randn(rows, D, seed=seed), randn(*shape, seed=seed + 1), randn(S, seed=seed + 2)
    x, weight, b = (t.to(dtype) for t in given)
    return x, weight, b if bias else None


def exactly(x, weight, bias, product):
    """The product in float64."""
    y = x.double() @ (weight.double().t() if product == "linear" else weight.double())
    return y if bias is None else y + bias.double()


def error_of(rounding, x, weight, bias, product):
    """What sums in float32, rounded to a dtype, may be off by, entry by entry."""
    terms = exactly(x.abs(), weight.abs(), None if bias is None else bias.abs(), product)
    return rounding * terms.abs() + 2e-6 * terms


@pytest.mark.parametrize("product", PRODUCTS)
@some
@given(
    st.integers(1, kernels.FEW + 2),
    WIDTHS,
    WIDTHS,
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_product_of_a_few_rows(product, rows, D, S, dtype, bias, seed) -> None:
    given = factors(rows, D, S, dtype, seed, product=product, bias=bias)
    ((fast,), (plain,)) = both(PRODUCTS[product], *given)
    assert fast.dtype == plain.dtype == dtype
    assert fast.shape == plain.shape == (rows, S)
    exact = exactly(*given, product)
    for found in (fast, plain):
        half_a_step = 2**-8 if dtype == torch.bfloat16 else 0
        off = (found.double() - exact).abs()
        # torch may round a bfloat16 sum before it adds the bias
        assert (off <= error_of(half_a_step * (1 if found is fast else 2), *given, product)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_row_among_others_is_what_it_is_alone(product, dtype) -> None:
    x, weight, bias = factors(kernels.FEW, 70, 130, dtype, product=product)
    function = PRODUCTS[product]
    for n in range(1, kernels.FEW + 1):
        together = function(x[:n], weight, bias)
        for i in range(n):
            assert torch.equal(together[i : i + 1], function(x[i : i + 1], weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_keeps_other_dimensions_and_what_is_no_number(product, dtype) -> None:
    x, weight, bias = factors(6, 40, 50, dtype, product=product)
    flat = PRODUCTS[product](x, weight, bias)
    assert torch.equal(PRODUCTS[product](x.view(2, 3, 40), weight, bias), flat.view(2, 3, 50))
    assert torch.equal(PRODUCTS[product](x.t().contiguous().t(), weight, bias), flat)
    for odd in (NAN, INF):
        x[1, 7] = odd
        ((fast,), (plain,)) = both(PRODUCTS[product], x, weight, bias)
        assert fast[1].isfinite().logical_not().all()
        assert torch.equal(fast[1].isnan(), plain[1].isnan())
        assert torch.equal(fast[[0, 2, 3, 4, 5]], flat[[0, 2, 3, 4, 5]])


def test_which_products_are_left_to_torch(library) -> None:
    x, weight, bias = factors(2, 8, 8, torch.float32)
    asked = []
    with patch.object(native, "call", lambda name, *_: asked.append(name)):
        for function in PRODUCTS.values():
            function(x, weight, bias)
            with plainly():
                function(x, weight, bias)
        assert asked == ["linear_f32", "conv1d_f32"]
        for other in (
            (x.double(), weight.double(), bias.double()),
            (x.half(), weight.half(), bias.half()),
            (x, weight.t(), bias),
            (x.repeat(kernels.FEW, 1), weight, bias),
            (x[:0], weight, bias),
        ):
            for function in PRODUCTS.values():
                function(*other)
    assert len(asked) == 2


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_outside_of_inference_mode_has_every_derivative(product) -> None:
    function = {"linear": kernels.linear, "conv1d": kernels.conv1d}[product]
    given = [t.double() for t in factors(2, 3, 4, torch.float32, product=product)]
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        of = [t.clone().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
        assert torch.autograd.gradcheck(function, of)
        single = [
            t.detach().float().requires_grad_(t.requires_grad) for t in of
        ]  # what the kernels would take
        assert function(*single).requires_grad
    x, weight, bias = (t.float() for t in given)
    with torch.no_grad():
        each = torch.func.vmap(lambda row: function(row[None], weight, bias)[0])(x)
        torch.testing.assert_close(each, function(x, weight, bias))


# Threads


def in_place(function):
    """Of what writes over its first argument: without that, and with what it wrote."""

    def kept(p, *arguments):
        p = p.clone()
        return p, *function(p, *arguments)

    kept.__name__ = function.__name__
    return kept


UNEVEN = [3000, *[0] * 50, *range(200), *[1] * 300, 0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_same_bits_with_any_number_of_threads(n) -> None:
    tokens, latents, starts = pairs(UNEVEN, 400)
    B, W = len(UNEVEN), 70
    assert len(tokens) * W > ENOUGH
    weights, rows, rest = randn(len(tokens), seed=1), randn(400, W, seed=2), randn(B, W, seed=3)
    p, bias = randn(200, 9000), randn(9000, seed=1)
    assert p.numel() > ENOUGH
    many = (
        torch.randint(400, (6 * 2**15,), generator=torch.Generator().manual_seed(5)),
        torch.arange(6 * 2**15),
    )
    calls = [
        (kernels.top_k, p, bias, 20),
        (kernels.top_k, p.bfloat16(), bias, 20),
        (kernels.above, p, bias, torch.full_like(bias, 2.0)),
        (kernels.by_latent, latents, tokens, 400),
        (kernels.by_latent, *many, 400),
        (kernels.segment_sum, latents, weights, starts, rows),
        (in_place(kernels.jump), p, randn(200), torch.rand(200), 0.1),
        (in_place(kernels.jump), p.bfloat16(), randn(200), torch.rand(200), 0.1),
        (kernels.jump_back, p, p + 1, torch.rand(200), randn(200), 0.1, 2.0),
        (in_place(kernels.gate), p, randn(200), randn(200, seed=1), randn(200, seed=2)),
        (kernels.gate_back, p, p + 1, p - 1, randn(200), randn(200, seed=1), randn(200, seed=2)),
        (kernels.pair_dots, tokens, latents, starts, rest, rows),
        (kernels.decode_error, tokens, latents, starts, weights, rows, rest),
        (PRODUCTS["linear"], *factors(2, 700, 9000, torch.float32)),
        (PRODUCTS["conv1d"], *factors(2, 700, 9000, torch.float32, product="conv1d")),
    ]
    for function, *arguments in calls:
        with threads(1):
            one = function(*arguments)
        with threads(n):
            several = function(*arguments)
        with plainly():
            plain = function(*arguments)
        for a, b, c in zip(
            *(r if isinstance(r, tuple) else (r,) for r in (one, several, plain)), strict=True
        ):
            assert torch.equal(a, b), function.__name__
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-2)
