"""Steering as identities, on a GPT-2-style and a Llama-style model, in fp32 and bf16.

The last section holds what users hit in other libraries, each as a test.
"""

from __future__ import annotations

import pytest
import torch
from conftest import SHARED, SITE

import saekit
from saekit.errors import InvalidInput, UnknownName
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering.compare import compare, generate
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.steer import steer
from saekit.steering.sweep import control_of, perplexity, sweep

PROMPT = "The old king walked to the"
STORIES = SHARED / "models" / "stories260k"


@pytest.fixture(
    scope="module", params=["tiny-float32", "tiny-bfloat16", "stories260k-float32", "stories260k-bfloat16"]
)
def lm(request):
    name, dtype = request.param.split("-")
    if name == "stories260k" and not STORIES.is_dir():
        pytest.skip("../shared/models/stories260k is missing")
    return saekit.load_model("tiny" if name == "tiny" else STORIES, dtype=dtype)


@pytest.fixture(scope="module", params=["standard", "topk"])
def feature(request, lm):
    """Edits of a feature that fires on the prompt's last token."""
    D = lm.cfg.d_model
    sae = SAE.new(
        request.param,
        d_in=D,
        d_sae=4 * D,
        site="blocks.2.hook_resid_pre",
        k=8 if request.param == "topk" else None,
    )
    x = capture(lm, [sae.site], lm.to_tokens(PROMPT))[sae.site]
    latent = int(sae.encode(x)[0, -1].argmax())

    def make(kind, strength=0.0, unit="raw", latent=latent):
        return Edit(
            kind, sae.site, sae.direction(latent), strength, unit, f"feature {latent}", latent=latent, sae=sae,
            max_activation=float(sae.encode(x).detach().max()),
        )  # fmt: skip

    make.sae, make.latent = sae, latent
    return make


@torch.no_grad()
def after(lm, *edits, text=PROMPT, **options):
    """Activations right at the site after the edits, and the logits."""
    seen = []
    ids = lm.to_tokens(text)
    site = (edits[0][0] if isinstance(edits[0], list) else edits[0]).site
    with steer(lm, *edits, **options), lm.hooks(fwd_hooks=[(site, lambda x, hook: seen.append(x))]):
        logits = lm(ids)
    return seen[0].float(), logits


def at(lm, text=PROMPT, site="blocks.2.hook_resid_pre"):
    return capture(lm, [site], lm.to_tokens(text))[site].float()


def tolerance(lm):
    return {"atol": 2e-4, "rtol": 1e-4} if lm.cfg.dtype == torch.float32 else {"atol": 0.3, "rtol": 2e-2}


# Identities


@pytest.mark.parametrize("unit", ["raw", "max", "norm"])
def test_adding_nothing_is_the_plain_model_bit_for_bit(lm, feature, unit) -> None:
    plain = lm(lm.to_tokens(PROMPT))
    with steer(lm, feature("add", 0.0, unit)):
        assert torch.equal(lm(lm.to_tokens(PROMPT)), plain)
    side = compare(lm, PROMPT, feature("add", 0.0, unit), max_new_tokens=8, seed=3)
    assert side.plain == side.steered
    assert side.kl == 0


def test_add_adds(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    got, _ = after(lm, feature("add", 3.0))
    expected = x + 3.0 * d
    expected[:, 0] = x[:, 0]  # BOS is left alone
    torch.testing.assert_close(got, expected, **tolerance(lm))
    assert torch.equal(got[:, 0], x[:, 0])


def test_units(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    m = feature("add").max_activation
    got, _ = after(lm, feature("add", 0.5, "max"))
    torch.testing.assert_close(got[:, 1:], x[:, 1:] + 0.5 * m * d, **tolerance(lm))
    got, _ = after(lm, feature("add", 0.5, "norm"))
    norm = x[0, 1:].norm(dim=1).median()
    torch.testing.assert_close(got[:, 1:], x[:, 1:] + 0.5 * norm * d / d.norm(), **tolerance(lm))


@torch.no_grad()
def test_clamping_to_its_own_value_changes_nothing(lm, feature) -> None:
    x = at(lm)
    f = feature.sae.encode(x)[0, -1, feature.latent]
    got, _ = after(lm, feature("clamp", float(f)), positions="last_prompt")
    torch.testing.assert_close(got, x, **tolerance(lm))


def test_clamp_is_the_clamped_reconstruction_with_the_error_put_back(lm, feature) -> None:
    x, sae = at(lm), feature.sae
    with torch.no_grad():
        f = sae.encode(x)
        error = x - sae.decode(f)
        f[..., feature.latent] = 5.0
        expected = sae.decode(f) + error
    expected[:, 0] = x[:, 0]
    got, _ = after(lm, feature("clamp", 5.0))
    torch.testing.assert_close(got, expected, **tolerance(lm))


def test_ablate_is_clamp_to_zero_is_scale_by_zero(lm, feature) -> None:
    results = [
        after(lm, edit)[0] for edit in (feature("ablate"), feature("clamp", 0.0), feature("scale", 0.0))
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not torch.equal(results[0], at(lm))
    torch.testing.assert_close(after(lm, feature("scale", 1.0))[0], at(lm))


@torch.no_grad()
def test_edits_compose_from_the_unedited_activations(lm, feature) -> None:
    x, sae = at(lm), feature.sae
    a, b = feature.latent, int(sae.encode(x)[0, -2].topk(3).indices[2])
    f = sae.encode(x)
    expected = (
        x + (4 - f[..., [a]]) * sae.direction(a) + (2 - f[..., [b]]) * sae.direction(b) + sae.direction(a)
    )
    edits = [feature("clamp", 4.0), feature("clamp", 2.0, latent=b), feature("add", 1.0)]
    got, _ = after(lm, edits)
    torch.testing.assert_close(got[:, 1:], expected[:, 1:].detach(), **tolerance(lm))


def test_after_the_block_the_model_is_bit_identical_also_after_an_exception(lm, feature) -> None:
    ids = lm.to_tokens(PROMPT)
    plain = lm(ids)
    state = {name: p.clone() for name, p in lm.original_model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), steer(lm, feature("add", 9.0)), steer(lm, feature("clamp", 1.0)):
        lm(ids)
        raise KeyboardInterrupt
    assert torch.equal(lm(ids), plain)
    assert all(torch.equal(p, state[name]) for name, p in lm.original_model.named_parameters())
    assert not [n for n, h in lm.hook_dict.items() if h.fwd_hooks]
    assert not lm.original_model._forward_pre_hooks


def test_nested_steering_adds_up(lm, feature) -> None:
    inner_outer = []
    for edits in ([feature("add", 3.0)], [feature("add", 1.0), feature("add", 2.0)]):
        inner_outer.append(after(lm, edits)[0])
    with steer(lm, feature("add", 1.0)):
        nested, _ = after(lm, feature("add", 2.0))
    torch.testing.assert_close(inner_outer[0], inner_outer[1], **tolerance(lm))
    torch.testing.assert_close(nested, inner_outer[0], **tolerance(lm))


# Positions


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        ("all", [1, 2, 3, 4, 5, 6]),
        ("prompt", [1, 2, 3, 4, 5, 6]),
        ("generated", []),
        ("last_prompt", [6]),
        ([0, 2], [0, 2]),
    ],
)
def test_positions_in_a_prompt(model, positions, wanted) -> None:
    direction = Direction(torch.ones(256), "blocks.2.hook_resid_pre")
    text = "The old king walked to the"
    assert model.to_tokens(text).shape[1] == 7
    got, _ = after(model, direction.add(5.0), text=text, positions=positions)
    moved = (got != at(model, text)).any(-1)[0].nonzero().squeeze(1).tolist()
    assert moved == wanted


def record(lm, generate_, direction, positions, **options):
    """Which absolute positions were steered while a prompt was continued, by forward."""
    steered = []
    length = 0

    def watch(x, hook):
        nonlocal length
        plain = plains[len(steered)]
        moved = (x != plain).any(-1).any(0).nonzero().squeeze(1)
        start = length if x.shape[1] == 1 else 0
        length = start + x.shape[1]
        steered.append((moved + start).tolist())

    # the plain activations of the very same forwards, from a hook that comes before the edit
    plains = []
    with (
        lm.hooks(fwd_hooks=[(direction.site, lambda x, hook: plains.append(x.clone()))]),
        steer(lm, direction.add(1e-2), positions=positions),
        lm.hooks(fwd_hooks=[(direction.site, watch)]),
    ):
        generate_(**options)
    return steered


@pytest.mark.parametrize("how", ["cached", "uncached", "huggingface"])
def test_positions_are_absolute_however_generation_runs(model, how) -> None:
    prompt, n = "The old king walked to the", 4  # 7 ids with BOS
    direction = Direction(torch.ones(256), "blocks.2.hook_resid_pre")

    def run():
        if how == "huggingface":
            model.original_model.generate(model.to_tokens(prompt), max_new_tokens=n, do_sample=False)
        else:
            model.generate(
                prompt, max_new_tokens=n, do_sample=False, verbose=False, use_past_kv_cache=how == "cached"
            )

    def union(positions):
        return sorted({p for step in record(model, run, direction, positions) for p in step})

    assert union("all") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert union("prompt") == [1, 2, 3, 4, 5, 6]
    assert union("generated") == [7, 8, 9]
    assert union("last_prompt") == [6, 7, 8, 9]
    assert union([2, 8]) == [2, 8]


# In bf16 the plain model's own cached and uncached texts differ.
@pytest.mark.parametrize("lm", ["tiny-float32", "stories260k-float32"], indirect=True, scope="module")
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last_prompt", [3, 8]])
def test_cached_equals_uncached(lm, feature, positions) -> None:
    texts = []
    for cached in (True, False):
        with steer(lm, feature("add", 6.0), positions=positions):
            texts.append(
                lm.generate(
                    PROMPT, max_new_tokens=10, do_sample=False, verbose=False, use_past_kv_cache=cached
                )
            )
    assert texts[0] == texts[1]


def test_left_padding_shifts_no_position(model) -> None:
    direction = Direction(
        torch.randn(256, generator=torch.Generator().manual_seed(0)), "blocks.2.hook_resid_pre"
    )
    prompts = ["The king", "The old king walked slowly to the"]
    with steer(model, direction.add(4.0), positions="last_prompt"):
        together = model.generate(prompts, max_new_tokens=6, do_sample=False, verbose=False)
        alone = [model.generate(p, max_new_tokens=6, do_sample=False, verbose=False) for p in prompts]
    assert together == alone


def test_a_second_prompt_starts_anew(model) -> None:
    direction = Direction(torch.ones(256), "blocks.2.hook_resid_pre")
    with steer(model, direction.add(3.0), positions="generated"):
        once = model.generate(PROMPT, max_new_tokens=5, do_sample=False, verbose=False)
        again = model.generate(PROMPT, max_new_tokens=5, do_sample=False, verbose=False)
    assert once == again


def test_rows_carry_their_own_edits(model) -> None:
    direction = Direction(torch.ones(256), "blocks.2.hook_resid_pre")
    ids = model.to_tokens([PROMPT] * 3)
    with steer(model, rows=[[], [direction.add(1.0)], [direction.add(2.0), direction.add(2.0)]]):
        logits = model(ids)
    for row, strength in enumerate((0.0, 1.0, 4.0)):
        with steer(model, direction.add(strength)):
            torch.testing.assert_close(logits[row], model(ids[:1])[0], atol=1e-4, rtol=1e-4)
    with (
        steer(model, rows=[[direction.add(1.0)]]),
        pytest.raises(InvalidInput, match="1 lists of edits, but the batch has 3"),
    ):
        model(ids)


# compare, sweep, directions


def test_compare_tells_what_moved(model) -> None:
    jedi = Direction.from_contrast(model, " Jedi", " phone", site="blocks.3.hook_resid_pre")
    side = compare(model, "Mike pulls out his", [jedi.add(0.8)], max_new_tokens=10, seed=0)
    ids = model.to_tokens("Mike pulls out his")
    p = model(ids)[0, -1].softmax(-1)
    with steer(model, jedi.add(0.8)):
        q = model(ids)[0, -1].softmax(-1)
    assert side.kl == pytest.approx(float((q * (q / p).log()).sum().detach()), rel=1e-3)
    differences = [abs(b - a) for _, a, b in side.top_tokens]
    assert differences == sorted(differences, reverse=True)
    for token, a, b in side.top_tokens:
        i = model.tokenizer(token, add_special_tokens=False)["input_ids"][0]
        assert (a, b) == pytest.approx((float(p[i].detach()), float(q[i].detach())), rel=1e-4)
    assert side.plain.startswith("Mike pulls out his")
    assert "' Jedi' − ' phone'" in str(side)


def test_a_seed_settles_the_sampling_and_leaves_the_global_generator_alone(model) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = generate(model, PROMPT, 12, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert generate(model, PROMPT, 12, seed=5) == one
    assert generate(model, PROMPT, 12, seed=6) != one
    assert generate(model, PROMPT, 12, temperature=0) == model.generate(
        PROMPT, max_new_tokens=12, do_sample=False, verbose=False
    )


def test_contrast_is_a_difference_of_activations(lm) -> None:
    site = "blocks.2.hook_resid_pre"
    direction = Direction.from_contrast(lm, "a king", "a dog", site=site)
    torch.testing.assert_close(direction.vector, at(lm, "a king", site)[0, -1] - at(lm, "a dog", site)[0, -1])
    with pytest.raises(InvalidInput, match="a prompt is empty"):
        Direction.from_contrast(lm, "", "x", site=site)


def test_the_random_control_has_the_same_norm_and_another_direction() -> None:
    d = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
    edit = Direction(d, "s").add(2.0, unit="norm")
    control = control_of(edit, seed=1)
    torch.testing.assert_close(control.direction.norm(), d.norm())
    assert abs(torch.cosine_similarity(control.direction, d, dim=0)) < 0.5
    assert (control.strength, control.unit) == (2.0, "norm")


def test_sweep_puts_the_control_beside(model) -> None:
    jedi = Direction.from_contrast(model, " Jedi", " phone", site="blocks.3.hook_resid_pre")
    rows = sweep(model, "Mike pulls out his", jedi.add, [0.0, 0.5, 1.5], max_new_tokens=8)
    assert rows[0].kl == rows[0].control_kl == 0
    assert rows[0].text == rows[0].control_text
    assert rows[0].kl < rows[1].kl < rows[2].kl
    assert rows[1].kl > rows[1].control_kl
    assert all(row.perplexity >= 1 for row in rows)
    with pytest.raises(InvalidInput, match="at least one number"):
        sweep(model, "x", jedi.add, [])


def test_perplexity_is_that_of_the_continuation(model) -> None:
    text = PROMPT + " river and the garden"
    ids = model.to_tokens(text)
    log_p = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    n = model.to_tokens(PROMPT).shape[1]
    assert perplexity(model, PROMPT, text) == pytest.approx(
        float((-log_p[n - 1 :]).mean().exp().detach()), rel=1e-4
    )
    assert perplexity(model, PROMPT, PROMPT) == 1.0


# What users hit elsewhere


def test_the_first_generated_token_is_steered(model) -> None:
    jedi = Direction.from_contrast(model, " Jedi", " phone", site="blocks.3.hook_resid_pre")
    side = compare(model, "Mike pulls out his", jedi.add(2.0), max_new_tokens=1, temperature=0)
    assert side.plain != side.steered


def test_unknown_sites_and_widths_are_refused(model) -> None:
    with (
        pytest.raises(UnknownName, match="Did you mean"),
        steer(model, Direction(torch.ones(256), "blocks.2.resid_pre").add(1)),
    ):
        pass
    with (
        pytest.raises(
            InvalidInput,
            match="edit of width 768 cannot act on blocks.2.hook_resid_pre of tiny, which has width 256",
        ),
        steer(model, Direction(torch.ones(768), "blocks.2.hook_resid_pre").add(1)),
    ):
        pass


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "8", None, True])
def test_strengths_that_are_no_numbers(strength) -> None:
    with pytest.raises(InvalidInput, match="strength: expected a finite number"):
        Direction(torch.ones(4), "s").add(strength)


def test_wrong_edits_say_what_to_do(model) -> None:
    with pytest.raises(InvalidInput, match="clamp needs a feature of an SAE"):
        Edit("clamp", "s", torch.ones(4), 1.0)
    with pytest.raises(InvalidInput, match="'push' is not one of add, clamp, scale, ablate"):
        Edit("push", "s", torch.ones(4), 1.0)
    with pytest.raises(InvalidInput, match="unit: add takes raw or max or norm, not 'sd'"):
        Direction(torch.ones(4), "s").add(1.0, unit="sd")
    with pytest.raises(InvalidInput, match="no maximum activation is known"):
        Edit("add", "s", torch.ones(4), 1.0, "max")
    with pytest.raises(InvalidInput, match="expected edits such as"), steer(model, 8.0):
        pass
    for positions in ("sometimes", [-1], [1.5], 3, [True]):
        with pytest.raises(InvalidInput, match="positions: "), steer(model, positions=positions):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt: expected a text"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected"),
        ({"max_new_tokens": 10_000}, "do not fit the context of 256"),
        ({"prompt": "word " * 400}, "do not fit the context of 256"),
        ({"temperature": -1}, "temperature: expected"),
        ({"temperature": float("nan")}, "temperature: expected"),
    ],
)
def test_prompts_that_cannot_be_continued(model, options, message) -> None:
    direction = Direction(torch.ones(256), "blocks.2.hook_resid_pre")
    with pytest.raises(InvalidInput, match=message):
        compare(model, options.pop("prompt", PROMPT), direction.add(1.0), **options)


def test_edits_read_well(feature) -> None:
    assert str(feature("add", 8.0)) == f"add 8 feature {feature.latent} at blocks.2.hook_resid_pre"
    assert str(feature("clamp", 10.0, "max")).startswith("clamp 10 × max feature")
    assert str(feature("ablate")).startswith("ablate feature")
    assert "tensor" not in repr(feature("add", 8.0))


def test_transcoders_and_crosscoders_steer_where_they_write(model) -> None:
    transcoder = SAE.new(
        "topk", d_in=256, d_out=256, d_sae=8, k=2, site=SITE, target_site="blocks.3.hook_mlp_out"
    )
    direction = Direction.from_sae(transcoder, 3)
    assert direction.site == "blocks.3.hook_mlp_out"
    assert torch.equal(direction.vector, transcoder.W_dec[3])
    direction.add(1.0)
    with pytest.raises(
        InvalidInput, match=r"clamp: this feature is read at blocks\.3.* and written at .*; use add"
    ):
        direction.clamp(1.0)
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[SITE, "blocks.5.hook_resid_pre"])
    with pytest.raises(InvalidInput, match="name one, site="):
        Direction.from_sae(crosscoder, 3)
    with pytest.raises(UnknownName, match="this SAE writes"):
        Direction.from_sae(crosscoder, 3, "blocks.1.hook_resid_pre")
    late = Direction.from_sae(crosscoder, 3, "blocks.5.hook_resid_pre")
    assert torch.equal(late.vector, crosscoder.W_dec[3, 256:])
    with steer(model, late.add(1.0)):
        model("a", return_type=None)
    with pytest.raises(InvalidInput, match="use add"):
        late.ablate()
