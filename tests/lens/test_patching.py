"""Attribution patching: sums that have to come out, and estimates beside what patching itself does."""

from __future__ import annotations

import pytest
import torch
from conftest import SITE
from lens.random_models import EVERY, load

from saekit.errors import InvalidInput
from saekit.lens.patching import feature_effects
from saekit.sae import SAE
from saekit.sites import capture, editing
from saekit.steering.directions import Direction
from saekit.steering.steer import steer

CLEAN, PATCH = "The old king walked to the", "The old dog walked to the"


@pytest.fixture(scope="module", params=EVERY)
def lm(request, tmp_path_factory):
    return load(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=[name for name in EVERY if name.endswith("float32")])
def lm32(request, tmp_path_factory):
    """For differences that drown in bf16's rounding."""
    return load(request.param, tmp_path_factory)


def an_sae(lm, site="blocks.1.hook_resid_pre", **options) -> SAE:
    D = lm.cfg.d_model
    sae = SAE.new("standard", d_in=D, d_sae=2 * D, site=site, **options)
    with torch.no_grad():
        sae.W_dec.mul_(3)
        sae.b_dec.copy_(torch.randn(sae.d_out, generator=torch.Generator().manual_seed(3)) * 0.3)
    return sae


def prompts(lm) -> tuple[str, str]:
    clean, patch = CLEAN, PATCH
    while lm.to_tokens(patch).shape[1] < lm.to_tokens(clean).shape[1]:
        patch += "."
    while lm.to_tokens(clean).shape[1] < lm.to_tokens(patch).shape[1]:
        clean += "."
    return clean, patch


def goal(lm):
    a, b = lm.cfg.d_vocab // 3, lm.cfg.d_vocab // 2
    return lambda logits: logits[-1, a] - logits[-1, b]


def by_autograd(lm, site, text, metric):
    """∂m/∂x [T, D] by a leaf in the place of x."""
    leaf = capture(lm, [site], lm.to_tokens(text))[site].detach().clone().requires_grad_()
    with torch.enable_grad(), editing(lm, {site: lambda x: leaf}):
        metric(lm(lm.to_tokens(text))[0].float()).backward()
    lm.original_model.zero_grad()
    return leaf.grad[0].float()


def test_features_and_error_add_up_to_the_gradient_times_the_difference(lm) -> None:
    clean, patch = prompts(lm)
    sae = an_sae(lm)
    made = feature_effects(lm, sae, clean, patch, metric=goal(lm))
    g = by_autograd(lm, sae.site, clean, goal(lm))
    x, y = (capture(lm, [sae.site], lm.to_tokens(text))[sae.site][0].float() for text in (clean, patch))
    expected = (g * (y - x)).sum(1)
    got = made.effects.sum(1) + made.error
    bound = (1e-3 if lm.cfg.dtype == torch.float32 else 0.05) * float(made.effects.abs().sum(1).max())
    torch.testing.assert_close(got, expected, atol=bound, rtol=0)
    assert float(made.error.abs().sum()) > 0
    assert not made.effects[0].any()  # before the prompts differ nothing does
    assert made.total == pytest.approx(float(got.sum()), abs=1e-4)


@torch.no_grad()
def test_the_ends_are_those_of_the_two_prompts(lm) -> None:
    clean, patch = prompts(lm)
    made = feature_effects(lm, an_sae(lm), clean, patch, metric=goal(lm))
    ends = [float(goal(lm)(lm(lm.to_tokens(text))[0].float())) for text in (clean, patch)]
    rel = 1e-3 if lm.cfg.dtype == torch.float32 else 0.1
    assert made.metric == pytest.approx(ends[0], rel=rel, abs=rel)
    assert made.patched == pytest.approx(ends[1], rel=rel, abs=rel)


def test_integrated_effects_add_up_to_what_patching_does(lm32) -> None:
    clean, patch = prompts(lm32)
    one, many = (
        feature_effects(lm32, an_sae(lm32), clean, patch, metric=goal(lm32), steps=n) for n in (1, 24)
    )
    true = one.patched - one.metric
    assert many.total == pytest.approx(true, abs=0.03 * abs(true) + 1e-3)
    assert abs(many.total - true) < abs(one.total - true)


@torch.no_grad()
def test_measured_is_the_ablation_itself(model, sae) -> None:
    """Patched to silence, at one position: what `steer` with `ablate` does there."""
    metric = goal(model)
    made = feature_effects(model, sae, CLEAN, metric=metric)
    ids = model.to_tokens(CLEAN)
    plain = float(metric(model(ids)[0]))
    for effect in [e for e in made.top(40) if e.feature is not None][:4]:
        with steer(
            model,
            Direction.from_sae(sae, effect.feature).ablate(),
            positions=[effect.position],
            include_special=True,
        ):
            ablated = float(metric(model(ids)[0]))
        assert made.measured(effect.feature, effect.position) == pytest.approx(ablated - plain, abs=2e-4)


@torch.no_grad()
def test_estimates_come_near_the_truth_for_small_changes(lm32) -> None:
    """First order: of a change shrunk a hundredfold the estimate is right to a few per cent."""
    clean, patch = prompts(lm32)
    sae = an_sae(lm32)
    made = feature_effects(lm32, sae, clean, patch, metric=goal(lm32))
    ids = lm32.to_tokens(clean)
    for effect in [e for e in made.top(12) if e.feature is not None][:4]:
        amount = effect.patch - effect.clean
        shrunk = min(1.0, 0.02 / abs(amount))

        def nudge(x, effect=effect, size=amount * shrunk):
            x = x.clone()
            x[0, effect.position] += size * sae.direction(effect.feature)
            return x

        moved = []
        for sign in (1, -1):
            with editing(lm32, {sae.site: lambda x, sign=sign: x + sign * (nudge(x) - x)}):
                moved.append(float(goal(lm32)(lm32(ids)[0].double())))
        slope = (moved[0] - moved[1]) / 2 / shrunk
        assert slope == pytest.approx(effect.effect, rel=0.1, abs=0.02 * abs(made.top(1)[0].effect))


def test_estimates_rank_as_the_truth_does(model, sae) -> None:
    """On the embedded SAE: estimates of single features against patching each of them."""
    made = feature_effects(
        model, sae, "The Jedi pulls out his", "The man pulls out his", metric=(" light", " hand")
    )
    effects = made.top(16)
    true = torch.tensor([made.measured(e.feature, e.position) for e in effects])
    estimated = torch.tensor([e.effect for e in effects])
    assert float(torch.corrcoef(torch.stack([true, estimated]))[0, 1]) > 0.8
    assert (true.sign() == estimated.sign()).float().mean() > 0.8
    assert any(e.feature is None for e in effects)  # the error node is one among them
    assert "features" in str(made)
    assert "error on" in str(made)


def test_features_of_two_prompts_are_as_encoded(model, sae) -> None:
    made = feature_effects(model, sae, CLEAN, PATCH, metric=" river")
    with torch.no_grad():
        f, g = (sae.encode(capture(model, [SITE], model.to_tokens(t))[SITE][0]) for t in (CLEAN, PATCH))
    assert made.features.tolist() == ((f != 0) | (g != 0)).any(0).nonzero().squeeze(1).tolist()
    torch.testing.assert_close(made.clean, f[:, made.features], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.patch, g[:, made.features], rtol=1e-3, atol=1e-4)
    summed = made.by_feature(3)
    assert [i for i, _ in summed] == made.features[made.effects.sum(0).abs().topk(3).indices].tolist()
    silent = next(i for i in range(sae.d_sae) if i not in set(made.features.tolist()))
    assert made.measured(silent, 2) == 0


def test_a_transcoder_is_patched_where_it_writes(model) -> None:
    sae = an_sae(model, site="blocks.2.hook_resid_mid", d_out=256, target_site="blocks.2.hook_mlp_out")
    made = feature_effects(model, sae, CLEAN, PATCH, metric=goal(model))
    g = by_autograd(model, made.site, CLEAN, goal(model))
    x, y = (capture(model, [made.site], model.to_tokens(t))[made.site][0] for t in (CLEAN, PATCH))
    assert made.site == "blocks.2.hook_mlp_out"
    torch.testing.assert_close(made.effects.sum(1) + made.error, (g * (y - x)).sum(1), rtol=1e-3, atol=1e-4)


def test_no_gradient_and_no_hook_is_left(model, sae, no_leaked_hooks) -> None:
    feature_effects(model, sae, CLEAN, metric=" river")
    assert all(parameter.grad is None for parameter in model.original_model.parameters())


def test_effects_that_cannot_be(model, sae) -> None:
    with pytest.raises(InvalidInput, match="8 tokens, the clean prompt has 7"):
        feature_effects(model, sae, CLEAN, CLEAN + ".", metric=" river")
    for metric, message in [
        ((" a", " b", " c"), "metric: expected a token"),
        (" lightsaberish", "tokens of this model"),
        (lambda logits: 1.0, "one number with gradients"),
        (lambda logits: logits[-1], "one number with gradients"),
        (lambda logits: logits[-1, 0].detach(), "one number with gradients"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            feature_effects(model, sae, CLEAN, PATCH, metric=metric)
    with pytest.raises(InvalidInput, match="steps: expected"):
        feature_effects(model, sae, CLEAN, PATCH, metric=" river", steps=0)
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[SITE, "blocks.4.hook_resid_pre"])
    with pytest.raises(InvalidInput, match="writes one site with its features alone"):
        feature_effects(model, crosscoder, CLEAN, PATCH, metric=" river")
