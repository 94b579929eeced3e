"""Direct logit attribution: the parts add up to the logit, and each is what an edit of the last stream would take away."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SITE
from lens.random_models import EVERY, load

from saekit.errors import InvalidInput
from saekit.lens.direct import logit_attribution
from saekit.lens.logit_lens import soft_cap
from saekit.sae import SAE
from saekit.sites import capture, editing

TEXT = "The old king walked to the"


@pytest.fixture(scope="module", params=EVERY)
def lm(request, tmp_path_factory):
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=[name for name in EVERY if name.endswith("float32")])
def lm32(request, tmp_path_factory):
    """For differences that drown in bf16's rounding."""
    return load(request.param, tmp_path_factory)


def an_sae(lm, architecture="standard", site="blocks.1.hook_resid_pre", **options) -> SAE:
    """Random, with a b_dec, and strong enough to matter."""
    D = lm.cfg.d_model
    sae = SAE.new(architecture, d_in=D, d_sae=2 * D, site=site, **options)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.W_dec.mul_(3)
        sae.b_dec.copy_(torch.randn(sae.d_out, generator=draw) * 0.3)
    return sae


def in_vocabulary(lm) -> tuple[int, int]:
    return lm.cfg.d_vocab // 3, lm.cfg.d_vocab // 2


@torch.no_grad()
@pytest.mark.parametrize(
    "where", ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.0.hook_resid_mid"]
)
def test_the_parts_add_up_to_the_logit(lm, where) -> None:
    sae = an_sae(lm, site=where)
    a, b = in_vocabulary(lm)
    logits = lm(lm.to_tokens(TEXT))[0].float()
    cap = soft_cap(lm) or 0
    tolerance = 1e-4 if lm.cfg.dtype == torch.float32 else 3e-2
    for position, against in ((-1, None), (3, b)):
        made = logit_attribution(lm, sae, TEXT, a, against=against, position=position)
        parts = made.total + made.error + made.bias + made.rest + made.constant
        size = max(map(abs, (made.total, made.error, made.bias, made.rest, 1.0)))
        assert parts == pytest.approx(made.logit, abs=tolerance * size)
        chosen = logits[position, [a, b]].double()
        before = cap * (chosen / cap).atanh() if cap else chosen
        expected = float(before[0] - (0 if against is None else before[1]))
        assert made.logit == pytest.approx(expected, abs=max(tolerance, 1e-3 if cap else 0) * size)


@torch.no_grad()
def test_a_contribution_is_what_the_logit_loses_with_the_norm_held(lm32) -> None:
    """By brute force: the final norm's own input is changed, its denominator put back to what it was."""
    sae = an_sae(lm32)
    a, _ = in_vocabulary(lm32)
    made = logit_attribution(lm32, sae, TEXT, a)
    ids = lm32.to_tokens(TEXT)
    last = f"blocks.{lm32.cfg.n_layers - 1}.hook_resid_post"
    end = capture(lm32, [last], ids)[last][0, -1]
    centre = (lambda x: x - x.mean()) if lm32.cfg.normalization_type == "LN" else (lambda x: x)
    sigma = (centre(end).square().mean() + lm32.cfg.eps).sqrt()

    def logit(x):
        """Through the model's own norm: a stream scaled so that the norm divides by the old σ."""
        own = (centre(x).square().mean() + lm32.cfg.eps).sqrt()
        normalised = lm32.ln_final(x[None, None])[0, 0]
        bias = getattr(lm32.ln_final, "bias", None)
        bias = 0 if bias is None or lm32.cfg.normalization_type != "LN" else bias
        value = lm32.unembed(((normalised - bias) * own / sigma + bias)[None, None])[0, 0, a]
        return float(value)

    assert logit(end) == pytest.approx(made.logit, abs=2e-3)
    for part in made.features[:5]:
        without = logit(end - part.activation * sae.direction(part.feature))
        assert logit(end) - without == pytest.approx(part.logit, rel=2e-2, abs=2e-3)


@torch.no_grad()
def test_features_are_those_that_fire_in_order(model, sae) -> None:
    x = capture(model, [SITE], model.to_tokens("Luke Skywalker is a Jedi"))[SITE][0, -1]
    f = sae.encode(x)
    made = logit_attribution(model, sae, "Luke Skywalker is a Jedi", " knight")
    assert {part.feature for part in made.features} == set(f.nonzero().squeeze(1).tolist())
    assert [abs(p.logit) for p in made.features] == sorted(
        (abs(p.logit) for p in made.features), reverse=True
    )
    for part in made.features:
        assert part.activation == pytest.approx(float(f[part.feature]), rel=1e-3)
        assert made.of(part.feature) == part.logit
    silent = next(i for i in range(sae.d_sae) if not f[i])
    assert made.of(silent) == 0
    assert "logit of ' knight' after ' Jedi'" in str(made)
    assert json.loads(json.dumps(made.to_dict()))["features"][0]["feature"] == made.features[0].feature


@torch.no_grad()
def test_transformerlens_finds_the_same_in_the_folded_model(sae) -> None:
    """Its own tool needs folded weights, which would change what an SAE reads; the contributions are the same numbers."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    folded = load("tiny-float32", None)
    made = logit_attribution(folded, sae, TEXT, " river", against=" garden")
    with pytest.raises(ValueError, match="compatibility mode"):
        direct_logit_attribution(folded, TEXT, " river", " garden")
    folded.enable_compatibility_mode(disable_warnings=True)
    peer = direct_logit_attribution(folded, TEXT, " river", " garden")
    assert float(peer.attribution.sum()) == pytest.approx(made.logit - made.constant, abs=1e-3)
    _, cache = folded.run_with_cache(TEXT)
    rows = torch.stack([part.activation * sae.direction(part.feature) for part in made.features[:8]])
    theirs = cache.logit_attrs(rows[:, None], tokens=" river", incorrect_tokens=" garden", pos_slice=-1)
    assert theirs[:, 0].tolist() == pytest.approx([part.logit for part in made.features[:8]], abs=1e-4)


@torch.no_grad()
def test_transcoders_write_where_they_write(model) -> None:
    sae = an_sae(
        model, site="blocks.2.hook_resid_mid", d_out=256, skip=True, target_site="blocks.2.hook_mlp_out"
    )
    sae.W_skip.copy_(torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.02)
    made = logit_attribution(model, sae, TEXT, " river")
    i = model.tokenizer(" river", add_special_tokens=False)["input_ids"][0]
    assert made.site == "blocks.2.hook_mlp_out"
    total = made.total + made.error + made.bias + made.rest + made.constant
    assert total == pytest.approx(float(model(model.to_tokens(TEXT))[0, -1, i]), abs=1e-3)
    x = capture(model, [sae.site], model.to_tokens(TEXT))[sae.site][0, -1]
    assert len(made.features) == int((sae.encode(x) > 0).sum())


def test_attributions_that_cannot_be(model, sae, monkeypatch, no_leaked_hooks) -> None:
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[SITE, "blocks.4.hook_resid_pre"])
    with pytest.raises(InvalidInput, match="one that writes one site of the residual stream"):
        logit_attribution(model, crosscoder, TEXT, " river")
    inner = SAE.new("standard", d_in=256, d_sae=8, site="blocks.3.attn.hook_z")
    with pytest.raises(InvalidInput, match="writes blocks.3.attn.hook_z"):
        logit_attribution(model, inner, TEXT, " river")
    with pytest.raises(InvalidInput, match="positions 0 to 6"):
        logit_attribution(model, sae, TEXT, " river", position=7)
    with pytest.raises(InvalidInput, match="tokens of this model"):
        logit_attribution(model, sae, TEXT, " lightsaberish")
    # a model that does more between its last stream and its logits
    with (
        editing(model, {"ln_final.hook_normalized": lambda x: 2 * x}),
        pytest.raises(InvalidInput, match="does more after"),
    ):
        logit_attribution(model, sae, TEXT, " river")
