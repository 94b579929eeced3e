"""Which tokens are steered: in prompts, cached and uncached generation, padded batches and other people's caches."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.sites import capture
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit
from saekit.steering.positions import Tracker
from saekit.steering.steer import steer, touched

PROMPT = "The old king walked to the"  # 7 ids with BOS in the embedded model's tokens
AT = "blocks.2.hook_resid_pre"
ALL = ["all", "prompt", "generated", "last_prompt", [2, 8]]


def ones(lm) -> Direction:
    return Direction(torch.ones(lm.cfg.d_model), AT)


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [
        ("all", [1, 2, 3, 4, 5, 6]),
        ("prompt", [1, 2, 3, 4, 5, 6]),
        ("generated", []),
        ("last_prompt", [6]),
        ([0, 2], [0, 2]),
        ([], []),
    ],
)
def test_positions_in_a_prompt(model, positions, wanted) -> None:
    ids = model.to_tokens(PROMPT)
    assert ids.shape[1] == 7
    seen = []
    with (
        torch.no_grad(),
        steer(model, ones(model).add(5.0), positions=positions),
        model.hooks(fwd_hooks=[(AT, lambda x, hook: seen.append(x))]),
    ):
        model(ids)
    moved = (seen[0] != capture(model, [AT], ids)[AT]).any(-1)[0].nonzero().squeeze(1).tolist()
    assert moved == wanted
    shown = touched(model, PROMPT, ones(model).add(5.0), positions=positions)
    assert [i for i, on in enumerate(shown.sites[AT]) if on] == wanted
    assert "".join(shown.tokens[1:]) == PROMPT


def test_touched_shows_which_tokens_are_steered(model) -> None:
    shown = str(touched(model, PROMPT, ones(model).add(1.0), positions="last_prompt"))
    assert shown.endswith(" walked to« the»")
    assert shown.startswith(f"{AT}: ")
    whole = touched(model, PROMPT, ones(model).add(1.0), include_special=True)
    assert all(whole.sites[AT])
    with pytest.raises(InvalidInput, match="text: expected a text, got ''"):
        touched(model, "", ones(model).add(1.0))


def steered_positions(lm, run, positions, padding=0):
    """Which absolute positions of row 0 were steered while `run` generated, over all its forwards."""
    plain, found, length = [], set(), 0

    def keep(x, hook):
        plain.append(x.clone())

    def watch(x, hook):
        nonlocal length
        y = plain.pop()
        start = 0 if y.shape[1] > 1 else length
        found.update(start + t - padding for t in range(y.shape[1]) if not torch.equal(x[0, t], y[0, t]))
        length = start + y.shape[1]

    with (
        lm.hooks(fwd_hooks=[(AT, keep)]),
        steer(lm, ones(lm).add(1e-2), positions=positions),
        lm.hooks(fwd_hooks=[(AT, watch)]),
    ):
        run()
    return sorted(found)


@pytest.mark.parametrize("how", ["cached", "uncached", "huggingface", "static cache", "drafted"])
def test_positions_are_absolute_however_generation_runs(model, how) -> None:
    ids = model.to_tokens(PROMPT)
    hf = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    if how == "static cache":  # its attention masks have four dimensions
        hf |= {"cache_implementation": "static", "disable_compile": True}

    def run():
        if how in ("huggingface", "static cache"):
            model.original_model.generate(ids, **hf)
        elif how == "drafted":  # several tokens a step, some of them rejected and written over
            model.original_model.generate(ids, prompt_lookup_num_tokens=2, **hf)
        else:
            cached = how == "cached"
            model.generate(PROMPT, max_new_tokens=4, do_sample=False, verbose=False, use_past_kv_cache=cached)

    if how == "drafted":
        with steer(model, ones(model).add(1e-2), positions="generated"):
            drafted = model.original_model.generate(ids, prompt_lookup_num_tokens=2, **hf)
            assert torch.equal(drafted, model.original_model.generate(ids, **hf))
        return
    assert steered_positions(model, run, "all") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert steered_positions(model, run, "prompt") == [1, 2, 3, 4, 5, 6]
    assert steered_positions(model, run, "generated") == [7, 8, 9]
    assert steered_positions(model, run, "last_prompt") == [6, 7, 8, 9]
    assert steered_positions(model, run, [2, 8]) == [2, 8]


# In bf16 the plain model's own cached and uncached texts differ.
@pytest.mark.parametrize(
    "lm", ["tiny-float32", "stories260k-float32", "gemma-float32"], indirect=True, scope="module"
)
@pytest.mark.parametrize("positions", ALL, ids=str)
@pytest.mark.parametrize("kind", ["add", "cap"])
def test_cached_equals_uncached(lm, positions, kind) -> None:
    d = torch.randn(lm.cfg.d_model, generator=torch.Generator().manual_seed(0))
    edit = Edit(kind, AT, d, 0.3 if kind == "add" else 0.1, "norm")
    texts = []
    for cached in (True, False):
        with steer(lm, edit, positions=positions):
            texts.append(
                lm.generate(
                    PROMPT, max_new_tokens=10, do_sample=False, verbose=False, use_past_kv_cache=cached
                )
            )
    assert texts[0] == texts[1]


@pytest.mark.parametrize("positions", ALL, ids=str)
def test_left_padding_shifts_no_position(model, positions) -> None:
    d = torch.randn(256, generator=torch.Generator().manual_seed(0))
    prompts = ["The king", "The old king walked slowly to the"]
    with steer(model, Direction(d, AT).add(4.0), positions=positions):
        together = model.generate(prompts, max_new_tokens=6, do_sample=False, verbose=False)
        alone = [model.generate(p, max_new_tokens=6, do_sample=False, verbose=False) for p in prompts]
    assert together == alone


@pytest.mark.parametrize("positions", ALL, ids=str)
@torch.no_grad()
def test_right_padding_shifts_no_position_either(model, positions) -> None:
    d = torch.randn(256, generator=torch.Generator().manual_seed(0))
    alone, longer = model.to_tokens("The king"), model.to_tokens(PROMPT)
    n = alone.shape[1]
    ids = torch.stack([torch.cat([alone[0], longer.new_full((7 - n,), 9)]), longer[0]])
    mask = torch.ones_like(ids)
    mask[0, n:] = 0
    with steer(model, Direction(d, AT).add(4.0), positions=positions):
        together = model.original_model(ids, attention_mask=mask).logits
        torch.testing.assert_close(together[:1, :n], model(alone), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1:], model(longer), atol=1e-4, rtol=1e-4)


def test_a_second_prompt_starts_anew(model) -> None:
    with steer(model, ones(model).add(3.0), positions="generated"):
        once = model.generate(PROMPT, max_new_tokens=5, do_sample=False, verbose=False)
        again = model.generate(PROMPT, max_new_tokens=5, do_sample=False, verbose=False)
    assert once == again


@torch.no_grad()
def test_a_cache_that_was_filled_before_counts(model) -> None:
    """A block opened in the midst of a text: its positions go on where the cache ends."""
    ids = model.to_tokens(PROMPT)
    hf = model.original_model
    for positions in ([5], [2], "all", "generated"):
        with steer(model, ones(model).add(2.0), positions=positions):
            cache = hf(ids[:, :4], use_cache=True).past_key_values
            inside = hf(ids[:, 4:], past_key_values=cache).logits
        cache = hf(ids[:, :4], use_cache=True).past_key_values
        plain = hf(ids[:, 4:], past_key_values=cache).logits
        cache = hf(ids[:, :4], use_cache=True).past_key_values
        with steer(model, ones(model).add(2.0), positions=positions):
            later = hf(ids[:, 4:], past_key_values=cache).logits
        if positions == [5]:
            torch.testing.assert_close(later, inside)
            assert torch.equal(later[:, 0], plain[:, 0])
        # before the block nothing was steered; what it opens with is a prompt, not generated
        if positions in ([2], "generated"):
            assert torch.equal(later, plain)
        assert not torch.equal(inside, plain)


def test_rows_carry_their_own_edits(model) -> None:
    direction = ones(model)
    ids = model.to_tokens([PROMPT] * 3)
    with (
        torch.no_grad(),
        steer(model, rows=[[], [direction.add(1.0)], [direction.add(2.0), direction.add(2.0)]]),
    ):
        logits = model(ids)
    assert torch.equal(logits[0], model(ids)[0])
    for row, strength in enumerate((0.0, 1.0, 4.0)):
        with torch.no_grad(), steer(model, direction.add(strength)):
            torch.testing.assert_close(logits[row], model(ids[:1])[0], atol=1e-4, rtol=1e-4)
    with (
        steer(model, rows=[[direction.add(1.0)]]),
        pytest.raises(InvalidInput, match="1 lists of edits, but the batch has 3"),
    ):
        model(ids)


@torch.no_grad()
def test_rows_of_every_kind_equal_single_runs(model, sae) -> None:
    site = sae.site
    ids = model.to_tokens([PROMPT, "A small ship came", "The dog found a stone in"], padding_side="left")
    mask = (ids != 0).long()
    mask[:, :-1] |= (ids[:, 1:] != 0).long()  # BOS and what follows
    feature = Direction.from_sae(sae, 7)
    d = Direction(torch.randn(256, generator=torch.Generator().manual_seed(0)), site)
    rows = [
        [feature.clamp(3.0), d.add(0.2, unit="norm")],
        [d.rescale(3.0).when(feature, above=0.0), d.cap(0.01, unit="norm")],
        [d.swap(model, "Another one"), feature.scale(4.0), d.add(1.0)],
    ]
    with steer(model, rows=rows):
        together = model.original_model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        )
    for row, edits in enumerate(rows):
        n = int(mask[row].sum())
        with steer(model, edits):
            alone = model(ids[row : row + 1, -n:])
        torch.testing.assert_close(together.logits[row, -n:], alone[0], atol=2e-4, rtol=2e-4)


def test_a_call_without_ids_says_so(model) -> None:
    with steer(model, ones(model).add(1.0)), pytest.raises(InvalidInput, match="without token ids"):
        model.original_model(inputs_embeds=torch.zeros(1, 2, 256))


@pytest.mark.parametrize("positions", ["sometimes", [-1], [1.5], 3, [True], None])
def test_positions_that_are_none(model, positions) -> None:
    with pytest.raises(InvalidInput, match="positions: "), steer(model, positions=positions):
        pass


def test_positions_count_real_tokens_on_either_side_of_padding() -> None:
    """Also where the mask has four dimensions, and the given positions show what is missing on the left."""
    tracker, ids = Tracker(), torch.full((3, 4), 7)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    tracker(None, (ids,), {"attention_mask": mask})
    assert tracker.look.position.tolist() == [[-1, -1, 0, 1], [0, 1, -1, -1], [0, 1, 2, 3]]
    last = tracker.look.mask("last_prompt")
    assert last.nonzero().tolist() == [[0, 3], [1, 1], [2, 3]]
    for positions in ("all", "prompt"):
        assert torch.equal(tracker.look.mask(positions), mask.bool()), "padding is no token"
        assert not tracker.look.mask(positions, [7]).any()
    given = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]])
    tracker(None, (ids,), {"attention_mask": torch.zeros(3, 1, 4, 4), "position_ids": given})
    assert tracker.look.position.tolist() == [[-1, -1, 0, 1], [-1, 0, 1, 2], [0, 1, 2, 3]]
    assert torch.equal(tracker.look.mask("all"), tracker.look.position >= 0)
    tracker(None, (ids,), {"position_ids": given})  # without a mask nothing is padding
    assert tracker.look.position.tolist() == [[0, 1, 2, 3]] * 3
    assert tracker.look.mask("all").all()


def test_beams_that_change_rows_go_on_generating() -> None:
    """Uncached beam search: each row of a step continues some row of the last one."""
    tracker = Tracker()
    tracker(None, (torch.tensor([[5, 6], [5, 6]]),), {})
    tracker(None, (torch.tensor([[5, 6, 1], [5, 6, 2]]),), {})
    tracker(None, (torch.tensor([[5, 6, 2, 7], [5, 6, 2, 8]]),), {})
    assert tracker.look.mask("generated").tolist() == [[False, False, True, True]] * 2
    tracker(
        None, (torch.tensor([[5, 6, 3, 7, 1], [5, 6, 2, 8, 1]]),), {}
    )  # no row of the last one: a new text
    assert tracker.look.mask("generated") is None
