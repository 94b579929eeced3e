from __future__ import annotations

import math

import pytest
import torch

from saekit.steering.compare import compare, spelled
from saekit.steering.directions import Direction
from saekit.steering.steer import steer
from saekit.steering.sweep import sweep

PROMPT = "Mike pulls out his"
SITE = "blocks.3.hook_resid_pre"


@pytest.fixture(scope="module")
def jedi(model) -> Direction:
    return Direction.from_contrast(model, " Jedi", " phone", site=SITE)


def test_compare_tells_what_moved(model, jedi) -> None:
    side = compare(model, PROMPT, [jedi.add(0.8)], max_new_tokens=10, seed=0)
    ids = model.to_tokens(PROMPT)
    with torch.no_grad():
        p = model(ids)[0, -1].softmax(-1)
        with steer(model, jedi.add(0.8)):
            q = model(ids)[0, -1].softmax(-1)
    parts = q * (q / p).log()
    assert side.kl == pytest.approx(float(parts.sum()), rel=1e-3)
    for moved, value in (
        (side.top_tokens, lambda row: abs(row[2] - row[1])),
        (side.kl_tokens, lambda row: abs(row[1])),
    ):
        assert [value(row) for row in moved] == sorted(map(value, moved), reverse=True)
    for token, a, b in side.top_tokens:
        i = model.tokenizer(token, add_special_tokens=False)["input_ids"][0]
        assert (a, b) == pytest.approx((float(p[i]), float(q[i])), rel=1e-4)
    for token, part in side.kl_tokens:
        i = model.tokenizer(token, add_special_tokens=False)["input_ids"][0]
        assert part == pytest.approx(float(parts[i]), rel=1e-3)
    assert side.plain.startswith(PROMPT)
    assert "' Jedi' − ' phone'" in str(side)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last_prompt", [2, 5]])
def test_the_odds_are_those_the_text_was_drawn_from(model, jedi, positions) -> None:
    """Greedy: each token of the steered text is the steered model's likeliest, so its log-probability is the greatest there."""
    side = compare(model, PROMPT, jedi.add(0.8), max_new_tokens=6, temperature=0, positions=positions)
    assert side.steered == PROMPT + "".join(odds.token for odds in side.steered_odds)
    seen = []
    with steer(model, jedi.add(0.8), positions=positions):
        model.original_model.generate(
            model.to_tokens(PROMPT), max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        ids = model.to_tokens(PROMPT)
        for _ in range(6):  # one forward a token, without a cache: positions are told apart by the tracker
            with torch.no_grad():
                log_p = model(ids)[0, -1].float().log_softmax(-1)
            seen.append(float(log_p.max()))
            ids = torch.cat([ids, log_p.argmax()[None, None]], 1)
    assert [odds.steered for odds in side.steered_odds] == pytest.approx(
        seen[: len(side.steered_odds)], abs=2e-4
    )
    assert side.perplexity == pytest.approx(
        math.exp(-sum(o.plain for o in side.steered_odds) / len(side.steered_odds)), rel=1e-4
    )


def test_strength_zero_is_the_plain_model(model, jedi) -> None:
    side = compare(model, PROMPT, jedi.add(0.0), max_new_tokens=8, seed=3)
    assert side.plain == side.steered
    assert side.kl == 0
    assert side.plain_odds == side.steered_odds
    assert all(odds.plain == odds.steered for odds in side.plain_odds)


def test_a_seed_settles_the_sampling(model, jedi) -> None:
    one, again, other = (compare(model, PROMPT, jedi.add(0.5), seed=s, max_new_tokens=8) for s in (5, 5, 6))
    assert (one.plain, one.steered) == (again.plain, again.steered)
    assert one.plain != other.plain


def test_names_of_positions_spelled_out() -> None:
    ids = torch.tensor([0, 5, 6, 7, 0, 8])
    assert spelled("all", ids, 3, (0,)) == "all"
    assert spelled([1], ids, 3, (0,)) == [1]
    assert spelled("prompt", ids, 3, (0,)) == [1, 2]
    assert spelled("last_prompt", ids, 3, (0,)) == [2, 3, 5]
    assert spelled("generated", ids, 3, ()) == [3, 4, 5]


def test_ids_may_be_compared_and_swept(model) -> None:
    ids = model.to_tokens("The king sees")[0]
    push = Direction(torch.ones(256), "blocks.2.hook_resid_pre")
    by_ids, by_text = (
        compare(model, prompt, push.add(3.0), max_new_tokens=3) for prompt in (ids, "The king sees")
    )
    assert (by_ids.prompt, by_ids.steered, by_ids.kl) == (by_text.prompt, by_text.steered, by_text.kl)
    rows = [
        sweep(model, prompt, push.add, [1.0], max_new_tokens=3, samples=1, controls=1)
        for prompt in (ids, "The king sees")
    ]
    assert rows[0].rows[0].text == rows[1].rows[0].text
