"""Each kind of edit as identities, on three families of models in fp32 and bf16."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import SITE

from saekit.errors import InvalidInput, UnknownName
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit, Source, orthonormal, swap
from saekit.steering.steer import steer, touched

PROMPT = "The old king walked to the"
OTHER = "A small ship came from the river"
AT = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def feature(lm):
    """Makes edits of a feature that fires on the prompt's last token. Each dtype and each family meets both kinds of SAE."""
    D = lm.cfg.d_model
    topk = (lm.cfg.dtype == torch.bfloat16) != (lm.cfg.model_name == "tiny")
    sae = SAE.new("topk" if topk else "standard", d_in=D, d_sae=4 * D, site=AT, k=8 if topk else None)
    x = capture(lm, [AT], lm.to_tokens(PROMPT))[AT]
    f = sae.encode(x).detach()
    latent = int(f[0, -1].argmax())

    def make(kind, strength=0.0, unit="raw", latent=latent):
        return Edit(
            kind, AT, sae.direction(latent), strength, unit, f"feature {latent}", latent=latent, sae=sae,
            max_activation=float(f.max()),
        )  # fmt: skip

    make.sae, make.latent, make.f = sae, latent, f[..., latent]
    make.direction = Direction(sae.direction(latent), AT)
    return make


@torch.no_grad()
def after(lm, *edits, text=PROMPT, site=AT, **options):
    """Activations at the site after the edits, float32."""
    seen = []
    with steer(lm, *edits, **options), lm.hooks(fwd_hooks=[(site, lambda x, hook: seen.append(x))]):
        lm(lm.to_tokens(text))
    return seen[0].float()


def at(lm, text=PROMPT, site=AT):
    return capture(lm, [site], lm.to_tokens(text))[site].float()


def close(lm, got, expected, skip_bos=True):
    """Equal to what fp32 sums, or one rounding to bf16, leave."""
    if skip_bos:
        got, expected = got[:, 1:], expected[:, 1:]
    if lm.cfg.dtype == torch.float32:
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, scale), rtol=1e-4)
    else:
        torch.testing.assert_close(got, expected.bfloat16().float(), atol=1e-2, rtol=1.6e-2)


def between(values):
    """A threshold that some of the values exceed, halfway between two of them."""
    low, high = values.detach().sort().values.unique()[-2:].tolist()
    return (low + high) / 2


# No change


@pytest.mark.parametrize(
    ("kind", "strength", "unit"),
    [("add", 0, "raw"), ("add", 0, "max"), ("add", 0, "norm"), ("scale", 1, "raw"), ("rescale", 1, "raw")],
)
@torch.no_grad()
def test_an_edit_that_changes_nothing_is_the_plain_model_bit_for_bit(lm, feature, kind, strength, unit):
    ids = lm.to_tokens(PROMPT)
    plain = lm(ids)
    with steer(lm, feature(kind, strength, unit)):
        assert torch.equal(lm(ids), plain)


@pytest.mark.parametrize("kind", ["clamp", "min_clamp"])
def test_clamping_to_its_own_value_changes_nothing(lm, feature, kind) -> None:
    own = float(feature.f[0, -1])
    assert own > 0
    got = after(lm, feature(kind, own), positions="last_prompt")
    close(lm, got, at(lm), skip_bos=False)


def test_a_bound_that_nothing_reaches_passes_bit_for_bit(lm, feature) -> None:
    x = at(lm)
    assert torch.equal(after(lm, feature("cap", 1e6)), x)
    assert torch.equal(after(lm, feature("min_clamp", -1.0)), x)
    silent = int((feature.sae.encode(x)[0, -1] == 0).nonzero()[0])
    assert torch.equal(after(lm, feature("ablate", latent=silent), positions="last_prompt"), x)


# What each kind does


def test_add_adds_and_leaves_bos_alone(lm, feature) -> None:
    x = at(lm)
    got = after(lm, feature("add", 3.0))
    close(lm, got, x + 3.0 * feature.sae.direction(feature.latent))
    assert torch.equal(got[:, 0], x[:, 0])


def test_units(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    m, norm = feature("add").max_activation, x[0, 1:].norm(dim=1).median()
    close(lm, after(lm, feature("add", 0.5, "max")), x + 0.5 * m * d)
    close(lm, after(lm, feature("add", 0.5, "norm")), x + 0.5 * norm * d / d.norm())
    close(lm, after(lm, feature("clamp", 0.5, "max")), after(lm, feature("clamp", 0.5 * m)))
    close(lm, after(lm, feature("min_clamp", 2, "max")), after(lm, feature("min_clamp", 2 * m)))
    close(lm, after(lm, feature("cap", -0.1, "norm")), after(lm, feature("cap", float(-0.1 * norm))))


@torch.no_grad()
def test_a_norm_measured_on_the_prompt_is_each_rows_own(model) -> None:
    """Padding and the other rows do not count, and a second prompt is measured anew."""
    prompts = ["king king king king", "The old river near the garden"]
    alone = [model.to_tokens(prompt) for prompt in prompts]
    n = max(ids.shape[1] for ids in alone)
    ids = torch.stack([torch.cat([one.new_full((n - one.shape[1],), 9), one[0]]) for one in alone])
    mask = torch.stack([(torch.arange(n) >= n - one.shape[1]).long() for one in alone])
    hf, position_ids = model.original_model, (mask.cumsum(1) - 1).clamp_min(0)
    assert not mask.all()
    with steer(
        model,
        Direction(torch.randn(256, generator=torch.Generator().manual_seed(0)), AT).add(2.0, unit="norm"),
    ):
        together = hf(ids, attention_mask=mask, position_ids=position_ids).logits
        for row, one in enumerate(alone):
            torch.testing.assert_close(together[row, -1], model(one)[0, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clamp_is_the_clamped_reconstruction_with_the_error_put_back(lm, feature) -> None:
    x, sae = at(lm), feature.sae
    f = sae.encode(x)
    error = x - sae.decode(f)
    f[..., feature.latent] = 5.0
    close(lm, after(lm, feature("clamp", 5.0)), sae.decode(f) + error)


@torch.no_grad()
def test_min_clamp_is_clamp_below_and_nothing_above(lm, feature) -> None:
    x, target = at(lm), between(feature.f[0, 1:])
    got, clamped = after(lm, feature("min_clamp", target)), after(lm, feature("clamp", target))
    below = feature.f[0] < target
    assert below[1:].any()
    assert not below[1:].all()
    close(lm, got[:, below], clamped[:, below])
    assert torch.equal(got[:, ~below], x[:, ~below])


def test_ablate_is_clamp_to_zero_is_scale_by_zero(lm, feature) -> None:
    edits = (feature("ablate"), feature("clamp", 0.0), feature("scale", 0.0))
    results = [after(lm, edit) for edit in edits]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not torch.equal(results[0], at(lm))


def test_scale_scales_the_feature(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    close(lm, after(lm, feature("scale", 3.0)), x + 2 * feature.f[..., None] * d)


def test_project_out_leaves_nothing_along_the_direction(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    unit = d / d.norm()
    close(lm, after(lm, feature("project_out")), x - (x @ unit)[..., None] * unit)
    close(lm, after(lm, feature("rescale", 0.0)), after(lm, feature("project_out")))
    with steer(lm, feature("project_out")):
        close(lm, after(lm, feature("project_out")), x - (x @ unit)[..., None] * unit)  # idempotent
    if lm.cfg.dtype == torch.float32:
        left = after(lm, feature.direction.project_out())[0, 1:] @ unit  # no SAE needed
        assert float(left.abs().max()) < 1e-4 * float(x.norm(dim=-1).max())


def test_rescale_scales_the_component(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    unit = d / d.norm()
    close(lm, after(lm, feature.direction.rescale(2.5)), x + 1.5 * (x @ unit)[..., None] * unit)
    with steer(lm, feature.direction.rescale(-1.0)):
        close(lm, after(lm, feature.direction.rescale(-1.0)), x)  # a reflection is its own inverse


def test_cap_caps_and_leaves_what_is_below(lm, feature) -> None:
    x, d = at(lm), feature.sae.direction(feature.latent)
    unit = d / d.norm()
    p = (x @ unit)[0, 1:]
    c = between(p)
    got = after(lm, feature.direction.cap(c))
    close(lm, got, x + ((x @ unit).clamp_max(c) - x @ unit)[..., None] * unit)
    below = torch.cat([torch.tensor([True]), p <= c])
    assert torch.equal(got[:, below], x[:, below])


# Swap


def test_swap_gives_the_component_of_another_run(lm, feature) -> None:
    x, other = at(lm), at(lm, "A ship")
    d = feature.sae.direction(feature.latent)
    unit, n = d / d.norm(), other.shape[1]
    assert n < x.shape[1]
    expected = x.clone()
    expected[:, :n] += ((other[:, :n] - x[:, :n]) @ unit)[..., None] * unit
    got = after(lm, feature.direction.swap(lm, "A ship"))
    close(lm, got, expected)
    assert torch.equal(got[:, n:], x[:, n:])  # where the other text has no token nothing is swapped
    last = feature.direction.swap(lm, "A ship", position=-1)
    close(lm, after(lm, last), x + ((other[:, -1:] - x) @ unit)[..., None] * unit)


def test_swap_of_a_subspace_does_not_depend_on_its_basis(lm) -> None:
    D = lm.cfg.d_model
    rows = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    a = [Direction(row, AT) for row in rows]
    b = [Direction(row, AT) for row in torch.tensor([[1.0, 2, 0], [0, 1, 1], [1, 0, 3]]) @ rows]
    x, other = at(lm), at(lm, OTHER)
    q = torch.linalg.qr(rows.t()).Q
    got = after(lm, swap(lm, OTHER, *a, position=-1))
    close(lm, got, x + (other[:, -1:] - x) @ q @ q.t())
    close(lm, after(lm, swap(lm, OTHER, *b, position=-1)), got)


def test_swap_with_its_own_run_changes_nothing(lm, feature) -> None:
    x = at(lm)
    close(lm, after(lm, feature.direction.swap(lm, PROMPT)), x, skip_bos=False)
    assert torch.equal(after(lm, swap(lm, PROMPT, site=AT)), x)


@torch.no_grad()
def test_swapping_everything_is_the_other_run(lm) -> None:
    """All of x from position 0 on: from the site on the model computes what it computes for the other text."""
    ids, other = lm.to_tokens("The old king"), lm.to_tokens("A big river")
    n = min(ids.shape[1], other.shape[1])
    ids, other = ids[:, :n], other[:, :n]
    with steer(lm, swap(lm, "A big river", site=AT), include_special=True):
        swapped = lm(ids)
    expected = lm(other)
    exact = {"atol": 1e-4, "rtol": 1e-4} if lm.cfg.dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(swapped, expected, **exact)
    assert not torch.allclose(swapped, lm(ids))


def test_swaps_that_cannot_be_made(model) -> None:
    d = torch.arange(256.0)
    with pytest.raises(InvalidInput, match="the 2 directions are linearly dependent"):
        swap(model, OTHER, Direction(d, AT), Direction(-2 * d, AT))
    with pytest.raises(InvalidInput, match="expected directions of one site, got"):
        swap(model, OTHER, Direction(d, AT), Direction(d, SITE))
    with pytest.raises(InvalidInput, match="or site=… to swap all of it"):
        swap(model, OTHER)
    with pytest.raises(InvalidInput, match="expected another text, got ''"):
        Direction(d, AT).swap(model, "")
    with pytest.raises(InvalidInput, match="position 99 of a text of"):
        Direction(d, AT).swap(model, OTHER, position=99)
    with pytest.raises(UnknownName, match="Did you mean"):
        swap(model, OTHER, site="blocks.2.resid_pre")
    with pytest.raises(InvalidInput, match="swap needs what another prompt's run had"):
        Edit("swap", AT, d, 0.0)
    with pytest.raises(InvalidInput, match="source: only swap takes one, not add"):
        Edit("add", AT, d, 0.0, source=Source(d))
    with pytest.raises(InvalidInput, match="states of width 8 for a direction of width 256"):
        Edit("swap", AT, d, 0.0, source=Source(torch.ones(8)))
    with pytest.raises(InvalidInput, match="expected basis rows of width 8"):
        Source(torch.ones(8), torch.ones(1, 7))
    with pytest.raises(InvalidInput, match=r"expected a state \[D\] or states \[T, D\]"):
        Source(torch.ones(1, 2, 3))


def test_an_orthonormal_basis_spans_what_it_is_made_of() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [9], [0.1], [3]]
    )
    q = orthonormal(list(rows))
    torch.testing.assert_close(q @ q.t(), torch.eye(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows @ q.t() @ q, rows, atol=1e-4, rtol=1e-5)


# Together


@torch.no_grad()
def test_edits_compose_from_the_unedited_activations(lm, feature) -> None:
    x, sae = at(lm), feature.sae
    a, b = feature.latent, int(sae.encode(x)[0, -2].topk(3).indices[2])
    f, d, e = sae.encode(x), sae.direction(a), sae.direction(b)
    unit = e / e.norm()
    expected = x + (4 - f[..., [a]]) * d + (2 - f[..., [b]]) * e + d - (x @ unit)[..., None] * unit
    edits = [feature("clamp", 4.0), feature("clamp", 2.0, latent=b), feature("add", 1.0)]
    edits.append(feature("project_out", latent=b))
    close(lm, after(lm, edits), expected)
    close(lm, after(lm, edits[::-1]), expected)


def test_nested_steering_acts_on_what_the_outer_one_left(lm, feature) -> None:
    with steer(lm, feature("add", 1.0)):
        nested = after(lm, feature("add", 2.0))
    close(lm, nested, after(lm, feature("add", 1.0), feature("add", 2.0)))
    with steer(lm, feature("add", 7.0)):
        close(lm, after(lm, feature("project_out")), after(lm, feature("project_out")))


def test_several_sites(lm) -> None:
    D = lm.cfg.d_model
    early, late = (Direction(torch.ones(D), f"blocks.{i}.hook_resid_pre") for i in (1, 2))
    with torch.no_grad(), steer(lm, early.add(1.0)), steer(lm, late.add(2.0)):
        one_by_one = lm(lm.to_tokens(PROMPT))
    with torch.no_grad(), steer(lm, early.add(1.0), late.add(2.0)):
        assert torch.equal(lm(lm.to_tokens(PROMPT)), one_by_one)


@pytest.mark.parametrize("kind", ["add", "clamp", "project_out", "scale"])
def test_the_norm_is_kept_where_it_is_asked_for(lm, feature, kind) -> None:
    x = at(lm)
    edit = feature(kind, 6.0)
    got, free = after(lm, edit, preserve_norm=True), after(lm, edit)
    norms = x.norm(dim=-1)
    torch.testing.assert_close(
        got.norm(dim=-1), norms, rtol=1e-5 if lm.cfg.dtype == torch.float32 else 4e-3, atol=0
    )
    assert torch.equal(got[:, 0], x[:, 0])
    y = x + (free - x)
    if lm.cfg.dtype == torch.float32:
        close(lm, got, y * (norms / y.norm(dim=-1))[..., None])


# Conditions and positions of an edit's own


@torch.no_grad()
def test_a_condition_on_a_feature(lm, feature) -> None:
    x, threshold = at(lm), between(feature.f[0, 1:])
    fires = feature.f[0] > threshold
    fires[0] = False
    probe = Direction(feature.sae.direction(feature.latent), AT, sae=feature.sae, latent=feature.latent)
    edit = feature.direction.add(4.0).when(probe, above=threshold)
    got, free = after(lm, edit), after(lm, feature.direction.add(4.0))
    assert torch.equal(got[:, fires], free[:, fires])
    assert torch.equal(got[:, ~fires], x[:, ~fires])
    assert fires.any()
    assert touched(lm, PROMPT, edit).sites[AT] == fires.tolist()


@torch.no_grad()
def test_a_condition_on_a_projection_at_an_earlier_site(lm, feature) -> None:
    """It sees that site's un-edited activations, also where they are edited in the same forward."""
    early = "blocks.1.hook_resid_pre"
    d = torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(3))
    probe = Direction(d, early)
    p = (at(lm, site=early) @ (d / d.norm()))[0]
    threshold = between(p[1:])
    wanted = p > threshold
    wanted[0] = False
    edit = feature("clamp", 4.0).when(probe, above=threshold)
    assert touched(lm, PROMPT, edit).sites == {AT: wanted.tolist()}
    both = touched(lm, PROMPT, edit, probe.add(50.0))
    assert both.sites[AT] == wanted.tolist()
    assert str(edit).endswith(f"at {AT} where direction > {threshold:g}")


def test_an_edit_may_have_positions_of_its_own(lm) -> None:
    direction = Direction(torch.ones(lm.cfg.d_model), AT)
    edits = [direction.add(1.0).at([0]), direction.add(2.0).at([2, 3]), direction.add(4.0)]
    moved = (after(lm, edits, positions="last_prompt") - at(lm)).mean(-1)[0]
    wanted = torch.zeros(len(moved))
    wanted[0], wanted[2:4], wanted[-1] = 1.0, 2.0, 4.0
    torch.testing.assert_close(moved, wanted, atol=0.05, rtol=0)
    with pytest.raises(InvalidInput, match="positions: 'never'"):
        direction.add(1.0).at("never")


@torch.no_grad()
def test_many_edits_at_one_position_each(model) -> None:
    """They are looked up together, also per row: the same as one by one."""
    draw = torch.Generator().manual_seed(0)
    edits = [Direction(torch.randn(256, generator=draw), AT).add(1.0).at([p]) for p in (5, 1, 2, 5, 40)]
    ids = model.to_tokens([PROMPT] * 2)
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(steer(model, edit))
        one_by_one = model(ids)
    with steer(model, edits):
        torch.testing.assert_close(model(ids), one_by_one, atol=1e-4, rtol=1e-4)
    with steer(model, rows=[edits, [edits[1]]]):
        together = model(ids)
    torch.testing.assert_close(together[0], one_by_one[0], atol=1e-4, rtol=1e-4)
    with steer(model, edits[1]):
        torch.testing.assert_close(together[1], model(ids)[1], atol=1e-4, rtol=1e-4)


# Transcoders and crosscoders


@torch.no_grad()
def test_a_transcoder_is_read_at_its_input_and_written_at_its_output(lm) -> None:
    D, target = lm.cfg.d_model, "blocks.2.hook_mlp_out"
    transcoder = SAE.new("standard", d_in=D, d_out=D, d_sae=4 * D, site=AT, target_site=target)
    f, y = transcoder.encode(at(lm)), at(lm, site=target)
    feature = Direction.from_sae(transcoder, int(f[0, -1].argmax()))
    f, d = f[..., feature.latent], feature.vector
    assert feature.site == target
    close(lm, after(lm, feature.clamp(3.0), site=target), y + (3 - f)[..., None] * d)
    close(lm, after(lm, feature.ablate(), site=target), y - f[..., None] * d)
    close(lm, after(lm, feature.min_clamp(3.0), site=target), y + (f.clamp_min(3) - f)[..., None] * d)
    # an edit at the input in the same forward moves y (through the block), not the f that is taken off
    other = Direction(torch.ones(D), AT).add(0.05)
    with_it = after(lm, other, site=target)
    close(lm, after(lm, feature.ablate(), other, site=target), with_it - f[..., None] * d)


@torch.no_grad()
def test_a_crosscoder_is_read_at_all_its_sites_and_written_at_the_last(lm) -> None:
    D, sites = lm.cfg.d_model, ["blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"]
    crosscoder = SAE.new("standard", d_in=2 * D, d_sae=4 * D, site=sites)
    x = torch.cat([at(lm, site=site) for site in sites], -1)
    f = crosscoder.encode(x)
    latent = int(f[0, -1].argmax())
    late = Direction.from_sae(crosscoder, latent, sites[1])
    got = after(lm, late.ablate(), site=sites[1])
    close(lm, got, x[..., D:] - f[..., [latent]] * late.vector)
    early = Direction.from_sae(crosscoder, latent, sites[0])
    with (
        pytest.raises(
            InvalidInput, match=r"at blocks\.1\.hook_resid_pre depends on blocks\.3\.hook_resid_pre, which"
        ),
        steer(lm, early.ablate()),
    ):
        pass
    with steer(lm, early.add(1.0)):  # needs no activation
        lm(lm.to_tokens(PROMPT))


def test_a_direction_of_an_sae_is_at_the_site_it_writes(model) -> None:
    target = "blocks.3.hook_mlp_out"
    transcoder = SAE.new("topk", d_in=256, d_out=256, d_sae=8, k=2, site=SITE, target_site=target)
    direction = Direction.from_sae(transcoder, 3)
    assert direction.add(1.0).site == target
    assert torch.equal(direction.vector, transcoder.W_dec[3])
    crosscoder = SAE.new("standard", d_in=512, d_sae=8, site=[SITE, "blocks.5.hook_resid_pre"])
    with pytest.raises(InvalidInput, match="name one, site="):
        Direction.from_sae(crosscoder, 3)
    with pytest.raises(UnknownName, match="this SAE writes"):
        Direction.from_sae(crosscoder, 3, "blocks.1.hook_resid_pre")
    late = Direction.from_sae(crosscoder, 3, "blocks.5.hook_resid_pre")
    assert torch.equal(late.vector, crosscoder.W_dec[3, 256:])


def test_an_sae_of_another_width_is_refused(model) -> None:
    sae = SAE.new("standard", d_in=64, d_out=256, d_sae=8, site=AT, target_site=SITE)
    edit = Direction.from_sae(sae, 0).ablate()
    with (
        pytest.raises(
            InvalidInput, match=f"an SAE of width 64 cannot act on {AT} of tiny, which has width 256"
        ),
        steer(model, edit),
    ):
        pass


# Values


def test_gradients_pass_through_an_edit(model) -> None:
    """Attribution inside of `steer` sees what the edit made of the activations."""
    ids, d = model.to_tokens(PROMPT), torch.randn(256, generator=torch.Generator().manual_seed(0))
    grads = []
    for way in ("steer", "by hand"):
        x = at(model, site="blocks.1.hook_resid_pre").requires_grad_()
        hooks = [("blocks.1.hook_resid_pre", lambda _, hook, x=x: x)]
        if way == "by hand":
            hooks.append((AT, lambda y, hook: y - (y @ d)[..., None] * d / d.square().sum() + d))
        with model.hooks(fwd_hooks=hooks):
            if way == "steer":
                direction = Direction(d, AT)
                with steer(model, direction.add(1.0), direction.project_out(), include_special=True):
                    model(ids)[0, -1, 5].backward()
            else:
                model(ids)[0, -1, 5].backward()
        grads.append(x.grad)
    model.zero_grad()
    assert float(grads[0].abs().max()) > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_edits_read_well(feature) -> None:
    name = f"feature {feature.latent} at {AT}"
    assert str(feature("add", 8.0)) == f"add 8 {name}"
    assert str(feature("clamp", 10.0, "max")) == f"clamp 10 × max {name}"
    assert str(feature("ablate")) == f"ablate {name}"
    assert str(feature("cap", 2.5)) == f"cap 2.5 {name}"
    edit = feature("add", 1.5).when(feature.direction, above=0.25).at("generated")
    assert str(edit) == f"add 1.5 {name} where direction > 0.25, positions generated"
    assert "tensor" not in repr(edit)


def test_a_swap_says_from_where(model) -> None:
    edit = Direction(torch.ones(256), AT, "love").swap(model, OTHER, position=-1)
    assert str(edit) == f"swap love from {OTHER!r}[-1] at {AT}"
    assert str(swap(model, OTHER, site=AT)) == f"swap everything from {OTHER!r} at {AT}"


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "8", None, True])
def test_strengths_that_are_no_numbers(strength) -> None:
    direction = Direction(torch.ones(4), "s")
    with pytest.raises(InvalidInput, match="strength: expected a finite number"):
        direction.add(strength)
    with pytest.raises(InvalidInput, match="above: expected a finite number"):
        direction.add(1.0).when(direction, above=strength)


def test_wrong_edits_say_what_to_do() -> None:
    d = torch.ones(4)
    for kind in ("clamp", "min_clamp", "ablate", "scale"):
        with pytest.raises(InvalidInput, match=f"{kind} needs a feature of an SAE; .* use add, project_out"):
            Edit(kind, "s", d, 1.0)
    kinds = "add, clamp, min_clamp, ablate, scale, project_out, rescale, cap, swap"
    with pytest.raises(InvalidInput, match=f"'push' is not one of {kinds}"):
        Edit("push", "s", d, 1.0)
    with pytest.raises(InvalidInput, match="unit: add takes raw or max or norm, not 'sd'"):
        Direction(d, "s").add(1.0, unit="sd")
    with pytest.raises(InvalidInput, match="unit: cap takes raw or norm, not 'max'"):
        Direction(d, "s").cap(1.0, unit="max")
    with pytest.raises(InvalidInput, match="no maximum activation is known"):
        Edit("add", "s", d, 1.0, "max")
    for edit in (lambda z: z.project_out(), lambda z: z.cap(1.0), lambda z: z.add(1.0, unit="norm")):
        with pytest.raises(InvalidInput, match="a direction of zeros points nowhere"):
            edit(Direction(torch.zeros(4), "s"))
    with pytest.raises(InvalidInput, match=r"expected a direction \[D\], got \(2, 4\)"):
        Edit("add", "s", torch.ones(2, 4), 1.0)
