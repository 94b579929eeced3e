"""The model without the bridge's wrappers: the same logits, the same hooks, nothing left changed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SHARED

import saekit
from saekit.sites import editing
from saekit.unwrapped import unwrapped

TEXT = "The king sees a river and the garden of"
SITES = [
    "hook_embed", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out",
    "blocks.1.hook_attn_out", "blocks.1.hook_resid_mid", "blocks.2.attn.hook_z", "blocks.1.mlp.hook_post",
]  # fmt: skip


@pytest.fixture(scope="module", params=["tiny", "stories260k"])
def lm(request: pytest.FixtureRequest) -> Any:
    place = "tiny" if request.param == "tiny" else SHARED / "models" / request.param
    if request.param != "tiny" and not place.is_dir():
        pytest.skip(f"../shared/models/{request.param} is missing")
    return saekit.load_model(place, dtype="float32", device="cpu")


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    return lm.original_model(lm.to_tokens(TEXT)).logits


def components(lm: Any) -> list[str]:
    """Names of what the bridge put into the Hugging Face model, in the forward's way."""
    return [
        name for name, module in lm.original_model.named_modules() if hasattr(module, "original_component")
    ]


def test_nobody_listens_nothing_is_wrapped(lm) -> None:
    plain, before = logits(lm), components(lm)
    assert before
    with unwrapped(lm):
        assert not components(lm)
        torch.testing.assert_close(logits(lm), plain, atol=1e-4, rtol=1e-4)
    assert components(lm) == before
    assert torch.equal(logits(lm), plain)


@pytest.mark.parametrize("site", SITES)
def test_hooks_that_are_on_act(lm, site) -> None:
    plain, seen = logits(lm), []

    def turned(x: torch.Tensor) -> torch.Tensor:
        seen.append(site)
        return x.flip(-1)

    with editing(lm, {site: turned}):
        expected = logits(lm)
        with unwrapped(lm):
            torch.testing.assert_close(logits(lm), expected, atol=1e-4, rtol=1e-4)
            if site.endswith(("hook_resid_pre", "hook_resid_post")):
                assert not components(lm), "where a block begins or ends its hooks are met without them"
            assert (
                len(components(lm)) < 16 * 3
            )  # the hooked block's at most, under its own names and the bridge's
        assert torch.equal(logits(lm), expected)
    assert seen.pop() == site
    assert seen == [site, site]
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_torch_hooks_on_components_and_on_modules_fire(lm) -> None:
    fired = []
    block = lm.blocks[1]
    head = lm.original_model.get_output_embeddings()
    logits(lm)  # at its first forward transformers puts hooks of its own on the blocks
    before = [*block.original_component._forward_hooks, *block.original_component._forward_pre_hooks]
    for module in (block, block.hook_in, block.hook_out, block.mlp, block.original_component, head):
        handle = module.register_forward_hook(lambda *_: fired.append(1))
        with unwrapped(lm):
            logits(lm)
        handle.remove()
    assert len(fired) == 6
    assert [*block.original_component._forward_hooks, *block.original_component._forward_pre_hooks] == before


def test_components_come_back_after_an_exception(lm) -> None:
    before = components(lm)
    with pytest.raises(ZeroDivisionError), unwrapped(lm):
        raise ZeroDivisionError
    assert components(lm) == before


@pytest.mark.parametrize("processing", ["enable_compatibility_mode", "process_weights"])
def test_weights_that_the_bridge_has_folded_stay_with_it(processing) -> None:
    lm = saekit.load_model("tiny", dtype="float32", device="cpu")
    getattr(lm, processing)()
    plain, before = logits(lm), components(lm)
    with unwrapped(lm):
        assert components(lm) == before
        assert torch.equal(logits(lm), plain)


@contextlib.contextmanager
def hooked(point: Any, fired: list[Any]) -> Iterator[None]:
    """A hook that only tells that it was there, put on without a look at the model's tree."""
    handle = point.register_forward_hook(lambda *_: fired.append(1))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern"])
def test_one_inside_another_sees_the_hooks_of_its_own_time(lm, site) -> None:
    point, fired = lm.get_hook_point(site), []
    config, before = lm.original_model.config, components(lm)
    with unwrapped(lm):
        with hooked(point, fired), unwrapped(lm):
            logits(lm)
        assert config._attn_implementation == "sdpa"
        assert not components(lm)
    assert fired == [1]
    assert components(lm) == before
    assert config._attn_implementation == "eager"
    with unwrapped(lm):  # and the one after them finds all components again
        assert not components(lm)


def test_another_thread_waits_and_then_its_hooks_act(lm) -> None:
    point, fired, waited = lm.get_hook_point("blocks.1.hook_resid_pre"), [], []
    begun, is_open = threading.Event(), threading.Event()

    def other() -> None:
        with hooked(point, fired):
            begun.set()
            with unwrapped(lm):
                waited.append(not is_open.is_set())
                logits(lm)

    thread = threading.Thread(target=other)
    with unwrapped(lm):
        is_open.set()
        thread.start()
        assert begun.wait(10)
        thread.join(0.1)
        logits(lm)
        is_open.clear()
    thread.join()
    assert waited == [True]
    assert fired == [1]


def test_attention_is_fused_while_nobody_looks_inside_a_block(lm) -> None:
    config = lm.original_model.config
    assert config._attn_implementation == "eager"
    for site, inside in [("blocks.1.hook_resid_pre", "sdpa"), ("blocks.1.attn.hook_pattern", "eager")]:
        with editing(lm, {site: lambda x: x}), unwrapped(lm):
            assert config._attn_implementation == inside
        assert config._attn_implementation == "eager"


def test_capped_attention_is_not_fused(lm, monkeypatch) -> None:
    """The fused operation knows no cap of its logits (Gemma 2's)."""
    monkeypatch.setattr(lm.original_model.config, "attn_logit_softcapping", 50.0, raising=False)
    with unwrapped(lm):
        assert lm.original_model.config._attn_implementation == "eager"
