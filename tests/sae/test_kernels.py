"""Every kernel against its plain twin: values and all gradients, in float64."""

from __future__ import annotations

import pytest
import torch

from saekit.sae.kernels import Pairs, decode_at, decode_at_plain, preacts_at, preacts_at_plain

SHAPES = [(1, 3, 4, 1), (7, 5, 16, 3), (64, 8, 32, 32), (33, 16, 8, 2)]  # B, D, S, K


def weights(B, D, S, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, W_enc_rows, W_dec, b_enc, b_dec = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((B, D), (S, D), (S, D), (S,), (D,))
    )
    return x, W_enc_rows.t(), W_dec, b_enc, b_dec


def leaves(*tensors):
    return [t.detach().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("B", "D", "S", "K"), SHAPES)
def test_preacts_at_equals_its_twin_with_all_gradients(B, D, S, K) -> None:
    x, W_enc, _, b_enc, b_dec = weights(B, D, S)
    p = (x - b_dec) @ W_enc + b_enc
    pairs = Pairs(p.topk(K).indices, S)
    upstream = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    results = []
    for kernel in (preacts_at, preacts_at_plain):
        inputs = leaves(x, W_enc, b_enc, b_dec)
        values = kernel(p, *inputs, pairs)
        results.append([values, *torch.autograd.grad(values, inputs, upstream)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize(("B", "D", "S", "K"), SHAPES)
def test_decode_at_equals_its_twin_with_all_gradients(B, D, S, K) -> None:
    x, _, W_dec, _, _ = weights(B, D, S)
    latents = torch.rand(B, S, generator=torch.Generator().manual_seed(1)).topk(K).indices
    pairs = Pairs(latents, S)
    values = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for kernel in (decode_at, decode_at_plain):
        inputs = leaves(values, W_dec)
        out = kernel(*inputs, pairs)
        results.append([out, *torch.autograd.grad(out, inputs, x)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)


def test_latents_nobody_chose_get_no_gradient() -> None:
    x, W_enc, _, b_enc, b_dec = weights(4, 3, 10)
    pairs = Pairs(torch.tensor([[2], [2], [7], [2]]), 10)
    inputs = leaves(x, W_enc, b_enc, b_dec)
    p = (x - b_dec) @ W_enc + b_enc
    g = torch.autograd.grad(preacts_at(p, *inputs, pairs).sum(), inputs[2])[0]
    assert g.tolist() == [0, 0, 3, 0, 0, 0, 0, 1, 0, 0]


def test_gradients_lie_in_memory_as_the_weights_do() -> None:
    x, W_enc, _, b_enc, b_dec = weights(4, 3, 10)
    inputs = leaves(x, W_enc, b_enc, b_dec)
    p = (x - b_dec) @ W_enc + b_enc
    preacts_at(p, *inputs, Pairs(p.topk(2).indices, 10)).sum().backward()
    assert inputs[1].grad.stride() == W_enc.stride() == (1, 3)
