"""Metrics that are right by construction: the mean predictor gives 0, a perfect reconstruction 1."""

from __future__ import annotations

import pytest
import torch
from conftest import SITE, sentences

from saekit.errors import InvalidInput
from saekit.evaluation import evaluate
from saekit.sae import SAE
from saekit.sites import capture
from saekit.tokens import tokenize


@pytest.fixture(scope="module")
def tokens(model):
    return tokenize(sentences(12), model, 32)


@pytest.fixture(scope="module")
def x(model, tokens):
    return torch.cat([capture(model, [SITE], b.ids)[SITE][b.ids != 0] for b in tokens.batches(8)])


def blank(**weights):
    sae = SAE.new("standard", d_in=256, d_sae=512, site=SITE)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights.get(name, torch.zeros_like(parameter)))
    return sae


def test_predicting_the_mean_explains_nothing(model, tokens, x) -> None:
    figures = evaluate(model, blank(b_dec=x.mean(0)), tokens)
    assert figures["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert figures["fvu"] == pytest.approx(1, abs=1e-5)
    assert (figures["l0"], figures["dead"], figures["dead_latents"]) == (0, 1, 512)
    assert figures["tokens"] == len(x)


def test_a_perfect_reconstruction_explains_and_recovers_everything(model, tokens) -> None:
    # ReLU(x) − ReLU(−x) = x: 512 latents say 256 numbers exactly.
    identity = torch.eye(256)
    sae = blank(W_enc=torch.cat([identity, -identity], 1), W_dec=torch.cat([identity, -identity]))
    figures = evaluate(model, sae, tokens)
    for name in ("explained_variance", "ce_recovered", "kl_recovered", "cosine", "norm_ratio", "bias"):
        assert figures[name] == pytest.approx(1, abs=1e-4), name
    assert figures["ce_sae"] == pytest.approx(figures["ce_clean"], abs=1e-5)
    assert figures["kl_sae"] == pytest.approx(0, abs=1e-5)
    assert figures["l0"] == pytest.approx(256)


def test_reconstructing_zero_is_zero_ablation(model, tokens) -> None:
    figures = evaluate(model, blank(), tokens)
    assert figures["ce_recovered"] == pytest.approx(0, abs=1e-6)
    assert figures["kl_recovered"] == pytest.approx(0, abs=1e-6)
    assert figures["ce_sae"] == pytest.approx(figures["ce_zero"])


def test_against_figures_computed_at_once(model, tokens, x, sae) -> None:
    figures = evaluate(model, sae, tokens)
    with torch.no_grad():
        f, x_hat = sae.encode(x), sae(x)
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert figures["explained_variance"] == pytest.approx(float(expected), abs=1e-4)
    assert figures["l0"] == pytest.approx(float((f != 0).float().sum(1).mean()), rel=1e-5)
    assert figures["dead_latents"] == int((~(f != 0).any(0)).sum())
    ids = torch.stack(list(tokens))
    log_p = model(ids)[:, :-1].detach().log_softmax(-1)
    losses = -log_p.gather(2, ids[:, 1:, None])[..., 0][(ids[:, :-1] != 0) & (ids[:, 1:] != 0)]
    assert figures["ce_clean"] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_works_on_llama_and_stops_early(llama) -> None:
    site = "blocks.2.hook_resid_post"
    sae = SAE.new("topk", d_in=64, d_sae=128, k=16, site=site)
    figures = evaluate(llama, sae, tokenize(sentences(40), llama, 64), max_tokens=300)
    assert 300 <= figures["tokens"] < 300 + 16 * 64


@pytest.mark.usefixtures("no_leaked_hooks")
def test_nothing_to_evaluate_is_an_error(model, sae) -> None:
    with pytest.raises(InvalidInput, match="no token to evaluate on"):
        evaluate(model, sae, torch.zeros(2, 8, dtype=torch.long))
    with pytest.raises(InvalidInput, match="no token to evaluate on"):
        evaluate(model, sae, [])


def test_without_faithfulness(model, sae, tokens) -> None:
    assert "ce_recovered" not in evaluate(model, sae, tokens, faithfulness=False)
