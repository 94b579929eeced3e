from __future__ import annotations

import json
import math

import pytest
import torch

from saekit.cli import main
from saekit.errors import InvalidInput
from saekit.experiments import run_additions
from saekit.recipe import AdditionsRecipe, parse_recipe
from saekit.steering.additions import Additions, Effect, activation_additions, sentences
from saekit.steering.directions import Prefix
from saekit.steering.steer import steer

TOPIC = "The king sees a river near the stone. Short one. The old ship leaves the garden at night!\nA dog finds the letter of the king."
OTHER = "The window keeps a lamp near the horse. Every tree follows the river to the sea."
SITE = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def found(model) -> Additions:
    return activation_additions(
        model,
        TOPIC,
        OTHER,
        positive=" king",
        negative=" ",
        sites=[SITE, "blocks.4.hook_resid_pre"],
        coefficients=[0.0, 2.0],
    )


def test_sentences_are_whole_and_long_enough(model) -> None:
    texts = [model.tokenizer.decode(ids[1:]) for ids in sentences(model, TOPIC)]
    assert texts == [
        "The king sees a river near the stone.", "The old ship leaves the garden at night!", "A dog finds the letter of the king.",
    ]  # fmt: skip


def test_ratios_are_the_definition_sentence_by_sentence(model, found) -> None:
    def mean_log_p(ids, start=1):
        with torch.no_grad():
            log_p = model(ids[None])[0].float().log_softmax(-1)
        return sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids))) / (len(ids) - start)

    rows = sentences(model, TOPIC)
    plain = [mean_log_p(ids) for ids in rows]
    with steer(model, Prefix.from_contrast(model, " king", " ", site=SITE).add(2.0)):
        steered = [mean_log_p(ids) for ids in rows]
    wanted = math.exp(-sum(s - p for s, p in zip(steered, plain, strict=True)) / len(rows))
    assert found.rows[1].topic == pytest.approx(wanted, rel=1e-4)
    word = model.to_tokens(" king", prepend_bos=False)[0]
    after = [mean_log_p(torch.cat([ids[:1], word, ids[1:]]), 1 + len(word)) for ids in rows]
    wanted = math.exp(-sum(s - p for s, p in zip(after, plain, strict=True)) / len(rows))
    assert found.prompted_topic == pytest.approx(wanted, rel=1e-4)
    assert (found.topic_sentences, found.other_sentences) == (3, 2)


def test_nothing_added_is_ratio_one(found) -> None:
    for row in found.rows:
        assert (row.coefficient == 0) == (row.topic == 1.0 == row.other)


def test_the_best_row_spares_the_other_text() -> None:
    rows = (
        Effect("a", 1, 0.9, 1.2),
        Effect("a", 2, 0.95, 1.0),
        Effect("b", 1, 0.97, 0.9),
        Effect("b", 2, 1.1, 0.9),
    )
    told = Additions("m", "x", " ", 3, 3, rows, 1.0, 1.0)
    assert told.best() is rows[1]
    assert "best with the other text spared: a, c = 2" in str(told)
    none = Additions("m", "x", " ", 3, 3, rows[3:], 1.0, 1.0)
    assert none.best() is None
    assert "nothing helps" in str(none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topic": "Too short."}, "topic: no sentence of 5 tokens"),
        ({"coefficients": []}, "at least one number"),
    ],
)
def test_wrong_calls(model, change, message) -> None:
    given = {"topic": TOPIC, "other": OTHER, "sites": [SITE], "coefficients": [1.0]} | change
    with pytest.raises(InvalidInput, match=message):
        activation_additions(model, **given)


def recipe(tmp_path, **changes):
    (tmp_path / "topic.txt").write_text(TOPIC)
    (tmp_path / "other.txt").write_text(OTHER)
    section = {
        "topic": str(tmp_path / "topic.txt"),
        "other": str(tmp_path / "other.txt"),
        "positive": " king",
    }
    section |= {"sites": [SITE], "coefficients": [1.0]}
    return {"name": "added", "model": "tiny", "dtype": "float32", "activation_additions": section | changes}


def test_a_recipe_leaves_its_figures_and_a_picture(tmp_path) -> None:
    made = parse_recipe(recipe(tmp_path))
    assert isinstance(made, AdditionsRecipe)
    found, folder = run_additions(made, tmp_path / "runs")
    assert sorted(path.name for path in folder.iterdir()) == [
        "additions.json",
        "additions.png",
        "recipe.yaml",
    ]
    assert json.loads((folder / "additions.json").read_text())["rows"] == found.records()


def test_commands_know_their_recipes(tmp_path, monkeypatch, capsys) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    assert main(["train", "r.yaml"]) == 1
    assert "describes an experiment: use `saekit additions`" in capsys.readouterr().err
    assert main(["train", "r.yaml", "--dry-run"]) == 1
    capsys.readouterr()
    assert main(["additions", "r.yaml", "activation_additions.coefficients=[0]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [
        {"site": SITE, "coefficient": 0.0, "topic": 1.0, "other": 1.0}
    ]
    assert main(["additions", "r.yaml", "activation_additions.topic=missing.txt"]) == 1
    assert "missing.txt" in capsys.readouterr().err
