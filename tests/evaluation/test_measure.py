"""Metrics that are right by construction: the mean predictor gives 0, a perfect reconstruction 1."""

from __future__ import annotations

import pytest
import torch
from conftest import SITE, sentences

from saekit.errors import InvalidInput
from saekit.evaluation import assess, evaluate
from saekit.sae import SAE
from saekit.sites import capture, editing
from saekit.tokens import tokenize


@pytest.fixture(scope="module")
def tokens(model):
    """Of twelve documents, the first two sentences of each."""
    return tokenize([". ".join(text.split(". ")[:2]) for text in sentences(12)], model, 16)


@pytest.fixture(scope="module")
def few(model):
    """One batch of contexts, two documents."""
    return tokenize(sentences(2), model, 32)


@pytest.fixture(scope="module")
def x(model, tokens):
    return torch.cat([capture(model, [SITE], b.ids)[SITE][b.ids != 0] for b in tokens.batches(8)])


@pytest.fixture(scope="module")
def figures(model, tokens, sae):
    return evaluate(model, sae, tokens)


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


def test_against_figures_computed_at_once(model, tokens, x, sae, figures) -> None:
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


def kept_ids(tokens):
    """The contexts with which of their tokens are ordinary, and which positions are scored."""
    ids = torch.stack(list(tokens))
    kept = ids != 0
    return ids, kept, torch.cat([kept[:, :-1] & kept[:, 1:], torch.zeros(len(ids), 1, dtype=torch.bool)], 1)


@torch.no_grad()
def losses(model, tokens, edits):
    """Mean CE and mean KL(clean ‖ edited) over scored positions, computed at once with plain hooks."""
    ids, kept, scored = kept_ids(tokens)
    clean = model(ids).log_softmax(-1)
    put = {
        site: (lambda x, edit=edit: torch.where(kept[..., None], edit(x), x)) for site, edit in edits.items()
    }
    with editing(model, put):
        edited = model(ids).log_softmax(-1)
    ce = -edited.gather(2, ids.roll(-1, 1)[..., None])[..., 0][scored].mean()
    kl = (clean.exp() * (clean - edited)).sum(-1)[scored].mean()
    return float(ce), float(kl)


def test_splicing_is_reconstructing_in_the_forward(model, tokens, sae, figures) -> None:
    # For an autoencoder, x̂ of clean activations put in beforehand is the SAE called inside the forward.
    ce, kl = losses(model, tokens, {SITE: sae})
    assert figures["ce_sae"] == pytest.approx(ce, rel=1e-5)
    assert figures["kl_sae"] == pytest.approx(kl, rel=1e-4)


def test_mean_ablation(model, tokens, x, figures) -> None:
    ce, kl = losses(model, tokens, {SITE: lambda _: x.mean(0)})
    assert figures["ce_mean"] == pytest.approx(ce, rel=1e-5)
    assert figures["kl_mean"] == pytest.approx(kl, rel=1e-4)
    lost = (figures["ce_mean"] - figures["ce_sae"]) / (figures["ce_mean"] - figures["ce_clean"])
    assert figures["ce_recovered_mean"] == pytest.approx(lost)
    predicts_it = evaluate(model, blank(b_dec=x.mean(0)), tokens)
    assert predicts_it["ce_recovered_mean"] == pytest.approx(0, abs=1e-4)
    assert predicts_it["kl_recovered_mean"] == pytest.approx(0, abs=1e-4)


def test_the_mean_of_the_first_contexts_serves_a_stream_read_once(model, tokens, sae, monkeypatch) -> None:
    ids = torch.stack(list(tokens))[:18, :8]
    whole = evaluate(model, sae, ids)
    assert evaluate(model, sae, iter(ids)) == whole
    monkeypatch.setattr(
        "saekit.evaluation.measure.MEAN_CONTEXTS", 1
    )  # a batch, here 16 contexts, is the least
    first = evaluate(model, sae, ids)
    assert first["ce_mean"] != whole["ce_mean"] == pytest.approx(first["ce_mean"], rel=0.05)
    del first["ce_mean"], whole["ce_mean"]
    others = [name for name in whole if "mean" not in name or name.startswith("mean")]
    assert [first[name] for name in others] == [whole[name] for name in others]


MLP_IN, MLP_OUT = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"


@pytest.fixture(scope="module")
def transcoder():
    draw = torch.Generator().manual_seed(0)
    sae = SAE.new("topk", d_in=256, d_out=256, d_sae=64, k=8, site=MLP_IN, target_site=MLP_OUT, skip=True)
    with torch.no_grad():
        sae.W_skip.copy_(0.05 * torch.randn(256, 256, generator=draw))
    return sae


def test_a_transcoder_reads_one_site_and_is_spliced_in_at_the_other(model, few, transcoder) -> None:
    figures = evaluate(model, transcoder, few)
    ids, kept, _ = kept_ids(few)
    seen = capture(model, [MLP_IN, MLP_OUT], ids)
    with torch.no_grad():
        x_hat = transcoder(seen[MLP_IN])
    y = seen[MLP_OUT][kept]
    expected = 1 - (y - x_hat[kept]).square().sum() / (y - y.mean(0)).square().sum()
    assert figures["explained_variance"] == pytest.approx(float(expected), rel=1e-4)
    assert figures["mse"] == pytest.approx(float((y - x_hat[kept]).square().sum(1).mean()), rel=1e-4)
    ce, kl = losses(model, few, {MLP_OUT: lambda _: x_hat})
    assert (figures["ce_sae"], figures["kl_sae"]) == pytest.approx((ce, kl), rel=1e-4)
    assert figures["ce_mean"] == pytest.approx(
        losses(model, few, {MLP_OUT: lambda _: y.mean(0)})[0], rel=1e-4
    )
    assert figures["ce_zero"] == pytest.approx(losses(model, few, {MLP_OUT: torch.zeros_like})[0], rel=1e-4)


def test_a_transcoder_that_is_the_mean_of_its_target(model, few) -> None:
    ids, kept, _ = kept_ids(few)
    y = capture(model, [MLP_OUT], ids)[MLP_OUT][kept]
    sae = SAE.new("standard", d_in=256, d_out=256, d_sae=8, site=MLP_IN, target_site=MLP_OUT)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(y.mean(0))
    figures = evaluate(model, sae, few)
    assert figures["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert figures["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)


def test_a_crosscoder_is_measured_per_site_and_spliced_in_at_all_of_them(model, few) -> None:
    sites = ["blocks.1.hook_resid_pre", SITE]
    sae = SAE.new("topk", d_in=512, d_sae=64, k=8, site=sites)
    figures = evaluate(model, sae, few)
    ids, kept, _ = kept_ids(few)
    seen = capture(model, sites, ids)
    with torch.no_grad():
        parts = sae.split(sae(torch.cat([seen[site] for site in sites], -1)))
    error, variance = 0.0, 0.0
    for site, part in zip(sites, parts, strict=True):
        y = seen[site][kept]
        mine = float((y - part[kept]).square().sum()), float((y - y.mean(0)).square().sum())
        assert figures[f"explained_variance/{site}"] == pytest.approx(1 - mine[0] / mine[1], rel=1e-4)
        assert figures[f"explained_variance/{site}_low"] < figures[f"explained_variance/{site}_high"]
        error, variance = error + mine[0], variance + mine[1]
    assert figures["explained_variance"] == pytest.approx(1 - error / variance, rel=1e-4)
    edits = {site: (lambda _, part=part: part) for site, part in zip(sites, parts, strict=True)}
    assert (figures["ce_sae"], figures["kl_sae"]) == pytest.approx(losses(model, few, edits), rel=1e-4)


def test_centred_and_rescaled_saes_are_spliced_in_as_they_reconstruct(model, few, sae) -> None:
    import dataclasses

    for change in ({"center_input": True}, {"rescale_acts_by_decoder_norm": True}):
        other = SAE(dataclasses.replace(sae.config, **change))
        with torch.no_grad():
            for name, value in sae.named_parameters():
                dict(other.named_parameters())[name].copy_(value)
            other.W_dec.mul_(1.5)
        figures = evaluate(model, other, few)
        assert figures["ce_sae"] == pytest.approx(losses(model, few, {SITE: other})[0], rel=1e-4), change


def test_intervals_come_with_two_documents_and_hold_the_figure(model, tokens, sae, figures) -> None:
    assert figures["documents"] == 12  # documents, though they are packed into other contexts
    for name in ("mse", "explained_variance", "fvu", "cosine", "ce_recovered", "kl_recovered_mean"):
        assert figures[f"{name}_low"] < figures[name] < figures[f"{name}_high"], name
    assert figures["fvu_low"] == pytest.approx(1 - figures["explained_variance_high"])
    assert all(isinstance(value, (int, float)) and value == value for value in figures.values())
    ids = torch.stack(list(tokens))
    two = evaluate(model, sae, ids[:2])
    assert two == evaluate(model, sae, ids[:2])
    assert two["documents"] == 2
    alone = evaluate(model, sae, ids[:1])
    assert alone["documents"] == 1
    assert not [name for name in alone if name.endswith(("_low", "_high"))]


def test_density_is_the_firing_rate(model, tokens, x, sae) -> None:
    made = assess(model, sae, tokens, faithfulness=False)
    with torch.no_grad():
        rate = (sae.encode(x) != 0).double().mean(0)
    assert torch.allclose(made.density, rate)
    assert float(made.density.sum()) == pytest.approx(made.figures["l0"])
    assert made.figures == evaluate(model, sae, tokens, faithfulness=False)
