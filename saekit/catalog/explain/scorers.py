"""Explanations tried by a judge who knows nothing but their text, on documents that they were not made from.

    simulation   Bills et al. 2023: the judge gives each token 0–10 (the mean over the chances of each number where they are
                 known); Pearson r with the activations over the tokens of top and random windows, one to one
    detection    the judge says in which windows the feature fires: windows from the whole active range, one to one with
                 windows in which it is known to be silent
    fuzzing      the judge says whether the marked tokens are those it fires on: they are in the first, and in the second
                 as many others are marked

detection and fuzzing give balanced accuracy (TPR + TNR)/2, `…_f1` F1, `…_auc` AUC where the judge's chances are known. An
answer that cannot be read counts all its windows as failures; it is never dropped unseen, and never taken for a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from saekit.catalog.accumulate import rank_in_group
from saekit.catalog.draws import draw, explains
from saekit.catalog.explain.answers import LARGEST, Answer, Prompt
from saekit.catalog.explain.excerpts import Excerpts, Windows
from saekit.catalog.explain.measures import auc, balanced_accuracy, f1, pearson
from saekit.catalog.explain.prompts import (
    DETECT,
    FUZZ,
    SIMULATE,
    fingerprint,
    read_judgement,
    read_simulation,
    to_judge,
    to_simulate,
)
from saekit.catalog.explain.rules import held_out_windows, join
from saekit.catalog.tables import TOP

ORDER, MARKS = 0x0D, 0x3A  # draws: in which order windows are judged, which tokens are marked wrongly
ROOM = 512  # tokens of an answer beyond what it needs: some models think aloud
TOKENS_PER_LINE = 12


class Settings(NamedTuple):
    held_out: int  # windows on which the feature fires, and as many others
    batch: int  # windows judged by one answer


class Question(NamedTuple):
    """A prompt, and what would be right."""

    prompt: Prompt
    windows: int  # that it asks about
    true: NDArray[np.float32]  # activations of the window's tokens, or 1 and 0 for each window


class Figure(NamedTuple):
    """One score of one explanation."""

    scorer: str
    score: float  # NaN: undefined
    n: int  # windows scored
    failures: int  # windows without a readable answer


# excerpts, feature, explanation, judge, settings → questions
Asking = Callable[[Excerpts, int, str, str, Settings], list[Question]]
# questions, their answers → figures
Scoring = Callable[[Sequence[Question], Sequence[Answer]], list[Figure]]


class Scorer(NamedTuple):
    instructions: str
    questions: Asking
    score: Scoring

    def prompt_hash(self, settings: Settings) -> str:
        return fingerprint(self.instructions, *settings)


def _simulations(
    excerpts: Excerpts, feature: int, text: str, judge: str, settings: Settings
) -> list[Question]:
    windows = held_out_windows(excerpts, feature, feature + 1, settings.held_out)
    questions = []
    for i, length in enumerate(windows.length.tolist()):
        material = to_simulate(text, excerpts.words(windows, i))
        prompt = Prompt(judge, SIMULATE, material, TOKENS_PER_LINE * length + ROOM, chances=True)
        questions.append(Question(prompt, 1, windows.activations[i, :length]))
    return questions


def _simulation(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Figure]:
    said: list[float] = []
    true: list[float] = []
    failures = 0
    for question, answer in zip(questions, answers, strict=True):
        numbers = read_simulation(answer.text, len(question.true))
        if numbers is None:
            failures += 1
            continue
        true += question.true.tolist()
        for at, number in numbers:
            chances = answer.chances(at, LARGEST)
            said.append(number if chances is None else sum(n * p for n, p in enumerate(chances)))
    r = pearson(np.zeros(len(said), np.int64), np.array(said), np.array(true), 1)[0]
    return [Figure("simulation", float(r), len(questions) - failures, failures)]


def held_out_pairs(excerpts: Excerpts, feature: int, n: int) -> tuple[Windows, Windows]:
    """(windows in which the feature fires, windows in which it is silent), as many of each, up to n.

    The first are spread over its strongest contexts and the bands of its active range, one of each document, all of
    documents that do not explain; the others are drawn.
    """
    contexts = excerpts.contexts(feature, feature + 1)
    contexts = contexts.take(~explains(contexts.document))
    last = contexts.band.max(initial=0) + 1
    contexts = contexts.take(
        np.lexsort((np.where(contexts.band == TOP, -1, last - contexts.band), rank_in_group(contexts.band)))
    )
    _, once = np.unique(contexts.document, return_index=True)
    firing = contexts.take(np.sort(once)[:n])
    silent = excerpts.random(feature, feature + 1, np.array([len(firing.feature)]), firing, silent=True)
    return firing.take(np.arange(len(silent.feature))), silent


def _detections(
    excerpts: Excerpts, feature: int, text: str, judge: str, settings: Settings
) -> list[Question]:
    windows, fires = _shuffled(excerpts, feature, settings)
    texts = ["".join(excerpts.words(windows, i)) for i in range(len(fires))]
    return _judged(DETECT, text, judge, texts, fires, settings)


def _fuzzes(excerpts: Excerpts, feature: int, text: str, judge: str, settings: Settings) -> list[Question]:
    windows, fires = _shuffled(excerpts, feature, settings)
    marked = windows.activations > 0
    typical = int(np.median(marked[fires].sum(axis=1))) if fires.any() else 0
    texts = []
    for i, length in enumerate(windows.length.tolist()):
        marks = set(np.flatnonzero(marked[i]).tolist())
        if not fires[i]:
            order = np.argsort(draw(MARKS, feature, windows.start[i], np.arange(length)))
            marks = set(order[: max(1, typical)].tolist())
        words = excerpts.words(windows, i)
        texts.append("".join(f"<<{w}>>" if at in marks else w for at, w in enumerate(words)))
    return _judged(FUZZ, text, judge, texts, fires, settings)


def _shuffled(excerpts: Excerpts, feature: int, settings: Settings) -> tuple[Windows, NDArray[np.bool_]]:
    firing, silent = held_out_pairs(excerpts, feature, settings.held_out)
    windows = join(firing, silent)
    order = np.argsort(draw(ORDER, feature, windows.start))
    return windows.take(order), order < len(firing.feature)


def _judged(
    instructions: str,
    explanation: str,
    judge: str,
    texts: list[str],
    fires: NDArray[np.bool_],
    settings: Settings,
) -> list[Question]:
    questions = []
    for start in range(0, len(texts), settings.batch):
        part = slice(start, start + settings.batch)
        prompt = Prompt(judge, instructions, to_judge(explanation, texts[part]), ROOM, chances=True)
        questions.append(Question(prompt, len(texts[part]), fires[part].astype(np.float32)))
    return questions


def _judgement(name: str) -> Scoring:
    def score(questions: Sequence[Question], answers: Sequence[Answer]) -> list[Figure]:
        said: list[bool] = []
        chances: list[float | None] = []
        true: list[bool] = []
        failures = 0
        for question, answer in zip(questions, answers, strict=True):
            verdicts = read_judgement(answer.text, question.windows)
            if verdicts is None:
                failures += question.windows
                continue
            true += (question.true > 0).tolist()
            said += [verdict for _, verdict in verdicts]
            likely = (answer.chances(at, 1) for at, _ in verdicts)
            chances += [None if p is None else p[1] for p in likely]
        n = len(said)
        are, labels = np.array(said, bool), np.array(true, bool)
        figures = [Figure(name, balanced_accuracy(are, labels) if n else float("nan"), n, failures)]
        figures.append(Figure(f"{name}_f1", f1(are, labels) if n else float("nan"), n, failures))
        known = [p for p in chances if p is not None]
        if n and len(known) == n:
            area = auc(np.zeros(n, np.int64), np.array(known), labels, 1)[0]
            figures.append(Figure(f"{name}_auc", float(area), n, failures))
        return figures

    return score


SCORERS = {
    "simulation": Scorer(SIMULATE, _simulations, _simulation),
    "detection": Scorer(DETECT, _detections, _judgement("detection")),
    "fuzzing": Scorer(FUZZ, _fuzzes, _judgement("fuzzing")),
}
