"""The GPU's kernels against plain torch: on a GPU where there is one, and always in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so one test runs this file again in a process of its own,
where the tests that stay out here take place on the CPU. Another one compiles every kernel for a GPU that need not be
there, since the interpreter accepts more than the compiler does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton is not installed: these kernels are not in use here")

from saekit.sae import triton_kernels  # noqa: E402
from saekit.sae.triton_kernels import decode_error, pair_dots, segment_sum, top_k  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
here = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU: test_the_kernels_in_the_interpreter runs this",
)
beside = pytest.mark.skipif(INTERPRETED, reason="runs beside the interpreter, not in it")
few = settings(max_examples=10, deadline=None, derandomize=True)

INDICES = [torch.int32, torch.int64]
TABLES = [torch.float32, torch.bfloat16]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 2.0**-140]


@beside
def test_the_kernels_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def randint(high, n, dtype=torch.int64, seed=0):
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def starts_of(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, dtype)


def segment_sum_plain(index, weights, starts, table):
    segments = torch.arange(len(starts) - 1, device=DEVICE).repeat_interleave(starts.diff().long())
    out = torch.zeros(len(starts) - 1, table.shape[1], dtype=torch.float64, device=DEVICE)
    return out.index_add_(0, segments, weights.double()[:, None] * table.double()[index.long()]).float()


def top_k_plain(p, bias, k):
    q = p + bias
    latents = q.sort(descending=True, stable=True).indices[:, :k].sort().values
    return q.gather(1, latents), latents


@here
@few
@given(
    st.lists(st.integers(0, 5) | st.integers(0, 30), max_size=9),
    st.integers(1, 20),
    st.sampled_from(INDICES),
    st.sampled_from(TABLES),
)
def test_segment_sum_of_any_segments(lengths, W, integers, numbers) -> None:
    starts, n = starts_of(lengths, integers), sum(lengths)
    index, weights, table = randint(6, n, integers), randn(n, seed=1), randn(6, W, dtype=numbers)
    with patch.object(triton_kernels, "CHUNK", 4):  # segments of 4 and more are cut
        out = segment_sum(index, weights, starts, table)
    torch.testing.assert_close(out, segment_sum_plain(index, weights, starts, table))


@here
@pytest.mark.parametrize(("W", "lengths"), [(37, [0, 3, 700, 0, 127, 128, 129, 0]), (1030, [300, 0, 9])])
def test_segment_sum_where_one_latent_fires_on_all_tokens(W, lengths) -> None:
    starts = starts_of(lengths)
    n = int(starts[-1])
    index, weights, table = randint(50, n), randn(n, seed=1), randn(50, W, seed=2)
    out = segment_sum(index, weights, starts, table)
    torch.testing.assert_close(out, segment_sum_plain(index, weights, starts, table), rtol=1e-5, atol=1e-4)
    assert torch.equal(out, segment_sum(index, weights, starts, table))


@here
@few
@given(
    st.integers(0, 40),
    st.integers(1, 20) | st.just(600),
    st.sampled_from(INDICES),
    st.sampled_from(TABLES),
    st.sampled_from(TABLES),
)
def test_pair_dots_of_any_pairs(n, W, integers, left, right) -> None:
    tokens, latents = randint(5, n, integers), randint(7, n, integers, seed=1)
    a, b = randn(5, W, dtype=left), randn(7, W, dtype=right, seed=2)
    plain = (a.double()[tokens.long()] * b.double()[latents.long()]).sum(1).float()
    torch.testing.assert_close(pair_dots(tokens, latents, a, b), plain, rtol=1e-5, atol=1e-4)


@here
@few
@given(
    st.lists(st.integers(0, 5) | st.integers(0, 40), max_size=6),
    st.integers(1, 20),
    st.sampled_from(INDICES),
    st.sampled_from(TABLES),
    st.booleans(),
)
def test_decode_error_of_any_pairs(lengths, W, integers, numbers, wide) -> None:
    starts, n = starts_of(lengths, integers), sum(lengths)
    tokens = torch.arange(len(lengths), device=DEVICE).repeat_interleave(starts.diff(), output_size=n)
    latents, values = randint(6, n, integers), randn(n, seed=1)
    rows, rest = randn(6, W, dtype=numbers), randn(len(lengths), W, seed=2)
    with patch.object(triton_kernels, "WIDEST", 0 if wide else 4096):
        fast = decode_error(tokens, latents, starts, values, rows, rest)
    error = rest - segment_sum_plain(latents, values, starts, rows)
    dots = (error.double()[tokens] * rows.double()[latents.long()]).sum(1).float()
    for one, other in zip(fast, (error, error.square().sum(1), dots), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@here
@few
@given(st.data(), st.integers(1, 40), st.sampled_from(TABLES), st.booleans())
def test_top_k_of_any_numbers(data, S, numbers, grouped) -> None:
    k = data.draw(st.integers(1, S) | st.integers(1, max(1, S // 4)))
    drawn = data.draw(st.lists(st.sampled_from(SPECIAL) | st.floats(width=16), min_size=S, max_size=S))
    p = torch.tensor([drawn, drawn[::-1]], dtype=numbers, device=DEVICE)
    bias = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, -0.0, 0.5]), min_size=S, max_size=S)), device=DEVICE
    )
    with patch.object(triton_kernels, "WHOLE_ROW", 1 if grouped else 2048):
        values, latents = top_k(p, bias, k)
    wanted, where = top_k_plain(p, bias, k)
    assert torch.equal(latents, where)  # of equal ones the first
    torch.testing.assert_close(values, wanted, rtol=0, atol=0, equal_nan=True)


@here
def test_top_k_takes_minus_zero_for_zero_and_nan_first() -> None:
    p = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [torch.inf, -torch.nan, 0.0, torch.nan]], device=DEVICE)
    minus_zero = torch.full((4,), -0.0, device=DEVICE)
    assert top_k(p, minus_zero, 1)[1].tolist() == [[1], [1]]
    assert top_k(p, minus_zero, 2)[1].tolist() == [[1, 2], [1, 3]]


@here
@pytest.mark.parametrize("numbers", TABLES)
def test_top_k_as_training_calls_it(numbers) -> None:
    p, bias = randn(3, 5001, dtype=numbers), randn(5008, seed=1)[:5001]
    p[0, -1], p[1, :7] = 9, 8  # what follows a row in memory is not the rest of its last group
    p[1, 32:] = -bias[32:].to(numbers)  # with ties
    for fast, plain in zip(top_k(p, bias, 64), top_k_plain(p, bias, 64), strict=True):
        assert torch.equal(fast, plain)


@here
@pytest.mark.parametrize(
    ("S", "k", "size"),
    [
        (2048, 5, 0),
        (2049, 600, 0),
        (4097, 1024, 2),
        (24_576, 32, 32),
        (131_072, 512, 16),
        (20_000, 9_000, None),
    ],
)
def test_groups_are_at_least_k_and_fit_in_one_program(S, k, size) -> None:
    assert triton_kernels.group_size(S, k) == size
    assert not size or (triton.cdiv(S, size) >= k and max(triton.cdiv(S, size), k * size) <= 16_384)


@here
def test_nothing_in_nothing_out() -> None:
    none, table = randint(1, 0), randn(3, 4)
    assert torch.equal(
        segment_sum(none, randn(0), starts_of([0, 0]), table), torch.zeros(2, 4, device=DEVICE)
    )
    assert segment_sum(none, randn(0), starts_of([]), table).shape == (0, 4)
    assert pair_dots(none, none, table, table).shape == (0,)
    assert [t.shape for t in top_k(randn(0, 9), randn(9), 2)] == [(0, 2), (0, 2)]


@here
@pytest.mark.parametrize("K", [3, 16])
def test_the_gradients_of_a_topk_sae_equal_autograds(K) -> None:
    B, D, S = 24, 10, 16
    x = randn(B, D)
    W_enc, W_dec, b_enc = (
        randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(S, D), (S, D), (S,)])
    )
    p = x @ W_enc.t() + b_enc
    chosen = torch.zeros_like(p).scatter_(1, p.topk(K).indices, 1.0)
    plain = (p * chosen) @ W_dec
    wanted = torch.autograd.grad((plain - x).square().sum(), (W_enc, W_dec, b_enc))

    with torch.no_grad():
        values, latents = (t.flatten() for t in top_k(x @ W_enc.t(), b_enc, K))
        tokens = torch.arange(B, device=DEVICE).repeat_interleave(K)
        error, squares, dots = decode_error(tokens, latents, starts_of([K] * B), values, W_dec, x)
        torch.testing.assert_close(squares, (x - plain).square().sum(1), rtol=1e-5, atol=1e-5)
        g, g_values = -2 * error, -2 * dots
        in_order, order = latents.sort(stable=True)
        starts = torch.searchsorted(in_order, torch.arange(S + 1, device=DEVICE))
        g_W_enc = segment_sum(tokens[order], g_values[order], starts, x)
        g_W_dec = segment_sum(tokens[order], values[order], starts, g)
        g_b_enc = segment_sum(tokens[order], g_values[order], starts, torch.ones_like(x)[:, :1].contiguous())
    for fast, grad in zip((g_W_enc, g_W_dec, g_b_enc.squeeze(1)), wanted, strict=True):
        torch.testing.assert_close(fast, grad, rtol=1e-5, atol=1e-4)


class Compiled:
    """Stands for a kernel: a launch compiles it for a Hopper GPU as it would be launched, and runs nothing."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches = 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *values, **options) -> None:
        fixed = [parameter.is_constexpr for parameter in self.kernel.params]
        constants = {(i,): v for i, v in enumerate(values) if fixed[i] or (isinstance(v, int) and v == 1)}
        signature = {
            name: "constexpr" if (i,) in constants else POINTERS[v.dtype] if torch.is_tensor(v) else "i32"
            for i, (name, v) in enumerate(zip(self.kernel.arg_names, values, strict=True))
        }
        source = triton.compiler.ASTSource(self.kernel, signature, constants)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=options)
        assert compiled.asm["cubin"]
        self.launches += 1


@beside
@pytest.mark.parametrize("numbers", TABLES)
def test_every_kernel_compiles_for_a_gpu(numbers, monkeypatch, tmp_path) -> None:
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = {}
    for name in (
        "_sum_chunks",
        "_sum_segments",
        "_dots",
        "_decode_error",
        "_group_maxima",
        "_select_groups",
        "_select",
    ):
        kernels[name] = Compiled(getattr(triton_kernels, name))
        monkeypatch.setattr(triton_kernels, name, kernels[name])
    index, weights = torch.zeros(256, dtype=torch.int64), torch.zeros(256)
    table = torch.zeros(4, 768, dtype=numbers)
    segment_sum(index, weights, torch.tensor([0, 256], dtype=torch.int32), table)
    pair_dots(index.int(), index, table, table)
    decode_error(index, index, torch.tensor([0, 256]), weights, table, torch.zeros(1, 768))
    top_k(torch.zeros(2, 24_576, dtype=numbers), torch.zeros(24_576), 32)
    top_k(torch.zeros(2, 512, dtype=numbers), torch.zeros(512), 1)
    assert {name: kernel.launches for name, kernel in kernels.items()} == dict.fromkeys(kernels, 1) | {
        "_select": 2
    }
