"""Steering through plain Hugging Face `generate`, and as hooks for TransformerLens."""

from __future__ import annotations

import gc

import pytest
import torch

from saekit.errors import InvalidInput, UnknownName
from saekit.steering.directions import Direction
from saekit.steering.hooks import hooks
from saekit.steering.steer import edited, steer

PROMPTS = ["The king", "The old king walked slowly to the", "A ship"]
AT = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module", params=["tiny", "stories260k", "gemma"])
def lm(request, family):
    return family(request.param, "float32")


def direction(lm) -> Direction:
    return Direction(torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(1)), AT)


def batch(lm, prompts=PROMPTS):
    """What an evaluation harness makes: left-padded ids and their mask."""
    tokenizer = lm.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"))


def generate(lm, **options):
    inputs = batch(lm)
    inputs.pop("token_type_ids", None)
    return lm.original_model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, pad_token_id=lm.tokenizer.pad_token_id, **options
    )


def continuations(lm, ids):
    return lm.tokenizer.batch_decode(ids[:, batch(lm)["input_ids"].shape[1] :])


@pytest.mark.parametrize("positions", ["all", "generated", "last_prompt", [1, 9]], ids=str)
def test_a_left_padded_batch_equals_its_rows_alone(lm, positions) -> None:
    with edited(lm, direction(lm).add(0.5, unit="norm"), positions=positions) as hf:
        assert hf is lm.original_model
        together = continuations(lm, generate(lm, do_sample=False))
        for prompt, expected in zip(PROMPTS, together, strict=True):
            one = batch(lm, [prompt])
            one.pop("token_type_ids", None)
            ids = hf.generate(
                **one,
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                pad_token_id=lm.tokenizer.pad_token_id,
            )
            assert lm.tokenizer.decode(ids[0, one["input_ids"].shape[1] :]) == expected
    assert continuations(lm, generate(lm, do_sample=False)) != together


@pytest.mark.parametrize("positions", ["all", "last_prompt", [1, 9]], ids=str)
def test_a_static_cache_knows_its_padding(lm, positions) -> None:
    """Its attention masks have four dimensions; what is padding shows in the positions."""
    with edited(lm, direction(lm).add(0.5, unit="norm"), positions=positions):
        expected = generate(lm, do_sample=False)
        static = generate(lm, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", [2, 9]], ids=str)
def test_beam_search_is_steered_alike_with_and_without_a_cache(lm, positions) -> None:
    with edited(lm, direction(lm).add(0.3, unit="norm"), positions=positions):
        cached, uncached = (
            generate(lm, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(lm, num_beams=3, do_sample=False))


def test_beams_with_rows_are_refused(lm) -> None:
    """Three rows become nine, of which each may change places: whose edits would they be?"""
    edits = [[direction(lm).add(1.0)], [], []]
    with (
        edited(lm, rows=edits),
        pytest.raises(InvalidInput, match="3 lists of edits, but the batch has 9 rows"),
    ):
        generate(lm, num_beams=3, do_sample=False)
    with edited(lm, rows=edits):
        together = generate(lm, do_sample=False)
    assert torch.equal(together[1:], generate(lm, do_sample=False)[1:])


def test_sampling_draws_from_the_steered_model(lm) -> None:
    draws = []
    for strength in (0.0, 0.5):
        with edited(lm, direction(lm).add(strength, unit="norm")):
            for _ in range(2):
                torch.manual_seed(3)
                draws.append(generate(lm, do_sample=True, temperature=0.8))
    torch.manual_seed(3)
    assert torch.equal(draws[0], generate(lm, do_sample=True, temperature=0.8))
    assert torch.equal(draws[2], draws[3])
    assert not torch.equal(draws[0], draws[2])


def test_greedy_huggingface_generation_is_the_argmax_of_the_steered_logits(lm) -> None:
    with edited(lm, direction(lm).add(0.4, unit="norm")) as hf:
        ids = lm.to_tokens(PROMPTS[1])
        expected = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
        )  # fmt: skip
        for _ in range(6):
            with torch.no_grad():
                logits = lm(ids)[0, -1]
            logits[lm.tokenizer.eos_token_id] = -torch.inf  # min_new_tokens
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert torch.equal(ids, expected)


# Hooks for TransformerLens


@torch.no_grad()
def test_hooks_do_what_steer_does(lm) -> None:
    ids = lm.to_tokens(PROMPTS[1])
    edits = [direction(lm).add(2.0), direction(lm).cap(0.5)]
    plain = lm(ids)
    for options in ({}, {"positions": "last_prompt"}, {"preserve_norm": True}, {"include_special": True}):
        with steer(lm, edits, **options):
            expected = lm(ids)
        assert torch.equal(lm.run_with_hooks(ids, fwd_hooks=hooks(lm, edits, **options)), expected)
        assert not torch.equal(expected, plain)
    assert torch.equal(lm(ids), plain)
    with lm.hooks(fwd_hooks=hooks(lm, edits, positions="generated")):
        with_hooks = lm.generate(PROMPTS[0], max_new_tokens=6, do_sample=False, verbose=False)
    with steer(lm, edits, positions="generated"):
        assert with_hooks == lm.generate(PROMPTS[0], max_new_tokens=6, do_sample=False, verbose=False)


@torch.no_grad()
def test_hooks_reach_sites_that_carry_heads(model) -> None:
    site = "blocks.2.attn.hook_z"
    ids = model.to_tokens(PROMPTS[1])
    edit = Direction(torch.ones(256), site).add(1.0)
    with steer(model, edit):
        expected = model(ids)
    assert torch.equal(model.run_with_hooks(ids, fwd_hooks=hooks(model, edit)), expected)


@torch.no_grad()
def test_hooks_may_be_joined_with_others_and_leave_nothing_behind(model) -> None:
    ids, seen = model.to_tokens(PROMPTS[1]), []
    joined = [*hooks(model, direction(model).add(2.0)), (AT, lambda x, hook: seen.append(x.clone()))]
    with steer(model, direction(model).add(2.0)):
        expected = model(ids)
    assert torch.equal(model.run_with_hooks(ids, fwd_hooks=joined), expected)
    assert len(seen) == 1
    assert model.original_model._forward_pre_hooks
    del joined
    gc.collect()
    assert not model.original_model._forward_pre_hooks
    assert not [name for name, point in model.hook_dict.items() if point.fwd_hooks]


def test_hooks_refuse_what_steer_refuses(model) -> None:
    with pytest.raises(UnknownName, match="Did you mean"):
        hooks(model, Direction(torch.ones(256), "blocks.2.resid_pre").add(1.0))
    with pytest.raises(InvalidInput, match="edit of width 8 cannot act on"):
        hooks(model, Direction(torch.ones(8), AT).add(1.0))
    assert hooks(model, direction(model).add(0.0)) == []
    assert not model.original_model._forward_pre_hooks
