from __future__ import annotations

import pytest
import torch
from catalog.explain.worlds import DETECTOR
from conftest import SHARED

from saekit import embedded
from saekit.catalog.explain import Local, plan
from saekit.catalog.explain.answers import Answer, Prompt
from saekit.errors import FileMissing, InvalidInput


@pytest.fixture(scope="module")
def tiny() -> Local:
    return Local("tiny", dtype="float32", device="cpu")


def given(prompt: Prompt) -> torch.Tensor:
    """[1, T] the prompt in the model's own tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder("model"))
    return torch.tensor([tokenizer(f"{prompt.text}\n\nAnswer:\n")["input_ids"]])


def asked(client: Local, *prompts: Prompt) -> list[Answer]:
    kept: list[Answer] = []
    client.ask(prompts, lambda _, answer: kept.append(answer))
    return kept


def test_it_answers_greedily(tiny, model) -> None:
    prompt = Prompt("tiny", "Mike pulls out his", "and", 5)
    (answer,) = asked(tiny, prompt)
    ids = given(prompt)
    begin = ids.shape[1]
    for _ in range(5):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert answer.text == model.tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
    assert answer.places is None


def test_it_gives_the_chances_of_numbers(tiny, model) -> None:
    prompt = Prompt("tiny", "one 1\ntwo 2\nthree 3\nfour 4\nfive 5", "one 1\ntwo 2\nthree", 3, chances=True)
    (answer,) = asked(tiny, prompt)
    ids = given(prompt)
    p = model(ids).detach()[0, -1].float().softmax(-1)
    spelled = {i: model.tokenizer.decode([i]).strip() for i in range(model.cfg.d_vocab)}
    assert answer.places is not None
    first = answer.places[0]
    assert first.start == 0
    for n in range(11):
        expected = sum(float(p[i]) for i, text in spelled.items() if text == str(n))
        assert first.chances.get(n, 0.0) == pytest.approx(expected, abs=2e-5)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(tiny) -> None:
    before = tiny.cut
    short, long = Prompt("tiny", "the end of it", "now", 3), Prompt("tiny", "word " * 400, "now", 3)
    asked(tiny, short)
    assert tiny.cut == before
    asked(tiny, long)
    assert tiny.cut == before + 1


def test_the_whole_path_on_a_model_that_knows_nothing(tiny, folder) -> None:
    made = plan(folder, [DETECTOR, 4], tiny, score=["detection"], examples=1, held_out=1, batch=1)
    known = made._explainer(DETECTOR)
    assert known is not None
    made.journal.keep(known, Answer("Jedi"))  # so that there is something to judge
    done = made.run()
    assert done.cut > 0
    assert "cut to fit" in str(done)
    assert len(done.explanations) + len(done.unexplained) == 2
    assert DETECTOR in {row["feature"] for row in done.scores}
    for row in done.scores:
        assert row["n"] + row["failures"] == 2
        assert row["judge"] == "tiny"
        assert row["score"] is None or 0 <= row["score"] <= 1


def test_a_model_is_called_by_its_name_and_not_its_place() -> None:
    if not (SHARED / "models" / "stories260k").is_dir():
        pytest.skip("../shared/models/stories260k is missing: it is not part of the repository")
    client = Local(SHARED / "models" / "stories260k", dtype="float32", device="cpu")
    assert client.model == "stories260k"
    (answer,) = asked(client, Prompt("stories260k", "Once upon a time", "there", 4))
    assert answer.text


def test_what_is_no_model(tmp_path) -> None:
    with pytest.raises(FileMissing, match="does not exist"):
        Local(tmp_path / "none")
    with pytest.raises(InvalidInput, match="dtype: 'int8' is not one of"):
        Local("tiny", dtype="int8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match="could not be loaded"):
        asked(Local(tmp_path), Prompt("m", "a", "b", 1))
