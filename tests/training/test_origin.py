"""What a run was made from: told in its checkpoints, and a resume with anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SITE, sentences

from saekit import text
from saekit.errors import FileMissing, InvalidInput
from saekit.files import read_json
from saekit.recipe import Recipe, parse_recipe
from saekit.text import fingerprint
from saekit.training import origin as origin_module
from saekit.training.origin import origin
from saekit.training.run import train


def recipe(source: Path, **changes) -> Recipe:
    made = parse_recipe(
        {
            "name": "run", "model": "tiny", "dtype": "float32", "site": SITE, "report": False,
            "sae": {"architecture": "topk", "d_sae": 48, "k": 6},
            "data": {"text": str(source), "context_size": 32, "held_out_text": str(source.with_name("held.json"))},
            "training": {"tokens": 300, "batch_size": 100, "ring": 400, "contexts": 4} | changes,
        }
    )  # fmt: skip
    assert isinstance(made, Recipe)
    return made


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "text.json").write_text(json.dumps(sentences(30)))
    (tmp_path / "held.json").write_text(json.dumps(sentences(3, seed=9)))
    return tmp_path / "text.json"


def test_a_fingerprint_is_of_names_and_content(source, tmp_path) -> None:
    first = fingerprint(str(source))
    assert fingerprint(str(source)) == fingerprint([str(source)]) == first
    assert fingerprint([str(source), str(tmp_path / "held.json")]) not in (first, fingerprint(str(tmp_path)))
    source.write_bytes(source.read_bytes().replace(b"number 3", b"number 4", 1))  # of the same size
    assert fingerprint(str(source)) != first
    assert fingerprint("tiny") == fingerprint("tiny") != first
    with pytest.raises(FileMissing, match=r"nowhere\.json does not exist"):
        fingerprint("nowhere.json")


def test_of_a_large_file_both_ends_and_the_size_count(source, monkeypatch) -> None:
    monkeypatch.setattr(text, "WHOLE", 100)
    monkeypatch.setattr(text, "END", 40)
    content = source.read_bytes()
    whole = fingerprint(str(source))
    for changed, same in (
        (b"x" + content[1:], False),
        (content[:-1] + b"x", False),
        (content + b"x", False),
        (content[:500] + b"x" + content[501:], True),  # what the docstring says goes unseen
    ):
        source.write_bytes(changed)
        assert (fingerprint(str(source)) == whole) is same


def test_a_hub_dataset_is_known_by_its_commit(monkeypatch) -> None:
    assert (
        fingerprint("some/dataset") == fingerprint("some/dataset") != fingerprint("other/dataset")
    )  # offline
    commits = iter("aab")
    monkeypatch.setattr(text, "_commit", lambda name: next(commits))
    assert fingerprint("some/dataset") == fingerprint("some/dataset") != fingerprint("some/dataset")


def test_a_checkpoint_tells_what_it_was_made_from(source, model, tmp_path) -> None:
    run = train(recipe(source), model=model, runs=tmp_path)
    state = read_json(run.path / "step-3" / "state.json")
    assert state["origin"] == origin(recipe(source), model)
    assert set(state["origin"]) == {
        "model",
        "tokenizer",
        "text",
        "held_out_text",
        "saekit",
        "torch",
        "transformer_lens",
    }
    assert parse_recipe(state["recipe"]) == recipe(source)


def test_a_resume_with_another_text_model_or_library_is_refused(source, model, tmp_path, monkeypatch) -> None:
    train(recipe(source), model=model, runs=tmp_path)
    longer = recipe(source, tokens=500)

    def refused(match: str) -> None:
        with pytest.raises(InvalidInput, match=rf"step-3 cannot be resumed exactly: {match}"):
            train(longer, model=model, runs=tmp_path, resume=True)

    content = source.read_bytes()
    source.write_bytes(content.replace(b"number 3", b"number 4", 1))
    refused("text was [0-9a-f]{12}…, is [0-9a-f]{12}…: put the text back")
    source.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(origin_module, "version", lambda name: "0.0.1")
        refused("saekit was .* is 0.0.1.*; torch was .*; transformer_lens was")
    weight = model.original_model.transformer.h[2].mlp.c_fc.bias
    before = weight[0].item()
    try:
        weight.data[0] += 1
        refused("model was .*: load the model it was started with")
    finally:
        weight.data[0] = before
    assert train(longer, model=model, runs=tmp_path, resume=True).path == tmp_path / "run"
