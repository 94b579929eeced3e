"""The texts of the prompts view: what fires on each token, from the sample and from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from saekit import embedded
from saekit.catalog import Catalog
from saekit.catalog.firing import PER_TOKEN
from saekit.catalog.page.prompts import GIVEN, LENGTH, SAMPLES, given, sampled
from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@pytest.fixture(scope="module")
def tiny() -> Catalog:
    return Catalog.open(embedded.folder("catalog"))


def test_samples_are_what_the_sample_says(tiny: Catalog) -> None:
    texts = sampled(tiny)
    assert len(texts) == SAMPLES
    assert len({text["text"] for text in texts}) == SAMPLES
    table, corpus = tiny.table("sample").to_pandas(), tiny.table("corpus").to_pandas()
    rows = corpus[corpus["row"].isin(tiny.info["sample"]["rows"])].groupby("row")
    spelled = {row: [tiny.token(i) for i in own["token_id"]] for row, own in rows}
    for text in texts:
        assert text["source"] == "sample"
        assert 8 <= len(text["tokens"]) <= LENGTH
        assert "".join(text["tokens"]) == text["text"]
        assert not set(text["tokens"]) & set(tiny.info["excluded"])
        n = len(text["tokens"])
        at = [
            (row, start)
            for row, own in spelled.items()
            for start in range(len(own) - n + 1)
            if own[start : start + n] == text["tokens"]
        ]
        assert len(at) == 1
        ((row, start),) = at
        own = corpus[(corpus["row"] == row) & corpus["position"].between(start, start + n - 1)]
        assert own["document"].nunique() == 1
        for i, fires in enumerate(text["firing"]):
            known = table[(table["row"] == row) & (table["position"] == start + i)]
            known = known.sort_values(["activation", "feature"], ascending=[False, True]).head(PER_TOKEN)
            assert [feature for feature, _ in fires] == known["feature"].tolist()
            assert [a for _, a in fires] == pytest.approx(known["activation"].tolist(), rel=5e-3)


def test_prompts_are_what_the_model_says(tiny: Catalog, model: TransformerBridge) -> None:
    text = "The Jedi drew his lightsaber"
    (made,) = given(tiny, [text], model)
    found = tiny.firing(text, model)
    assert (made["source"], made["text"]) == ("prompt", text)
    assert "".join(made["tokens"]) == text  # without what the model puts before it
    assert found.tokens[-len(made["tokens"]) :] == made["tokens"]
    for written, row in zip(made["firing"], found.features[-len(made["tokens"]) :], strict=True):
        assert [i for i, _ in written] == [i for i, _ in row]
        assert [a for _, a in written] == pytest.approx([a for _, a in row], rel=5e-3)
    special = next(iter(tiny.info["excluded"]))
    (made,) = given(tiny, [f"one{special}two"], model)
    assert made["firing"][made["tokens"].index(special)] == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("one text", "list of texts"), (["", "x"], "none of them empty"), (["x"] * (GIVEN + 1), "takes 64"), (["x " * 600], "context")],
)  # fmt: skip
def test_wrong_prompts(tiny: Catalog, model: TransformerBridge, prompts: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        given(tiny, prompts, model)


def test_another_model_is_refused(tiny: Catalog, model: TransformerBridge) -> None:
    changed = Catalog(tiny.path)
    changed.info["model"] = changed.info["model"] | {"hash": "0" * 64}
    with pytest.raises(InvalidInput, match="weights"):
        given(changed, ["x"], model)
