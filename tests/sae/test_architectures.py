"""Objectives against their equations written out with plain autograd, every gradient, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saekit.sae import SAE, choosing
from saekit.sae.architectures import ARCHITECTURES, Terms
from saekit.sae.pairs import Above, Pairs

B, D, S, K = 40, 6, 24, 3
SCALE, LAMBDA = 1.7, 0.3
TAKES_K = ("topk", "batchtopk", "matryoshka")
SHAPES = {
    "autoencoder": {},
    "transcoder": {"d_out": 5},
    "skip transcoder": {"d_out": 5, "skip": True},
    "crosscoder": {"site": ["a", "b"], "widths": [4, 2]},
}


@pytest.fixture(params=[1.0, 0.0], ids=["pairs", "grid"])
def layout(request, monkeypatch):
    """The pairs that matter, or all of them."""
    monkeypatch.setattr(choosing, "DENSE", request.param)


def make(architecture, **options):
    """An SAE with no vector at zero, a batch and its target."""
    if architecture in TAKES_K:
        options = {"k": K} | options
    sae = SAE.new(architecture, d_in=D, d_sae=S, seed=1, dtype="float64", **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter += 0.1 * noise.abs() if name == "threshold" else 0.1 * noise
    x = torch.randn(B, D, generator=draw, dtype=torch.float64)
    y = torch.randn(B, sae.d_out, generator=draw, dtype=torch.float64) if sae.is_transcoder else x
    return sae, x, y


def run(sae, x, y, dead=None, **terms):
    """The objective; dead: a mask [S]."""
    if dead is not None:
        terms["dead"] = dead.nonzero().squeeze(1)
    return sae.kind.objective(sae, x, y, Terms(scale=SCALE, sparsity=LAMBDA, k=K, **terms))


def gradients(loss, sae):
    parameters = dict(sae.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def assert_same(loss, expected, sae):
    torch.testing.assert_close(loss, expected)
    fast, plain = gradients(loss, sae), gradients(expected, sae)
    for name in fast:
        torch.testing.assert_close(fast[name], plain[name], msg=name)
        assert plain[name].abs().sum() > 0, f"{name} gets no gradient: the test would not see a missing one"


# The equations once more, as plainly as they can be written


def preactivations(sae, x):
    bias = sae.b_gate if sae.architecture == "gated" else sae.b_enc
    return (x if sae.is_transcoder else x - sae.b_dec) @ sae.W_enc + bias


def reconstruction(sae, f, x):
    return f @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.t() if sae.config.skip else 0)


def norms(sae):
    widths = [4, 2] if sae.is_crosscoder else [sae.d_out]
    return sum(part.norm(dim=1) for part in sae.W_dec.split(widths, dim=1))


def squared(error):
    return error.square().sum(1).mean()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_standard(shape, layout) -> None:
    sae, x, y = make("standard", **shape)
    f = preactivations(sae, x).relu()
    expected = (
        SCALE**2 * squared(y - reconstruction(sae, f, x)) + LAMBDA * SCALE * (f * norms(sae)).sum(1).mean()
    )
    got = run(sae, x, y)
    assert_same(got.loss, expected, sae)
    assert float(got.l0) == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert torch.equal(got.fired, (f > 0).any(0))
    torch.testing.assert_close(got.mse, squared(y - reconstruction(sae, f, x)).detach())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gated(shape, layout) -> None:
    sae, x, y = make("gated", **shape)
    gate = preactivations(sae, x)
    f = (gate > 0) * (sae.r_mag.exp() * (gate - sae.b_gate) + sae.b_mag).relu()
    W_dec, b_dec = sae.W_dec.detach(), sae.b_dec.detach()
    frozen = gate.relu() @ W_dec + b_dec + (x @ sae.W_skip.detach().t() if sae.config.skip else 0)
    expected = (
        SCALE**2 * squared(y - reconstruction(sae, f, x))
        + LAMBDA * SCALE * (gate.relu() * norms(sae).detach()).sum(1).mean()
        + SCALE**2 * squared(y - frozen)
    )
    assert_same(run(sae, x, y).loss, expected, sae)


def pseudo_derivatives(p: Tensor, threshold: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Rajamanoharan 2024, equations 11 and 12: ∂ JumpReLU / ∂θ and ∂ step / ∂θ."""
    near = (((p - threshold) / width).abs() < 0.5).double()
    return -threshold / width * near, -near / width


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_jumprelu(penalty, shape, layout) -> None:
    """A surrogate with the same value whose plain gradients are the paper's pseudo-derivatives."""
    sae, x, y = make("jumprelu", **shape)
    width = 0.4
    p = preactivations(sae, x)
    of_jump, of_step = pseudo_derivatives(p.detach(), sae.threshold.detach(), width)
    moved = sae.threshold - sae.threshold.detach()
    if penalty == "tanh":  # the jump is felt by p as well, the other way round
        moved = moved - (p - p.detach())
    gate = (p > sae.threshold).double()
    f = p * gate + of_jump * moved
    expected = SCALE**2 * squared(y - reconstruction(sae, f, x))
    if penalty == "tanh":
        expected = expected + LAMBDA * torch.tanh(4.0 * f * SCALE * norms(sae)).sum(1).mean()
        expected = expected + 0.2 * ((sae.threshold - p).relu() * SCALE * norms(sae)).sum(1).mean()
    else:
        expected = expected + LAMBDA * (gate + of_step * moved).sum(1).mean()
    got = run(sae, x, y, bandwidth=width, l0_penalty=penalty, preact=0.2)
    assert_same(got.loss, expected, sae)


def test_the_estimator_is_the_derivative_of_the_expectation() -> None:
    """Mean over smooth data of the straight-through gradient = derivative of the mean (the paper's section 4)."""
    p = torch.randn(2_000_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, width, h = 0.7, 0.1, 0.05
    at = Above(Pairs.of_rows(torch.zeros_like(p, dtype=torch.int64), 1), p.squeeze(1))
    for which in ("f", "counts"):

        def mean(threshold: Tensor, which: str = which) -> Tensor:
            f, _, counts = at.jump(threshold, width)
            return f.mean() if which == "f" else counts[0] / len(p)

        threshold = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
        estimate = torch.autograd.grad(mean(threshold), threshold)[0]
        above, below = (mean(torch.tensor([theta + d], dtype=torch.float64)) for d in (h, -h))
        torch.testing.assert_close(estimate[0], (above - below) / (2 * h), rtol=0.02, atol=0)


def chosen(architecture, p, k):
    """Latents kept, [B, S]."""
    if architecture == "topk":
        kept = p.topk(k, dim=1)
        return torch.zeros_like(p).scatter(1, kept.indices, kept.values.relu())
    smallest = p.flatten().topk(k * len(p)).values[-1]
    return torch.where(p >= smallest, p, 0).relu()


def plain_topk(sae, x, y, dead, aux, aux_k):
    p = preactivations(sae, x)
    f = chosen(sae.architecture, p, K)
    prefixes = sae.prefixes if sae.architecture == "matryoshka" else (S,)
    parts = [torch.where(torch.arange(S) < m, f, 0) for m in prefixes]
    errors = [y - reconstruction(sae, part, x) for part in parts]
    loss = sum((e**2).sum() for e in errors) / ((y - y.mean(0)) ** 2).sum()
    if dead is not None:
        masked = torch.where(dead, p, -torch.inf).topk(min(aux_k, int(dead.sum())), dim=1)
        f_dead = torch.zeros_like(p).scatter(1, masked.indices, masked.values.relu())
        residual = errors[-1].detach()
        loss = loss + aux * ((residual - f_dead @ sae.W_dec) ** 2).sum() / (residual**2).sum()
    return loss * SCALE**2 * squared(y - y.mean(0)), f


def some_dead(n):
    dead = torch.zeros(S, dtype=torch.bool)
    dead[torch.randperm(S, generator=torch.Generator().manual_seed(n))[:n]] = True
    return dead if n else None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n_dead", [0, 1, 5, 20])
@pytest.mark.parametrize("architecture", TAKES_K)
def test_the_topk_family_with_auxk_into_every_parameter(architecture, n_dead, shape) -> None:
    sae, x, y = make(architecture, **shape)
    dead = some_dead(n_dead)
    expected, f = plain_topk(sae, x, y, dead, 0.5, 4)
    got = run(sae, x, y, dead=dead, aux=0.5, aux_k=4)
    assert_same(got.loss, expected, sae)
    assert torch.equal(got.fired, (f > 0).any(0))
    torch.testing.assert_close(got.l0.double(), (f > 0).sum(1).double().mean())
    torch.testing.assert_close(got.smallest, f[f > 0].min().detach())


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_auxk_for_the_dense_architectures(architecture, layout) -> None:
    sae, x, y = make(architecture)
    dead = some_dead(5)
    p = preactivations(sae, x)
    masked = torch.where(dead, p, -torch.inf).topk(4, dim=1)
    f_dead = torch.zeros_like(p).scatter(1, masked.indices, masked.values.relu())
    residual = run(sae, x, y).error
    expected = 0.5 * SCALE**2 * squared(residual - f_dead @ sae.W_dec)
    without, with_aux = run(sae, x, y).loss, run(sae, x, y, dead=dead, aux=0.5, aux_k=4).loss
    torch.testing.assert_close(with_aux - without, expected)
    more, plain = gradients(with_aux - without, sae), gradients(expected, sae)
    for name in ("W_enc", "W_dec", "b_dec", sae.kind.bias):
        torch.testing.assert_close(more[name], plain[name], msg=name)
        assert plain[name].abs().sum() > 0


def test_auxk_trains_dead_encoders() -> None:
    # The trap seen in a peer: a custom backward that drops this gradient never revives anything.
    sae, x, y = make("topk")
    with torch.no_grad():
        sae.b_enc[:-4] = 1e4  # the last four never get among the top k …
        sae.W_enc[:, -4:] *= 100  # … though they are positive on some tokens
    dead = torch.zeros(S, dtype=torch.bool)
    dead[-4:] = True
    assert (preactivations(sae, x)[:, -4:] > 0).any()
    loss = run(sae, x, y, dead=dead, aux=1.0, aux_k=2).loss
    assert gradients(loss, sae)["W_enc"][:, -4:].abs().sum() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_are_zero_where_the_objective_says_they_are(architecture, layout) -> None:
    """Training and use are one: with the threshold training would set, the same latents fire with the same values."""
    sae, x, y = make(architecture)
    got = run(sae, x, y)
    if sae.kind.running_threshold:
        sae.threshold.copy_(got.smallest - 1e-12)
    f = sae.encode(x)
    torch.testing.assert_close((f > 0).sum(1).double().mean(), got.l0.double())
    assert torch.equal((f > 0).any(0), got.fired)
    torch.testing.assert_close(y - sae(x), got.error)
