"""Search: what words find, in which order, and what filters and sorts leave."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalog.brute import made

from saekit.catalog import Catalog, Feature
from saekit.catalog.tables import write_table
from saekit.errors import InvalidInput

SAID = [  # feature, method, model, text
    (2, "tokens", "", "Jedi, Master"),  # from the tables: counts once, as tokens
    (2, "next_token", "", "say lightsaber"),
    (3, "llm", "judge", "lightsaber battles at night"),
    (3, "note", "me", "battles"),
    (5, "llm", "judge", 'it\'s "quoted" (rain); DROP TABLE words'),
]
SCORED = [  # feature, method, model, scorer, score
    (2, "tokens", "", "pearson", 0.25),
    (2, "next_token", "", "auc", 0.75),
    (3, "llm", "judge", "simulation", 0.6),
    (3, "llm", "judge", "detection", 0.95),
    (5, "llm", "judge", "simulation", None),
]


def say(folder: Path, said: list[Any], scored: list[Any]) -> None:
    columns = dict(zip(("feature", "method", "model", "text"), zip(*said, strict=True), strict=True))
    write_table(folder, "explanations", {**columns, "prompt": [""] * len(said)})
    names = ("feature", "method", "model", "scorer", "score")
    columns = dict(zip(names, zip(*scored, strict=True), strict=True))
    empty = {name: [""] * len(scored) for name in ("prompt", "judge", "judge_prompt")}
    figures = {"control": [None] * len(scored), "n": [9] * len(scored), "failures": [0] * len(scored)}
    write_table(folder, "scores", {**columns, **empty, **figures})


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = made(tmp_path_factory.mktemp("search") / "made")
    say(folder, SAID, SCORED)
    return Catalog.open(folder)


def relevance(feature: Feature, query: str) -> float:
    """What the docstring of `search` says, word by word."""

    def match(text: str, word: str) -> bool:
        return any(w.startswith(word.lower()) for w in re.findall(r"\w+", text.lower()))

    total = 0.0
    for word in re.findall(r"\w+", query):
        total += sum(t.share for t in feature.top_tokens if match(t.token, word))
        ranks = [i for i, t in enumerate(feature.logits_top) if match(t.token, word)]
        total += 0.25 / (1 + min(ranks)) if ranks else 0
        for e in feature.explanations:
            text = e.text.removeprefix("say ") if e.method == "next_token" else e.text
            total += e.method not in ("tokens", "peak_token", "logits") and match(text, word)
    return total


@pytest.mark.parametrize(
    "query", ["Jedi", "JEDI", "li", "lightsaber night", "king ship of", "battles", "say", "xyzzy"]
)
def test_words_are_ranked_as_the_docstring_says(catalog: Catalog, query: str) -> None:
    found = catalog.search(query, limit=len(catalog))
    expected = {f.index: score for f in catalog if (score := relevance(f, query)) > 0}
    assert {f.index for f in found} == set(expected)
    scores = [expected[f.index] for f in found]
    assert scores == pytest.approx(sorted(scores, reverse=True))
    assert [f.index for f in catalog.search(query, 3)] == [f.index for f in found[:3]]


def test_a_feature_that_fires_on_nothing_else_comes_first(catalog: Catalog) -> None:
    assert catalog.search("Jedi")[0].top_tokens[0].token == " Jedi"
    assert catalog.search("battles")[0].index == 3


@pytest.mark.parametrize("query", ["  ", "!!", '"', "- *"])
def test_a_query_without_a_word(catalog: Catalog, query: str) -> None:
    with pytest.raises(InvalidInput, match="no word"):
        catalog.search(query, min_density=0.01, sort="index")


@pytest.mark.parametrize(
    "query", ["* OR rain", '"rain', "rain'); DROP TABLE words; --", "token:rain NEAR(a b)", "{rain}^2"]
)
def test_queries_are_data(catalog: Catalog, query: str) -> None:
    assert 5 in [f.index for f in catalog.search(query, limit=len(catalog))]
    assert catalog.search("rain")


BOUNDS = {
    "min_density": lambda f, x: f.density >= x,
    "max_density": lambda f, x: f.density <= x,
    "min_max_activation": lambda f, x: f.max_activation >= x,
    "max_max_activation": lambda f, x: f.max_activation <= x,
    "min_score": lambda f, x: f.score is not None and f.score >= x,
}


@pytest.mark.parametrize("query", ["", "night"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_filters_keep_what_they_say(catalog: Catalog, query: str, bound: str) -> None:
    candidates = catalog.search(query, len(catalog)) if query else list(catalog)
    figures = [getattr(f, bound.split("_", 1)[1]) for f in candidates]
    at = 0.3 if bound == "min_score" else float(np.median(figures))
    found = catalog.search(query, len(catalog), **{bound: at})
    kept = [f.index for f in candidates if BOUNDS[bound](f, at)]
    assert [f.index for f in found] == kept
    assert 0 < len(kept) < len(candidates)


def test_bounds_are_included_and_meet(catalog: Catalog) -> None:
    density = catalog[4].density
    assert [f.index for f in catalog.search(min_density=density, max_density=density)] == [
        f.index for f in catalog if f.density == density
    ]
    assert catalog.search(min_density=0.9) == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sort", ["density", "max_activation", "score", "index"])
def test_sorts(catalog: Catalog, sort: str, reverse: bool) -> None:
    found = catalog.search(sort=sort, limit=len(catalog), reverse=reverse)
    assert sorted(f.index for f in found) == list(range(len(catalog)))
    figures = [f.index if sort == "index" else getattr(f, sort) for f in found]
    known = [x for x in figures if x is not None]
    assert known == sorted(known, reverse=reverse == (sort == "index"))
    assert figures[: len(known)] == known  # what has no score is last


def test_a_wrong_call_is_told(catalog: Catalog) -> None:
    with pytest.raises(InvalidInput, match="'loudness' is not one of relevance, density"):
        catalog.search("a", sort="loudness")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="limit starts at 1, got 0"):
        catalog.search("a", limit=0)
    with pytest.raises(InvalidInput, match="give words, a filter, or another sort"):
        catalog.search()


def test_what_was_said_since_is_found(catalog: Catalog, tmp_path: Path) -> None:
    folder = shutil.copytree(catalog.path, tmp_path / "copy")
    opened = Catalog.open(folder)
    assert opened.search("zebra") == []
    assert opened[1].explanation == opened[1].label
    say(folder, [(1, "llm", "judge", "a zebra crossing")], [(1, "llm", "judge", "simulation", 0.5)])
    assert [f.index for f in opened.search("zebra")] == [1]
    assert opened[1].explanation == "a zebra crossing"
    assert [f.index for f in opened.search(min_score=0.1)] == [1]


def test_scores_are_on_one_scale(catalog: Catalog) -> None:
    assert [e.score for e in catalog[2].explanations] == pytest.approx(
        [0.25, 0.5]
    )  # r as it is, AUC as 2·AUC − 1
    [llm, note] = catalog[3].explanations
    assert llm.score == pytest.approx(0.6)  # a correlation goes before any other
    assert {s.scorer: s.score for s in llm.scores} == pytest.approx({"simulation": 0.6, "detection": 0.95})
    assert (note.score, note.scores) == (None, [])
    assert np.isnan(catalog.score[5])
    assert catalog[5].score is None
    assert catalog[5].explanations[0].scores[0].score is None


def test_the_explanation_is_the_note_then_the_best(catalog: Catalog) -> None:
    assert catalog[3].explanation == "battles"
    assert catalog[2].explanation == "say lightsaber"
    assert catalog[5].explanation == SAID[-1][3]
    assert catalog[0].explanation == catalog[0].label != ""
    assert catalog[len(catalog) - 1].explanation is None  # never fired
