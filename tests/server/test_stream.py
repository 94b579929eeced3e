"""Streamed answers and sweeps: what they tell is what the library says of the same question."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import saekit
from saekit.steering.generate import generate
from saekit.steering.judging import repetition
from saekit.steering.sweep import control_of, sweep

if TYPE_CHECKING:
    from starlette.testclient import TestClient
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog

pytestmark = pytest.mark.usefixtures("no_leaked_hooks")
PROMPT = "Once upon a time"


def told(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_stream_is_compare_piece_by_piece(
    client: TestClient, question: Any, catalog: Catalog, model: TransformerBridge
) -> None:
    asked = question(max_new_tokens=8, positions="generated", temperature=0.8)
    start, *texts, done = told(client.post("/api/stream", json=asked))
    edit = catalog[3].add(2.0, unit="norm")
    side = saekit.compare(
        model, PROMPT, edit, max_new_tokens=8, seed=1, positions="generated", temperature=0.8
    )
    assert start["sides"] == ["plain", "steered"]
    assert start["edits"] == [str(edit)]
    assert start["kl"] == pytest.approx(side.kl, abs=1e-6)
    assert {event["event"] for event in texts} == {"text"}
    assert done["texts"] == {"plain": side.plain, "steered": side.steered}
    for name, whole in done["texts"].items():
        assert PROMPT + "".join(e["text"] for e in texts if e["side"] == name) == whole
    assert done["perplexity"]["steered"] == pytest.approx(side.perplexity, rel=1e-3)
    assert done["tokens"] == 8
    assert 0 < done["seconds"] < 600


def test_both_sides_advance_together(client: TestClient, question: Any) -> None:
    _, *texts, _ = told(client.post("/api/stream", json=question(max_new_tokens=8, control=True)))
    sides = [event["side"] for event in texts]
    assert sides[:3] == ["plain", "steered", "control"]
    assert max(abs(sides[:n].count("plain") - sides[:n].count("steered")) for n in range(len(sides))) <= 2


def test_the_control_is_a_random_direction_of_the_same_norm(
    client: TestClient, question: Any, catalog: Catalog, model: TransformerBridge
) -> None:
    edits = [
        {"feature": 3, "strength": 2.0, "unit": "norm"},
        {"feature": 5, "strength": -1.0, "unit": "norm"},
    ]
    start, *_, done = told(client.post("/api/stream", json=question(edits=edits, control=True)))
    assert start["sides"] == ["plain", "steered", "control"]
    assert {len(row) for row in start["top_tokens"]} == {4}
    real = [catalog[3].add(2.0, unit="norm"), catalog[5].add(-1.0, unit="norm")]
    control = [control_of(edit, 1 + i) for i, edit in enumerate(real)]
    side = saekit.compare(model, PROMPT, control, max_new_tokens=4, seed=1)
    assert done["texts"]["control"] == side.steered
    token, plain, _, by_control = start["top_tokens"][0]
    moved = {model.tokenizer.decode([i]): float(p) for i, p in enumerate(side.p_steered)}
    assert by_control == pytest.approx(moved[token], rel=1e-3)
    assert by_control != plain


def test_no_edit_is_the_plain_model(client: TestClient, question: Any) -> None:
    start, *_, done = told(client.post("/api/stream", json=question(edits=[])))
    assert start["kl"] == 0
    assert done["texts"]["plain"] == done["texts"]["steered"]


def test_a_text_steered_to_pieces_is_still_json(
    client: TestClient, question: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perplexity may be beyond all numbers, a probability none at all."""
    from saekit.server import live

    monkeypatch.setattr(live, "strangeness", lambda *_: float("inf"))
    monkeypatch.setattr(
        live, "next_token_probabilities", lambda _, ids: torch.full((len(ids), 100), torch.nan)
    )
    edits = [{"feature": 3, "strength": 1e6, "unit": "norm"}]
    answer = client.post("/api/stream", json=question(edits=edits))
    start, *_, done = told(answer)
    assert start["kl"] is None
    assert {p for _, *row in start["top_tokens"] for p in row} == {None}
    assert done["perplexity"] == {"plain": None, "steered": None}
    assert "NaN" not in answer.text
    assert "Infinity" not in answer.text


@pytest.mark.parametrize(
    ("path", "changes", "status", "named"),
    [
        ("stream", {"prompt": "word " * 300}, 400, "context of 256"),
        ("stream", {"edits": [{"feature": 64}]}, 404, "feature 64"),
        ("stream", {"control": "yes"}, 400, "control"),
        ("stream", {"edits": [{"feature": 3, "kind": "swap"}]}, 400, "kind"),
        ("sweep", {"strengths": []}, 400, "strengths"),
        ("sweep", {"strengths": [0.0] * 13}, 400, "strengths"),
        ("sweep", {"strengths": [1e7]}, 400, "strengths"),
        ("sweep", {"strengths": [1.0], "samples": 9}, 400, "samples"),
        ("sweep", {"strengths": [1.0], "edits": []}, 400, "edits"),
        ("sweep", {"strengths": [1.0], "edits": [{"feature": 3, "kind": "ablate"}]}, 400, "no strength"),
    ],
)
def test_a_bad_question_is_refused_before_anything_is_told(
    client: TestClient, question: Any, path: str, changes: dict[str, Any], status: int, named: str
) -> None:
    answer = client.post(f"/api/{path}", json=question(**changes))
    assert answer.status_code == status, answer.text
    assert named in answer.json()["error"]


def test_a_sweep_is_the_librarys(
    client: TestClient, question: Any, catalog: Catalog, model: TransformerBridge
) -> None:
    asked = question(
        edits=[{"feature": 3, "unit": "norm"}], strengths=[0.0, 1.0, 4.0], samples=2, max_new_tokens=6
    )
    *rows, done = told(client.post("/api/sweep", json=asked))
    expected = sweep(
        model, PROMPT, lambda c: catalog[3].add(c, unit="norm"), [0.0, 1.0, 4.0], samples=2, controls=1,
        max_new_tokens=6, seed=1,
    )  # fmt: skip
    assert [row["strength"] for row in rows] == [0.0, 1.0, 4.0]
    for row, wanted in zip(rows, expected, strict=True):
        for side in ("steered", "control"):
            for name, value in row[side].items():
                assert value == pytest.approx(getattr(getattr(wanted, side), name), rel=1e-3, abs=1e-6), name
    assert done["plain"]["perplexity"] == pytest.approx(expected.plain.perplexity, rel=1e-3)
    knee = expected.knee()
    assert done["knee"] == (None if knee is None else knee.strength)
    for name in ("perplexity", "repetition"):
        assert rows[0]["steered"][name] == pytest.approx(done["plain"][name], rel=1e-3)


def test_the_other_edits_of_a_sweep_stay(
    client: TestClient, question: Any, catalog: Catalog, model: TransformerBridge
) -> None:
    other = {"feature": 5, "strength": 3.0, "unit": "norm"}
    asked = question(edits=[{"feature": 3}, other], strengths=[0.0], samples=1)
    row, _ = told(client.post("/api/sweep", json=asked))
    with saekit.steer(model, catalog[5].add(3.0, unit="norm")):
        [made] = generate(model, [PROMPT], 4, seed=1)
    assert row["steered"]["repetition"] == repetition(made.ids[made.prompt_length :].tolist())
    side = saekit.compare(model, PROMPT, catalog[5].add(3.0, unit="norm"), max_new_tokens=4, seed=1)
    assert row["steered"]["kl"] == row["control"]["kl"] == pytest.approx(side.kl, rel=1e-3)
    assert row["steered"]["perplexity"] == pytest.approx(side.perplexity, rel=1e-3)


def test_the_description_tells_every_question(client: TestClient, question: Any) -> None:
    told_of = client.get("/api").json()
    assert set(told_of["paths"]) == {"/api/stream", "/api/sweep", "/api/steer", "/api/activations"}
    for path, of in told_of["paths"].items():
        assert client.get(path).status_code == 405
        assert client.post(path, json={}).status_code == 400
        assert of["question"]["additionalProperties"] is False
    assert told_of["limits"]["text"] == 20_000
    *rows, done = told(client.post("/api/sweep", json=question(strengths=[1.0, 2.0], samples=1)))
    start, *texts, end = told(client.post("/api/stream", json=question()))
    for path, found in (("/api/stream", [start, *texts, end]), ("/api/sweep", [*rows, done])):
        known = {event["event"]: set(event) for event in told_of["paths"][path]["events"]}
        assert all(set(event) == known[event["event"]] for event in found)
