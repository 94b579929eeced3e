from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.lm import to_logits
from saekit.steering.choosing import LENS, PROMPT, choose, input_score, lens_tokens, output_scores
from saekit.steering.directions import Direction
from saekit.steering.steer import steer

SITE = "blocks.3.hook_resid_pre"


@pytest.mark.parametrize("name", ["model", "llama"])
def test_lens_tokens_are_the_limit_of_a_strong_push(request, name) -> None:
    """At the last residual a huge multiple of d leaves nothing but d for the final norm: its logits rank as the lens does."""
    model = request.getfixturevalue(name)
    d = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    ids = model.to_tokens(PROMPT)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad(), steer(model, Direction(d, last).add(1e5)):
        logits = model(ids)[0, -1].float()
    bias = getattr(model, "b_U", None)
    lens = lens_tokens(model, [Direction(d, last).add(1.0)])[0].tolist()
    assert lens == to_logits(model, d[None])[0].topk(LENS).indices.tolist()
    agreed = set(lens) & set(logits.topk(LENS).indices.tolist())
    assert len(agreed) >= LENS - 2, bias


def test_output_scores_are_the_definition(model) -> None:
    draw = torch.Generator().manual_seed(1)
    edits = [Direction(torch.randn(256, generator=draw), SITE).add(s) for s in (0.5, 20.0, 2.0)]
    found = output_scores(model, edits)
    ids = model.to_tokens(PROMPT)
    for edit, score in zip(edits, found, strict=True):
        with torch.no_grad(), steer(model, edit):
            p = model(ids)[0, -1].float().softmax(-1)
        lens = to_logits(model, edit.direction[None])[0].topk(LENS).indices
        ranks = p.argsort(descending=True).argsort()[lens]
        assert score.probability == pytest.approx(float(p[lens].max()), rel=1e-3)
        assert score.rank == int(ranks.min())
        assert score.score == pytest.approx(score.probability * (1 - score.rank / len(p)), rel=1e-6)
        assert model.tokenizer(score.token, add_special_tokens=False)["input_ids"][0] == int(
            lens[p[lens].argmax()]
        )
    assert output_scores(model, []) == []


def test_a_direction_of_the_unembedding_scores_high_and_a_random_one_low(model) -> None:
    token = model.tokenizer(" king", add_special_tokens=False)["input_ids"][0]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    column = model.W_U[:, token].detach().float()
    says_king = Direction(column, last).add(float(40 / column.norm()))
    random = Direction.random(column, last, 3).add(float(0.1 / column.norm()))
    good, bad = output_scores(model, [says_king, random])
    assert good.token == " king"
    assert good.rank == 0
    assert good.score > 0.3 > bad.score


def test_off_the_residual_stream_there_are_no_lens_tokens(model) -> None:
    width = model.cfg.d_mlp
    edit = Direction(torch.ones(width), "blocks.1.mlp.hook_post").add(1.0)
    with pytest.raises(InvalidInput, match="does not write to the residual stream"):
        output_scores(model, [edit])


class _Feature(SimpleNamespace):
    def add(self, strength, unit="raw"):
        return Direction(self.direction, SITE).add(strength * (self.max_activation if unit == "max" else 1))


def test_features_are_ranked_by_what_they_do_and_scored_by_what_fires_them(model) -> None:
    token = model.tokenizer(" king", add_special_tokens=False)["input_ids"][0]
    column = model.W_U[:, token].detach().float()
    lens = lens_tokens(model, [Direction(column, SITE).add(1.0)])[0].tolist()
    contexts = [SimpleNamespace(token_ids=[1, i], peak=1) for i in (lens[0], lens[1], -5, -6)]
    king = _Feature(direction=column, max_activation=float(2 / column.norm()), contexts=contexts)
    faint = _Feature(
        direction=torch.randn(256, generator=torch.Generator().manual_seed(2)),
        max_activation=1e-4,
        contexts=[],
    )
    dead = _Feature(direction=column, max_activation=0.0, contexts=[])
    assert [feature for feature, _ in choose(model, [faint, dead, king])] == [king, faint]
    assert input_score(model, king) == 0.5
    assert input_score(model, dead) is None
