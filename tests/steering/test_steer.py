"""Edits on and off: what a `with` block leaves as it was, and what users hit in other libraries, each as a test.

Which tokens are steered is in test_positions.py, what each edit does in test_edits.py.
"""

from __future__ import annotations

import threading

import pytest
import torch

from saekit.errors import InvalidInput, UnknownName
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering.directions import Direction
from saekit.steering.steer import edited, steer

PROMPT = "The old king walked to the"
AT = "blocks.2.hook_resid_pre"


def ones(lm) -> Direction:
    return Direction(torch.ones(lm.cfg.d_model), AT)


def state(lm):
    """Everything of a model that steering could leave changed."""
    hf = lm.original_model
    return {
        "weights": [p.clone() for p in hf.parameters()],
        "hooks": [n for n, h in lm.hook_dict.items() if h.fwd_hooks or h.bwd_hooks],
        "pre-hooks": sum(len(m._forward_pre_hooks) for m in hf.modules()),
        "forward hooks": sum(len(m._forward_hooks) for m in hf.modules()),
        "attributes": sorted(vars(lm)),
        "types": [type(m) for m in hf.modules()],
    }


def equal(a, b) -> bool:
    weights = all(torch.equal(p, q) for p, q in zip(a.pop("weights"), b.pop("weights"), strict=True))
    return weights and a == b


@torch.no_grad()
def test_after_the_block_the_model_is_bit_identical_also_after_an_exception(lm) -> None:
    ids = lm.to_tokens(PROMPT)
    plain, before = lm(ids), state(lm)
    with pytest.raises(KeyboardInterrupt), steer(lm, ones(lm).add(9.0)), edited(lm, ones(lm).project_out()):
        lm(ids)
        raise KeyboardInterrupt
    assert torch.equal(lm(ids), plain)
    assert equal(before, state(lm))


@torch.no_grad()
def test_an_exception_in_the_midst_of_a_forward_leaves_nothing(model) -> None:
    def fail(x, hook):
        raise RuntimeError("in the midst")

    ids = model.to_tokens(PROMPT)
    plain, before = model(ids), state(model)
    with (
        pytest.raises(RuntimeError, match="in the midst"),
        model.hooks(fwd_hooks=[("blocks.4.hook_resid_pre", fail)]),
        steer(model, ones(model).add(9.0)),
    ):
        model(ids)
    assert torch.equal(model(ids), plain)
    assert equal(before, state(model))


@torch.no_grad()
def test_edits_that_cannot_go_on_leave_nothing(model) -> None:
    before = state(model)
    with (
        pytest.raises(UnknownName),
        steer(model, ones(model).add(1.0), Direction(torch.ones(256), "x").add(1)),
    ):
        pass
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[AT, "blocks.4.hook_resid_pre"])
    with pytest.raises(InvalidInput), steer(model, Direction.from_sae(crosscoder, 0, AT).ablate()):
        pass
    assert equal(before, state(model))


@torch.no_grad()
def test_blocks_may_be_left_in_any_order(model) -> None:
    """As in a notebook, where a cell opens a block and another one closes it."""
    ids = model.to_tokens(PROMPT)
    plain = model(ids)
    first, second = steer(model, ones(model).add(1.0)), steer(model, ones(model).add(2.0))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with_second = model(ids)
    second.__exit__(None, None, None)
    with steer(model, ones(model).add(2.0)):
        assert torch.equal(model(ids), with_second)
    assert torch.equal(model(ids), plain)


@torch.no_grad()
def test_the_hooks_of_others_are_left_alone(model) -> None:
    ids, seen = model.to_tokens(PROMPT), []
    with model.hooks(fwd_hooks=[(AT, lambda x, hook: seen.append(1))]):
        with steer(model, ones(model).add(1.0)):
            model(ids)
        model(ids)
    assert len(seen) == 2


# What users hit elsewhere


def test_the_first_generated_token_is_steered(lm) -> None:
    """It comes from the last prompt token's activations, in the prefill."""
    d = torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 1, "do_sample": False, "verbose": False}
    plain = lm.generate(PROMPT, **options)
    for positions in ("all", "last_prompt"):
        with steer(lm, Direction(d, AT).add(20.0, unit="norm"), positions=positions):
            assert lm.generate(PROMPT, **options) != plain


def test_positions_do_not_stop_or_crash_with_a_cache(lm) -> None:
    """Positions named once count through all cached steps, to the end of the context and one by one."""
    far = list(range(lm.cfg.n_ctx))
    options = {"max_new_tokens": 12, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with steer(lm, ones(lm).add(0.3, unit="norm"), include_special=True):
        named = lm.generate(PROMPT, **options)
    with steer(lm, ones(lm).add(0.3, unit="norm"), positions=far):
        assert lm.generate(PROMPT, **options) == named


@torch.no_grad()
def test_a_clamp_is_not_cancelled_by_the_error_term(lm) -> None:
    """The error is that of the un-edited reconstruction: what goes on is x plus the change, also where SAE(x) is poor."""
    D = lm.cfg.d_model
    sae = SAE.new("standard", d_in=D, d_sae=D, site=AT, seed=5)
    sae.b_enc -= 0.1
    x = capture(lm, [AT], lm.to_tokens(PROMPT))[AT].float()
    f = sae.encode(x)
    assert float((x - sae(x)).norm() / x.norm()) > 0.1
    latent = int(f[0, -1].argmax())
    direction, seen = Direction.from_sae(sae, latent), []
    with steer(lm, direction.clamp(50.0)), lm.hooks(fwd_hooks=[(AT, lambda y, hook: seen.append(y))]):
        lm(lm.to_tokens(PROMPT))
    moved = (seen[0].float() - x)[0, 1:] @ direction.vector / direction.vector.square().sum()
    torch.testing.assert_close(moved, 50 - f[0, 1:, latent], rtol=2e-2, atol=0.2)


def test_nothing_is_wrapped(lm) -> None:
    """Modules keep their place, type and attributes while steered: no wrapper stands between."""
    before = state(lm)["types"]
    attention = lm.blocks[2].attn
    with steer(lm, ones(lm).add(1.0), ones(lm).project_out()):
        assert state(lm)["types"] == before
        assert lm.blocks[2].attn is attention
        assert lm.cfg.n_layers == len(lm.blocks)


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


def test_what_is_no_edit_is_refused(model) -> None:
    with pytest.raises(InvalidInput, match="expected edits such as feature.add"), steer(model, 8.0):
        pass
    with pytest.raises(InvalidInput, match="not both"), steer(model, ones(model).add(1), rows=[[]]):
        pass


@torch.no_grad()
def test_two_models_are_steered_apart(lm, model) -> None:
    ids = model.to_tokens(PROMPT)
    plain = model(ids)
    with steer(lm, ones(lm).add(5.0)):
        lm(lm.to_tokens(PROMPT))
        assert torch.equal(model(ids), plain) or lm is model


def test_a_block_works_in_another_thread(model) -> None:
    """As a server does it, which steers in a worker."""
    found = []

    def work() -> None:
        with torch.no_grad(), steer(model, ones(model).add(5.0)):
            found.append(model(model.to_tokens(PROMPT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with torch.no_grad(), steer(model, ones(model).add(5.0)):
        assert torch.equal(model(model.to_tokens(PROMPT)), found[0])


def test_an_edit_found_in_another_model_is_refused(family) -> None:
    """Same width and site, other weights: a direction means nothing there."""
    import copy

    model = family("tiny", "float32")
    found = Direction.from_contrast(model, " Jedi", " phone", site="blocks.2.hook_resid_pre")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.original_model.parameters())).mul_(1.1)
    for edit in (found.add(2.0), found.replace(), (2 * found).add(1.0)):
        with steer(model, edit):
            pass
        with (
            pytest.raises(
                InvalidInput, match="' phone'.* was found in a model with weights .*to steer another model"
            ),
            steer(other, edit),
        ):
            pass
    ids = other.to_tokens("The king")
    with steer(other, Direction(found.vector, found.site).add(50.0)), torch.no_grad():
        steered = other(ids)
    assert not torch.equal(steered, other(ids))
