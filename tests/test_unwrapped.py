"""The model without the bridge's wrappers: the same logits, the same hooks, nothing left changed."""

from __future__ import annotations

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
            assert (
                len(components(lm)) < 16 * 3
            )  # the hooked block's at most, under its own names and the bridge's
    assert seen == [site, site]
    assert not torch.allclose(expected, plain, atol=1e-3)


def test_torch_hooks_on_components_and_on_modules_fire(lm) -> None:
    fired = []
    block = lm.blocks[1]
    for module in (block, block.mlp, block.original_component, lm.original_model.get_output_embeddings()):
        handle = module.register_forward_hook(lambda *_: fired.append(1))
        with unwrapped(lm):
            logits(lm)
        handle.remove()
    assert len(fired) == 4


def test_components_come_back_after_an_exception(lm) -> None:
    before = components(lm)
    with pytest.raises(ZeroDivisionError), unwrapped(lm):
        raise ZeroDivisionError
    assert components(lm) == before


def test_weights_that_the_bridge_has_folded_stay_with_it() -> None:
    lm = saekit.load_model("tiny", dtype="float32", device="cpu")
    lm.enable_compatibility_mode()
    plain, before = logits(lm), components(lm)
    with unwrapped(lm):
        assert components(lm) == before
        assert torch.equal(logits(lm), plain)


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
