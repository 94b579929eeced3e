from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from catalog.explain.server import completion, serving
from catalog.explain.worlds import DETECTOR, NOISE, SILENT

from saekit.catalog import Catalog
from saekit.catalog.explain import Endpoint, explain, plan, strongest
from saekit.catalog.explain.answers import Answer, Prompt
from saekit.catalog.explain.prompts import DETECT, EXPLAIN, FUZZ, SIMULATE
from saekit.catalog.tables import read_table
from saekit.errors import Interrupted, InvalidInput, UnknownFeature

ALL = ["simulation", "detection", "fuzzing"]
TOKEN_LINE = re.compile(r"^(.*)\t([0-9]+)$", re.MULTILINE)


def oracle(text: str) -> str:
    """A model that explains a feature by the word with the highest numbers, and judges by looking for that word."""
    if text.startswith(EXPLAIN):
        strongest = [token.strip() for token, n in TOKEN_LINE.findall(text) if int(n) >= 9]
        return max(set(strongest), key=strongest.count)
    word, material = re.search(r"It fires on: (.*)\n\n((?:.|\n)*)", text).groups()  # type: ignore[union-attr]
    if text.startswith(SIMULATE):
        lines = [line.removesuffix("\tunknown") for line in material.split("\n")]
        return "\n".join(f"{token}\t{10 if token.strip() == word else 0}" for token in lines)
    texts = [json.loads(line.split(". ", 1)[1]) for line in material.split("\n")]
    if text.startswith(DETECT):
        return str([int(f" {word} " in f"{t} ") for t in texts])
    assert text.startswith(FUZZ)
    return str([int(all(mark == f" {word}" for mark in re.findall("<<(.*?)>>", t))) for t in texts])


class Fake:
    """A client that answers from a function, and remembers what it was asked."""

    model = "fake-1"

    def __init__(self, answer: Callable[[str], str | None] = oracle, stop_after: int | None = None) -> None:
        self.answer, self.stop_after = answer, stop_after
        self.asked: list[Prompt] = []

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[Prompt, Answer], None]) -> None:
        for prompt in prompts:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            said = self.answer(prompt.text)
            keep(prompt, Answer("", error="refused") if said is None else Answer(said))


def scores(folder: Path) -> dict[tuple[int, str], dict]:
    return {(row["feature"], row["scorer"]): row for row in read_table(folder, "scores").to_pylist()}


def test_what_is_true_scores_one(folder) -> None:
    client = Fake()
    stated: list[str] = []
    done = explain(folder, [DETECTOR, 5], client, score=ALL, say=stated.append, control=True)
    assert {row["feature"]: row["text"] for row in done.explanations} == {DETECTOR: "Jedi", 5: "Master"}
    assert read_table(folder, "explanations").to_pylist() == sorted(
        done.explanations, key=lambda r: r["feature"]
    )
    found = scores(folder)
    for feature in (DETECTOR, 5):
        for scorer in ("simulation", "detection", "detection_f1", "fuzzing", "fuzzing_f1"):
            row = found[feature, scorer]
            assert row["score"] == pytest.approx(1, abs=1e-6)
            assert row["failures"] == 0
            assert row["n"] >= 12
            assert row["n"] % 2 == 0
            assert (row["method"], row["model"], row["judge"]) == ("llm", "fake-1", "fake-1")
            assert len(row["prompt"]) == len(row["judge_prompt"]) == 16
        assert abs(found[feature, "simulation"]["control"]) < 0.2
        assert found[feature, "detection"]["control"] < 0.8
        assert found[feature, "fuzzing"]["control"] < 0.6
    assert len({found[5, name]["judge_prompt"] for name in ALL}) == 3
    assert stated[0].startswith(f"2 features by fake-1: {len(client.asked)} requests (2 of explanation, ")


def test_the_cost_is_what_is_asked(folder) -> None:
    client = Fake(lambda text: oracle(text) if text.startswith(EXPLAIN) else "no")
    made = plan(folder, [DETECTOR, 4, 5], client, score=ALL, held_out=4, batch=3)
    cost = made.cost
    made.run()
    assert sum(cost.requests.values()) == len(client.asked)
    kinds = {"explanation": EXPLAIN, "simulation": SIMULATE, "detection": DETECT, "fuzzing": FUZZ}
    for kind, instructions in kinds.items():
        assert cost.requests[kind] == sum(p.instructions == instructions for p in client.asked)
    really = sum(p.tokens for p in client.asked)
    assert 0.8 * really < cost.prompt_tokens < 1.25 * really
    after = plan(folder, [DETECTOR, 4, 5], client, score=ALL, held_out=4, batch=3)
    assert sum(after.cost.requests.values()) == 0
    assert after.cost.answered == len(client.asked)
    assert f"{len(client.asked)} more are answered in {folder}.answers.jsonl" in str(after)


def test_no_prompt_shows_the_judge_what_the_explainer_saw(folder) -> None:
    """The texts of the two are disjoint: no stretch of six tokens of one stands in the other."""
    client = Fake()
    explain(folder, [DETECTOR, 4, 5, 6, NOISE], client, score=ALL, say=lambda _: None)

    def stretches(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    shown, tried = set(), set()
    for prompt in client.asked:
        if prompt.instructions == EXPLAIN:
            for excerpt in prompt.material.split("\n\n"):
                shown |= stretches([token for token, _ in TOKEN_LINE.findall(excerpt)])
        elif prompt.instructions == SIMULATE:
            tried |= stretches([line.removesuffix("\tunknown") for line in prompt.material.split("\n")[2:]])
        else:
            for line in prompt.material.split("\n")[2:]:
                text = json.loads(line.split(". ", 1)[1]).replace("<<", "").replace(">>", "")
                tried |= stretches([f" {word}" for word in text.split()])
    assert len(shown) > 50
    assert len(tried) > 100
    assert not shown & tried


def test_answers_that_cannot_be_read_are_failures_and_not_zeros(folder) -> None:
    """Every other judgement is prose: its five windows are failures, the rest still scores 1."""
    judged = 0

    def half(text: str) -> str:
        nonlocal judged
        if text.startswith(DETECT):
            judged += 1
            if judged % 2:
                return "I think the first one does."
        return "no idea" if text.startswith(SIMULATE) else oracle(text)

    done = explain(folder, [DETECTOR], Fake(half), score=["detection", "simulation"], say=lambda _: None)
    found = scores(folder)
    row = found[DETECTOR, "detection"]
    assert row["failures"] > 0
    assert row["n"] > 0
    assert row["n"] + row["failures"] in range(12, 21, 2)
    assert row["score"] == pytest.approx(1)
    blank = found[DETECTOR, "simulation"]
    assert blank["score"] is None
    assert blank["n"] == 0
    assert blank["failures"] >= 12
    assert "excerpts without a readable answer" in str(done)


def test_refusals_are_failures_and_are_tried_again_another_time(folder) -> None:
    refuse = Fake(lambda text: None if text.startswith(DETECT) else oracle(text))
    explain(folder, [DETECTOR], refuse, say=lambda _: None)
    row = scores(folder)[DETECTOR, "detection"]
    assert (row["score"], row["n"]) == (None, 0)
    assert row["failures"] >= 12
    again = Fake()
    explain(folder, [DETECTOR], again, say=lambda _: None)
    assert {p.instructions for p in again.asked} == {DETECT}
    row = scores(folder)[DETECTOR, "detection"]
    assert (row["score"], row["failures"]) == (1, 0)


def test_features_without_an_explanation_are_named(folder) -> None:
    client = Fake(lambda text: "...")
    done = explain(folder, [SILENT, DETECTOR], client, say=lambda _: None)
    assert done.unexplained == {
        SILENT: "no context in the documents that explain",
        DETECTOR: "the answer holds no words",
    }
    assert read_table(folder, "explanations").num_rows == 0
    refused = explain(folder, [5], Fake(lambda _: None), say=lambda _: None)
    assert refused.unexplained == {5: "refused"}


@pytest.mark.parametrize("stop_after", [0, 1, 3, 7, 10])
def test_ctrl_c_loses_nothing_and_nothing_is_asked_twice(folder, stop_after) -> None:
    first = Fake(stop_after=stop_after)
    with pytest.raises(Interrupted, match=f"stopped after {stop_after} answers, which are kept in"):
        explain(folder, [DETECTOR, 4], first, score=ALL, say=lambda _: None, held_out=2)
    if stop_after >= 2:  # what was whole is written
        assert read_table(folder, "explanations").num_rows == 2
    second = Fake()
    explain(folder, [DETECTOR, 4], second, score=ALL, say=lambda _: None, held_out=2)
    ids = [p.id for p in first.asked + second.asked]
    assert len(first.asked) == stop_after
    assert len(ids) == len(set(ids))
    third = Fake()
    explain(folder, [DETECTOR, 4], third, score=ALL, say=lambda _: None, held_out=2)
    assert not third.asked
    assert scores(folder)[4, "simulation"]["score"] == pytest.approx(1, abs=1e-6)


def test_finished_features_are_written_before_the_rest_is_asked(folder, monkeypatch) -> None:
    monkeypatch.setattr("saekit.catalog.explain.protocol.CHUNK", 1)
    client = Fake(stop_after=9)
    with pytest.raises(Interrupted):
        explain(folder, [DETECTOR, 4, 5, 6], client, say=lambda _: None)
    assert (DETECTOR, "detection") in scores(folder)
    assert (6, "detection") not in scores(folder)


def test_another_protocol_does_not_replace_the_first(folder) -> None:
    explain(folder, [DETECTOR], Fake(), say=lambda _: None)
    explain(folder, [DETECTOR], Fake(), say=lambda _: None, held_out=3)
    table = read_table(folder, "scores").to_pylist()
    assert len({row["judge_prompt"] for row in table if row["scorer"] == "detection"}) == 2
    assert read_table(folder, "explanations").num_rows == 1


def test_prompts_out_and_answers_in(folder, tmp_path) -> None:
    def made():
        return plan(folder, [DETECTOR, 5], "fake-1", score=ALL)

    out, back = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"

    def answer_all(leave_out: int = 0) -> list[str]:
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        answers = []
        for i, line in enumerate(lines[leave_out:]):
            text = oracle(line["body"]["messages"][0]["content"])
            assert (line["method"], line["url"], line["body"]["model"]) == (
                "POST",
                "/v1/chat/completions",
                "fake-1",
            )
            batch = {
                "custom_id": line["custom_id"],
                "response": {"status_code": 200, "body": completion(text)},
            }
            answers.append(batch if i % 2 else {"id": line["custom_id"], "text": text})
        back.write_text("".join(json.dumps(a) + "\n" for a in answers), "utf-8")
        return [line["custom_id"] for line in lines[:leave_out]]

    assert made().write_prompts(out) == 2
    answer_all()
    done = made().read_answers(back)
    assert {row["text"] for row in done.explanations} == {"Jedi", "Master"}
    assert done.scores == []
    n = made().write_prompts(out)
    assert len(done.missing) == n > 20
    left = answer_all(leave_out=1)
    done = made().read_answers(back)
    assert done.missing == left
    assert f"1 prompts without an answer: {left[0]}" in str(done)
    assert made().write_prompts(out) == 1
    answer_all()
    assert made().read_answers(back).missing == []
    assert scores(folder)[DETECTOR, "simulation"]["score"] == pytest.approx(1, abs=1e-6)
    assert scores(folder)[5, "fuzzing"]["score"] == 1
    assert made().write_prompts(out) == 0
    with pytest.raises(InvalidInput, match="'fake-1' is a name; to ask a model give an Endpoint or a Local"):
        made().run()


def test_wrong_answer_files(folder, tmp_path) -> None:
    made = plan(folder, [DETECTOR], "fake-1")
    out, back = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    made.write_prompts(out)
    (key,) = (json.loads(line)["custom_id"] for line in out.read_text("utf-8").splitlines())
    good = json.dumps({"id": key, "text": "Jedi"})
    for lines, message in (
        (["{"], "line 1: not JSON"),
        ([good, "[1]"], "line 2: expected"),
        ([good, good], f"line 2: a second answer to {key}"),
        (
            [good, '{"id": "abc", "text": "x"}'],
            "nobody asked abc; were the prompts written for other features",
        ),
        ([json.dumps({"id": key, "texts": "x"})], 'line 1: neither a "text" nor'),
    ):
        back.write_text("\n".join(lines), "utf-8")
        with pytest.raises(InvalidInput, match=message):
            made.read_answers(back)
    assert len(made.journal) == 0  # nothing of them was taken
    back.write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="cannot be read as UTF-8"):
        made.read_answers(back)
    back.write_text(
        json.dumps({"custom_id": key, "response": {"status_code": 400, "body": {"error": "too long"}}})
    )
    assert "too long" in made.read_answers(back).unexplained[DETECTOR]


def test_expected_values_come_from_chances_where_there_are_any(folder) -> None:
    """A judge that writes 0 everywhere, but gives the right number half of the chances: as numbers undefined, as means right."""

    def answer(body: dict, number: int) -> dict:
        text = body["messages"][0]["content"]
        if not text.startswith(SIMULATE):
            return completion(oracle(text))
        tokens = []
        for line in oracle(text).split("\n"):
            token, right = line.split("\t")
            tokens += [
                (f"{token}\t", {}),
                ("0", {"0": 0.5, right: 0.5} if right != "0" else {"0": 1.0}),
                ("\n", {}),
            ]
        blank = "".join(token for token, _ in tokens).removesuffix("\n")
        return completion(blank, tokens)

    with serving(answer) as served:
        client = Endpoint("fake-1", served.url)
        explain(folder, [DETECTOR], client, score=["simulation"], say=lambda _: None)
    assert scores(folder)[DETECTOR, "simulation"]["score"] == pytest.approx(1, abs=1e-6)


def test_a_judges_chances_give_an_auc(folder) -> None:
    """Verdicts that are all 1, with chances that are right: balanced accuracy ½, AUC 1."""

    def answer(body: dict, number: int) -> dict:
        text = body["messages"][0]["content"]
        if not text.startswith(DETECT):
            return completion(oracle(text))
        right = json.loads(oracle(text))
        tokens = [("[", {})]
        for i, n in enumerate(right):
            tokens += [(", " if i else "", {}), ("1", {"1": 0.9, "0": 0.1} if n else {"1": 0.6, "0": 0.4})]
        return completion("".join(t for t, _ in tokens) + "]", [*tokens, ("]", {})])

    with serving(answer) as served:
        explain(folder, [DETECTOR], Endpoint("fake-1", served.url), say=lambda _: None)
    found = scores(folder)
    assert found[DETECTOR, "detection"]["score"] == 0.5
    assert found[DETECTOR, "detection_auc"]["score"] == 1
    assert found[DETECTOR, "detection_f1"]["score"] == pytest.approx(2 / 3)


def test_through_a_catalog_object(folder) -> None:
    catalog = Catalog.open(folder)
    explain(catalog, [DETECTOR], Fake(), say=lambda _: None, journal=folder / "mine.jsonl")
    assert (folder / "mine.jsonl").exists()
    assert read_table(folder, "explanations").num_rows == 1


def test_the_strongest_features(folder) -> None:
    table = read_table(folder, "features").to_pylist()
    total = {row["feature"]: row["count"] * row["mean_activation"] for row in table}
    found = strongest(folder, 3)
    assert found == sorted(total, key=lambda s: -total[s])[:3]
    assert SILENT not in strongest(folder, 100)


def test_wrong_calls(folder) -> None:
    for options, message in (
        (
            {"score": ["detections"]},
            "'detections' is not one of simulation, detection, fuzzing. Did you mean detection?",
        ),
        ({"batch": 0}, "start at 1, got 10, 10 and 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            plan(folder, [0], "m", **options)
    with pytest.raises(InvalidInput, match="no feature given"):
        plan(folder, [], "m")
    with pytest.raises(UnknownFeature, match="feature 8"):
        plan(folder, [8], "m")


def test_a_client_that_answers_nothing_ends_the_work(folder) -> None:
    class Mute:
        model = "mute"

        def ask(self, prompts, keep) -> None:
            pass

    with pytest.raises(InvalidInput, match="mute gave none of 1 answers"):
        explain(folder, [DETECTOR], Mute(), say=lambda _: None)
