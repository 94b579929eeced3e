"""Objectives against their equations written out with plain autograd, every gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from saekit.sae import SAE, objectives

B, D, S, K = 40, 6, 24, 3


def make(architecture, **options):
    sae = SAE.new(architecture, d_in=D, d_sae=S, seed=1, dtype="float64", **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(S, generator=draw))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=draw))
    return sae, torch.randn(B, D, generator=draw, dtype=torch.float64)


def gradients(loss, sae):
    return dict(
        zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters())), strict=True)
    )


def assert_same(loss, expected, sae):
    torch.testing.assert_close(loss, expected)
    fast, plain = gradients(loss, sae), gradients(expected, sae)
    for name in fast:
        torch.testing.assert_close(fast[name], plain[name], msg=name)
        assert plain[name].abs().sum() > 0, f"{name} gets no gradient: the test would not see a missing one"


def test_standard() -> None:
    sae, x = make("standard")
    f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    x_hat = f @ sae.W_dec + sae.b_dec
    scale, l1 = 1.7, 0.3
    expected = (
        scale**2 * ((x - x_hat) ** 2).sum(1).mean() + l1 * scale * (f * sae.W_dec.norm(dim=1)).sum(1).mean()
    )
    got = objectives.standard(sae, x, scale=scale, l1_coefficient=l1)
    assert_same(got.loss, expected, sae)
    assert float(got.l0) == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert torch.equal(got.fired, (f > 0).any(0))


def plain_topk(sae, x, dead, aux_coefficient, aux_k):
    p = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = p.topk(K, dim=1)
    f = torch.zeros_like(p).scatter(1, kept.indices, kept.values.relu())
    e = x - (f @ sae.W_dec + sae.b_dec)
    loss = (e**2).sum() / ((x - x.mean(0)) ** 2).sum()
    if dead is not None:
        masked = torch.where(dead, p, -torch.inf).topk(min(aux_k, int(dead.sum())), dim=1)
        f_dead = torch.zeros_like(p).scatter(1, masked.indices, masked.values.relu())
        residual = e.detach()
        loss = loss + aux_coefficient * ((residual - f_dead @ sae.W_dec) ** 2).sum() / (residual**2).sum()
    return loss, f


@pytest.mark.parametrize("n_dead", [0, 1, 5, 20])
def test_topk_with_auxk_into_every_parameter(n_dead) -> None:
    sae, x = make("topk", k=K)
    dead = torch.zeros(S, dtype=torch.bool)
    dead[torch.randperm(S, generator=torch.Generator().manual_seed(n_dead))[:n_dead]] = True
    dead = dead if n_dead else None
    expected, f = plain_topk(sae, x, dead, 0.5, 4)
    got = objectives.topk(sae, x, dead=dead, aux_coefficient=0.5, aux_k=4)
    assert_same(got.loss, expected, sae)
    assert torch.equal(got.fired, (f > 0).any(0))
    torch.testing.assert_close(got.l0.double(), (f > 0).sum(1).double().mean())


def test_auxk_trains_dead_encoders() -> None:
    # The trap seen in a peer: a custom backward that drops this gradient never revives anything.
    sae, x = make("topk", k=K)
    with torch.no_grad():
        sae.b_enc[-4:] = -50.0  # far from the top k …
        sae.W_enc[:, -4:] *= 100  # … though positive on some tokens
    dead = torch.zeros(S, dtype=torch.bool)
    dead[-4:] = True
    p = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert (p[:, -4:] > 0).any()
    with torch.no_grad():
        sae.b_enc[:-4] = 1e4
    loss = objectives.topk(sae, x, dead=dead, aux_coefficient=1.0, aux_k=2).loss
    g = gradients(loss, sae)["W_enc"][:, -4:]
    assert g.abs().sum() > 0
