"""What the weights say, held against the model's own modules and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import SITE

import saekit
from saekit.catalog import effects
from saekit.catalog.effects import encoder_cosine, logit_effects, nearest, neurons
from saekit.sae import SAE


@pytest.fixture(scope="module")
def gemma(model, tmp_path_factory):
    """A small Gemma 2, whose final norm stores its gain as a difference from 1."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=8192, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, query_pre_attn_scalar=12,
        max_position_embeddings=64, sliding_window=32, final_logit_softcapping=None,
    )  # fmt: skip
    made = Gemma2ForCausalLM(config)
    with torch.no_grad():
        made.model.norm.weight.normal_(0.0, 0.5)
    folder = tmp_path_factory.mktemp("gemma") / "model"
    made.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return saekit.load_model(folder, dtype="float32", device="cpu")


@pytest.fixture(params=["model", "llama", "gemma"])
def lm(request):
    return request.getfixturevalue(request.param)


def directions(lm, n: int = 7, width: int | None = None) -> torch.Tensor:
    return torch.randn(n, width or lm.cfg.d_model, generator=torch.Generator().manual_seed(1))


def through_the_head(lm, rows: torch.Tensor) -> torch.Tensor:
    """[S, V]: what the model's own final norm and unembedding make of the rows, the norm's division undone."""
    x = torch.cat([torch.zeros_like(rows[:1]), rows])[None]
    with torch.no_grad():
        logits = lm.unembed(lm.ln_final(x))[0]
    spread = rows.var(1, correction=0) if lm.cfg.normalization_type == "LN" else rows.square().mean(1)
    return (logits[1:] - logits[0]) * (spread + lm.cfg.eps).sqrt()[:, None]


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_mlp_out", "hook_out"])
def test_logit_effects_are_those_of_the_models_own_head(lm, site, monkeypatch) -> None:
    monkeypatch.setattr(effects, "AT_ONCE", 2 * lm.cfg.d_vocab)  # several chunks
    rows = directions(lm)
    expected = through_the_head(lm, rows)
    found = logit_effects(lm, rows, f"blocks.1.{site}", 10)
    assert found is not None
    scale = float(expected.abs().max())
    for ids, values, best in (
        (found.raised_ids, found.raised, expected.topk(10).values),
        (found.lowered_ids, found.lowered, expected.topk(10, largest=False).values),
    ):
        assert values == pytest.approx(best.numpy(), abs=1e-5 * scale)
        assert expected.gather(1, torch.from_numpy(ids)).numpy() == pytest.approx(values, abs=1e-5 * scale)
        assert all(len(set(row)) == 10 for row in ids.tolist())
    assert found.low == pytest.approx(expected.amin(1).numpy(), abs=1e-5 * scale)
    assert found.high == pytest.approx(expected.amax(1).numpy(), abs=1e-5 * scale)


def test_the_histogram_counts_every_token_between_the_extremes(lm) -> None:
    rows = directions(lm)
    expected = through_the_head(lm, rows).double().numpy()
    found = logit_effects(lm, rows, "blocks.1.hook_resid_pre", 3)
    assert found is not None
    assert found.counts.sum(1).tolist() == [lm.cfg.d_vocab] * len(rows)
    for s in range(len(rows)):
        low, high = float(found.low[s]), float(found.high[s])
        slack = 1e-5 * (high - low)
        edges = np.linspace(low, high, 41)
        for b, count in enumerate(found.counts[s].tolist()):
            least = ((expected[s] > edges[b] + slack) & (expected[s] < edges[b + 1] - slack)).sum()
            most = ((expected[s] > edges[b] - slack) & (expected[s] < edges[b + 1] + slack)).sum()
            assert least <= count <= most


def test_sites_that_do_not_write_to_the_residual_stream_have_no_effects(model) -> None:
    assert logit_effects(model, directions(model, width=1024), "blocks.1.mlp.hook_post", 3) is None
    assert logit_effects(model, directions(model), "blocks.1.attn.hook_z", 3) is None


def test_what_a_norm_stands_behind_is_not_what_is_added(model, gemma) -> None:
    """Gemma 2 normalises what an MLP gives before it adds it."""
    assert logit_effects(model, directions(model), "blocks.1.mlp.hook_out", 3) is not None
    assert logit_effects(gemma, directions(gemma), "blocks.1.mlp.hook_out", 3) is None
    assert logit_effects(gemma, directions(gemma), "blocks.1.hook_mlp_out", 3) is not None
    assert neurons(gemma, directions(gemma), "blocks.1.hook_mlp_out", 3) is None


def test_more_effects_than_tokens_are_all_tokens(llama) -> None:
    found = logit_effects(llama, directions(llama, 2), "blocks.1.hook_resid_pre", 10_000)
    assert found is not None
    assert found.raised.shape == (2, llama.cfg.d_vocab)
    assert found.raised == pytest.approx(found.lowered[:, ::-1])


def test_equal_effects_come_by_token(model, monkeypatch) -> None:
    found = logit_effects(model, torch.zeros(1, model.cfg.d_model), "blocks.1.hook_resid_pre", 500)
    assert found is not None
    assert found.raised_ids.tolist() == found.lowered_ids.tolist() == [[*range(500)]]
    assert found.counts.sum() == model.cfg.d_vocab


def test_neurons_that_a_direction_lies_along(lm) -> None:
    weight = lm.original_model.get_submodule(
        "transformer.h.1.mlp.c_proj" if lm.cfg.normalization_type == "LN" else "model.layers.1.mlp.down_proj"
    ).weight.detach()
    W_out = weight if lm.cfg.normalization_type == "LN" else weight.t()  # [N, D]
    rows = directions(lm)
    rows[0] = -3 * W_out[9]
    cosine = torch.cosine_similarity(rows[:, None], W_out[None], dim=2)
    found = neurons(lm, rows, "blocks.1.mlp.hook_out", 5)
    assert found is not None
    best = cosine.abs().topk(5).indices
    assert found[0].tolist() == best.tolist()
    assert found[1] == pytest.approx(cosine.gather(1, best).numpy(), abs=1e-5)
    assert found[0][0, 0] == 9
    assert found[1][0, 0] == pytest.approx(-1, abs=1e-5)


def test_neurons_are_coordinates_where_the_site_is_the_neurons(lm) -> None:
    rows = directions(lm, width=lm.cfg.d_mlp)
    found = neurons(lm, rows, "blocks.1.mlp.hook_post", 5)
    assert found is not None
    unit = rows / rows.norm(dim=1, keepdim=True)
    best = unit.abs().topk(5).indices
    assert found[0].tolist() == best.tolist()
    assert found[1] == pytest.approx(unit.gather(1, best).numpy(), abs=1e-6)
    assert neurons(lm, directions(lm), "blocks.1.hook_resid_pre", 5) is None


@pytest.mark.parametrize("at_once", [2**23, 60])
def test_nearest(monkeypatch, at_once) -> None:
    monkeypatch.setattr(effects, "AT_ONCE", at_once)
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    rows[4] = 2 * rows[3] + 0.01 * rows[5]
    cosine = torch.cosine_similarity(rows[:, None], rows[None], dim=2).fill_diagonal_(-2)
    index, values = nearest(rows, 10)
    best = cosine.topk(10)
    assert index.tolist() == best.indices.tolist()
    assert values == pytest.approx(best.values.numpy(), abs=1e-5)
    assert index[3, 0] == 4
    assert values[3, 0] == pytest.approx(1, abs=1e-3)
    assert nearest(rows[:1], 10)[0].shape == (1, 0)
    assert nearest(rows[:4], 10)[0].shape == (4, 3)


def test_encoder_cosine() -> None:
    sae = SAE.new("topk", d_in=6, d_sae=20, k=2, site=SITE, seed=2)
    assert encoder_cosine(sae.W_enc, sae.W_dec) == pytest.approx(np.ones(20), abs=1e-5)
    other = SAE.new("topk", d_in=6, d_sae=20, k=2, site=SITE, target_site=SITE, d_out=6)
    expected = torch.cosine_similarity(other.W_enc.detach().t(), other.W_dec.detach(), dim=1).numpy()
    assert encoder_cosine(other.W_enc, other.W_dec) == pytest.approx(expected, abs=1e-6)
    narrow = SAE.new("topk", d_in=6, d_sae=20, k=2, site=SITE, target_site=SITE, d_out=4)
    assert np.isnan(encoder_cosine(narrow.W_enc, narrow.W_dec)).all()
