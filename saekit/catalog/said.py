"""What is said about features: explanations, and how well each predicts the feature that it is about."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

KEY = ("feature", "method", "model", "prompt")  # names an explanation, also in the table of scores
NOTE = "note"  # the method of what a person wrote
CORRELATIONS = ("pearson", "simulation")  # scorers whose chance level is 0 …
HALVES = ("auc", "detection", "fuzzing", "detection_auc", "fuzzing_auc")  # … and ½; that of an F1 is neither
FROM_TABLES = ("tokens", "peak_token", "logits")  # methods that only spell out what those tables say
SAY = "say "  # how the text of a next-token rule begins


@dataclass(frozen=True)
class Score:
    """How well an explanation predicts its feature, by one measure."""

    scorer: str  # pearson, auc, simulation, detection, fuzzing …
    judge: str  # the model that judged; "" where none did
    judge_prompt: str  # hash of what it was asked
    score: float | None  # None: undefined
    control: float | None  # the same of a shuffled explanation; None: there is none
    n: int  # excerpts scored
    failures: int  # excerpts that gave no answer


@dataclass(frozen=True)
class Explanation:
    """What somebody or something says that a feature means."""

    text: str
    method: str  # tokens, next_token, logits, llm, note …
    model: str  # that wrote it, or the person; "" for a rule
    prompt: str  # hash of what it was asked; "" where it was not
    scores: list[Score]
    score: (
        float | None
    )  # on one scale, 0 chance and 1 perfect: the best correlation, else the best 2·score − 1 of AUC and balanced accuracy


class Said:
    """The tables of explanations and scores joined, for S features."""

    def __init__(self, explanations: pa.Table, scores: pa.Table, S: int) -> None:
        self._texts = {name: explanations[name].to_pylist() for name in ("text", "method", "model", "prompt")}
        self._features = explanations["feature"].to_numpy()
        places = {key: i for i, key in enumerate(_keys(explanations))}
        keys = _keys(scores)
        about = np.array([places.get(key, -1) for key in keys], np.int64)
        self._scores = scores
        self._order = np.argsort(about, kind="stable")
        self._sorted = about[self._order]
        self._measure = _measures(scores, about, len(self._features))
        self._best = self._best_of(S)
        told = self._best >= 0
        self.score: NDArray[np.float64] = np.full(
            S, np.nan
        )  # [S] of the explanation that is shown; NaN: none
        self.score[told] = self._measure[self._best[told]]

    def _best_of(self, S: int) -> NDArray[np.int64]:
        """[S] the explanation to show: a person's note, else the best scored, else the first; −1: there is none."""
        n = len(self._features)
        note = np.array([method == NOTE for method in self._texts["method"]], bool)
        score = np.nan_to_num(
            np.round(self._measure, 2), nan=-np.inf
        )  # what differs by less is equal: the first
        order = np.lexsort(
            (-np.arange(n), score, note, self._features)
        )  # the last one of each feature is its best
        best = np.full(S, -1)
        best[self._features[order]] = order
        return best

    def best(self, feature: int) -> str | None:
        at = self._best[feature]
        return None if at < 0 else self._texts["text"][at]

    def of(self, feature: int) -> list[Explanation]:
        """All explanations of a feature, each with its scores, in the order in which they were written."""
        return self.stretch(feature, feature + 1)[0]

    def stretch(self, start: int, end: int) -> list[list[Explanation]]:
        """Those of each of the features start … end − 1."""
        bounds = np.searchsorted(self._features, np.arange(start, end + 1))
        scored = slice(*np.searchsorted(self._sorted, bounds[[0, -1]]).tolist())
        about: dict[int, list[Score]] = defaultdict(list)
        rows = self._scores.select(Score.__dataclass_fields__).take(self._order[scored]).to_pylist()
        for i, row in zip(self._sorted[scored].tolist(), rows, strict=True):
            about[i].append(Score(**row))
        return [
            [self._explanation(i, about[i]) for i in range(first, last)]
            for first, last in pairwise(bounds.tolist())
        ]

    def _explanation(self, i: int, scores: list[Score]) -> Explanation:
        texts, measure = {name: column[i] for name, column in self._texts.items()}, float(self._measure[i])
        return Explanation(**texts, scores=scores, score=None if np.isnan(measure) else measure)

    def methods(self) -> Counter[str]:
        """How many explanations there are by each method."""
        return Counter(self._texts["method"])

    def beyond_tables(self) -> list[tuple[int, str]]:
        """(feature, words) of the explanations that say more than the tables of tokens and logits do."""
        rows = zip(self._features.tolist(), self._texts["method"], self._texts["text"], strict=True)
        return [
            (feature, text.removeprefix(SAY) if method == "next_token" else text)
            for feature, method, text in rows
            if method not in FROM_TABLES
        ]


def _keys(table: pa.Table) -> list[tuple[Any, ...]]:
    """What names the explanation of each row."""
    return list(zip(*(table[name].to_pylist() for name in KEY), strict=True))


def _measures(scores: pa.Table, about: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """[n] the score on which explanations are compared, NaN where there is none."""
    value = scores["score"].to_numpy().astype(np.float64)  # null: NaN
    scorers = scores["scorer"].to_pylist()
    correlation, half = (np.array([s in kind for s in scorers], bool) for kind in (CORRELATIONS, HALVES))
    by_correlation, by_others = np.full(n, np.nan), np.full(n, np.nan)
    for found, here, scale in (
        (by_correlation, correlation, value),
        (by_others, half, 2 * value - 1),
    ):
        here = here & (about >= 0)
        np.fmax.at(found, about[here], scale[here])
    return np.where(np.isnan(by_correlation), by_others, by_correlation)
