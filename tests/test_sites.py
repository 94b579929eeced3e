from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saekit.errors import UnknownName
from saekit.sites import capture, check_site, editing, read, site_width

SITES = [
    "blocks.2.hook_resid_pre",
    "blocks.2.hook_resid_mid",
    "blocks.2.hook_mlp_out",
    "blocks.2.hook_attn_out",
]


@pytest.mark.parametrize("fixture", ["model", "llama"])
def test_capture_is_what_a_whole_forward_shows(fixture: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(fixture)
    ids = torch.randint(5, 500, (3, 11), generator=torch.Generator().manual_seed(0))
    sites = [site for site in SITES if site in model.hook_dict]
    stopped = capture(model, sites, ids)
    _, cache = model.run_with_cache(ids)
    for site in sites:
        assert torch.equal(stopped[site], cache[site]), site
        assert site_width(model, site) == cache[site].shape[-1]


def test_capture_stops_at_the_site(model) -> None:
    seen = []
    with model.hooks(fwd_hooks=[("blocks.3.hook_in", lambda x, hook: seen.append(3))]):
        capture(model, ["blocks.2.hook_resid_pre"], torch.tensor([[1, 2]]))
        assert seen == []
        capture(model, ["blocks.4.hook_resid_pre"], torch.tensor([[1, 2]]))
        assert seen == [3]


class Counted(TorchDispatchMode):
    """Counts every operation that torch runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("site", SITES)
def test_nothing_past_the_site_is_computed(model, site: str) -> None:
    """No operation runs after the one whose result the site is, be it of the same block."""
    reached = []
    operations = Counted()
    seeing = model.hooks(fwd_hooks=[(site, lambda x, hook: reached.append(operations.count))])
    with operations, seeing:
        seen = capture(model, ["blocks.1.hook_resid_pre", site], torch.tensor([[1, 2]]))
    assert len(seen) == 2
    assert reached == [operations.count]


@pytest.mark.usefixtures("no_leaked_hooks")
def test_reading_and_editing_do_not_list_all_hook_points(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens builds `hook_dict` anew at each access, which costs as much as a block."""
    site, ids = "blocks.2.hook_resid_pre", torch.tensor([[5, 6, 7]])
    monkeypatch.setattr(
        type(model), "hook_dict", property(lambda self: pytest.fail("listed all hook points"))
    )
    capture(model, [site], ids)
    with editing(model, {site: lambda x: x * 0}):
        model(ids)


def test_a_reset_inside_editing_is_no_fault(model) -> None:
    site, ids = "blocks.2.hook_resid_pre", torch.tensor([[5, 6, 7]])
    plain = model(ids)
    with editing(model, {site: lambda x: x * 0}):
        model.reset_hooks()
        assert torch.equal(model(ids), plain)


def test_read_puts_sites_side_by_side_in_the_order_named(model) -> None:
    ids = torch.randint(5, 500, (3, 11), generator=torch.Generator().manual_seed(0))
    late, early = "blocks.4.hook_resid_pre", "blocks.1.hook_resid_pre"
    both = read(model, [late, early], ids)
    assert torch.equal(both, torch.cat([capture(model, [s], ids)[s] for s in (late, early)], -1))
    assert torch.equal(read(model, [late], ids), capture(model, [late], ids)[late])


def test_a_site_named_twice_still_stops_the_forward(model) -> None:
    seen = []
    with model.hooks(fwd_hooks=[("blocks.3.hook_in", lambda x, hook: seen.append(3))]):
        capture(model, [SITES[0], SITES[0]], torch.tensor([[1, 2]]))
    assert seen == []


def test_heads_are_seen_flat(model) -> None:
    z = capture(model, ["blocks.1.attn.hook_z"], torch.tensor([[1, 2, 3]]))["blocks.1.attn.hook_z"]
    assert z.shape == (1, 3, model.cfg.d_model)
    with editing(model, {"blocks.1.attn.hook_z": lambda x: x}):
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, model.cfg.d_vocab)


def test_unknown_site_lists_near_names(model) -> None:
    with pytest.raises(UnknownName, match=r"blocks\.9\.hook_resid_pre.*6 blocks.*Did you mean"):
        check_site(model, "blocks.9.hook_resid_pre")
    with pytest.raises(UnknownName, match="use_attn_in"):  # exists, but a flag keeps it off
        capture(model, ["blocks.1.hook_attn_in"], torch.tensor([[1, 2]]))


@pytest.mark.usefixtures("no_leaked_hooks")
def test_editing_changes_and_comes_off_also_after_an_exception(model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids)
    with editing(model, {"blocks.2.hook_resid_pre": lambda x: x * 0}):
        assert not torch.equal(model(ids), plain)
    assert torch.equal(model(ids), plain)
    with pytest.raises(ZeroDivisionError), editing(model, {"blocks.2.hook_resid_pre": lambda x: 1 / 0}):
        model(ids)
    assert torch.equal(model(ids), plain)


def test_editing_leaves_other_hooks_alone(model) -> None:
    seen = []
    model.add_hook("blocks.2.hook_in", lambda x, hook: seen.append(1))
    try:
        with editing(model, {"blocks.2.hook_resid_pre": lambda x: x}):
            model(torch.tensor([[1]]))
        model(torch.tensor([[1]]))
        assert seen == [1, 1]
    finally:
        model.reset_hooks()


def test_nested_edits_compose(model) -> None:
    site, ids = "blocks.2.hook_resid_pre", torch.tensor([[5, 6, 7]])
    with editing(model, {site: lambda x: x * 3}):
        direct = model(ids)
    with editing(model, {site: lambda x: x + x}), editing(model, {site: lambda x: x * 1.5}):
        torch.testing.assert_close(model(ids), direct)
