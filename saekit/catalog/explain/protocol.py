"""Explain, then try the explanation: the whole of it as a plan that says what it costs before anything is asked.

    explaining half of the documents ──▶ explainer ──▶ explanation ──▶ judge ◀── the other half
                                                                         └──▶ scores

Every answer goes into a journal the moment it is there. What a plan has to ask is what the journal lacks: so a plan that
was stopped goes on where it was, and one whose prompts are answered elsewhere is the same plan, with its answers read in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saekit.catalog.accumulate import rank_in_group
from saekit.catalog.draws import explains
from saekit.catalog.explain.answers import Answer, Client, Journal, Prompt
from saekit.catalog.explain.excerpts import Excerpts, check_feature, folder_of
from saekit.catalog.explain.prompts import EXPLAIN, fingerprint, read_explanation, with_activations
from saekit.catalog.explain.rules import defined
from saekit.catalog.explain.saying import Row, merge
from saekit.catalog.explain.scorers import ROOM, SCORERS, Figure, Question, Settings
from saekit.catalog.tables import TOP
from saekit.errors import Interrupted, InvalidInput, near

METHOD = "llm"
CHUNK = 32  # features explained, tried and written down together
GUESS = "a phrase of about a dozen words in the place of an explanation that is not there yet"
GUESSED_ANSWER = 40  # tokens of an explanation or a judgement; a simulation is as long as its question

Progress = Callable[[int, int], None]  # (answers so far, answers in all)


@dataclass(frozen=True)
class Cost:
    """What a plan still has to ask."""

    requests: dict[str, int]  # explanation, and the scorers → requests
    prompt_tokens: int  # estimated
    answer_tokens: int  # estimated
    answered: int  # requests whose answer is in the journal


@dataclass
class Explained:
    """What came of a plan."""

    explanations: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    unexplained: dict[int, str] = field(default_factory=dict)  # feature → why it has no explanation
    missing: list[str] = field(default_factory=list)  # ids of prompts without an answer
    cut: int = 0  # prompts whose beginning did not fit into the model's context

    def __str__(self) -> str:
        parts = [f"{len(self.explanations)} explanations, {len(self.scores)} scores"]
        if failures := sum(row["failures"] for row in self.scores if row["scorer"] in SCORERS):
            parts.append(f"{failures} excerpts without a readable answer")
        if self.cut:
            parts.append(f"{self.cut} prompts cut to fit the model's context")
        if self.missing:
            parts.append(f"{len(self.missing)} prompts without an answer: {_some(self.missing)}")
        if self.unexplained:
            why = [f"{feature} ({reason})" for feature, reason in self.unexplained.items()]
            parts.append(f"no explanation of {_some(why)}")
        return "; ".join(parts)


def plan(
    catalog: Any,
    features: Sequence[int],
    by: Client | str,
    *,
    score: Sequence[str] = ("detection",),
    examples: int = 10,
    held_out: int = 10,
    batch: int = 5,
    control: bool = False,
    journal: str | Path | None = None,
) -> Plan:
    """What it takes to explain features and to score the explanations; printing it says what that costs, `run` does it.

    catalog: a `Catalog` or its folder. by: `Endpoint`, `Local`, or, for answers that come from elsewhere, the name of the
    model that gives them. score: of simulation, detection, fuzzing. examples: top contexts shown to the explainer, of
    documents that explain. held_out: windows per feature on which it is tried, of the other documents, and as many random
    ones. batch: windows that one answer of detection or fuzzing judges. control: ask the judge about another feature's
    explanation too, at twice the cost. journal: the file of answers; by default beside the catalog.

    Raises `UnknownFeature`, and `InvalidInput` for an unknown scorer or a number below 1.
    """
    if unknown := [name for name in score if name not in SCORERS]:
        raise InvalidInput(
            f"score: {unknown[0]!r} is not one of {', '.join(SCORERS)}. {near(unknown[0], SCORERS)}".rstrip()
        )
    if min(examples, held_out, batch) < 1:
        raise InvalidInput(
            f"explain: examples, held_out and batch start at 1, got {examples}, {held_out} and {batch}"
        )
    folder = folder_of(catalog)
    excerpts = Excerpts(folder)
    chosen = [check_feature(feature, excerpts.d_sae) for feature in dict.fromkeys(features)]
    if not chosen:
        raise InvalidInput("explain: no feature given")
    place = Path(journal) if journal is not None else folder.with_name(f"{folder.name}.answers.jsonl")
    return Plan(
        folder, excerpts, chosen, by, tuple(dict.fromkeys(score)), examples, Settings(held_out, batch), control, Journal(place)
    )  # fmt: skip


def explain(
    catalog: Any,
    features: Sequence[int],
    by: Client,
    *,
    say: Callable[[str], object] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Explained:
    """Explain features with a language model and score the explanations; `plan` has the options.

    say: takes the line that states the cost, before anything is asked; by default it goes to stderr.
    """
    made = plan(catalog, features, by, **options)
    (say or _to_stderr)(str(made))
    return made.run(progress)


def strongest(catalog: Any, n: int) -> list[int]:
    """The n features with the largest summed activation."""
    from saekit.catalog.tables import read_table

    table = read_table(folder_of(catalog), "features")
    total = table["count"].to_numpy() * table["mean_activation"].to_numpy().astype(np.float64)
    order = np.argsort(-total, kind="stable")[:n]
    return [int(i) for i in order if total[i] > 0]


class Plan:
    """Features to explain, by whom, and how the explanations are tried."""

    def __init__(
        self,
        folder: Path,
        excerpts: Excerpts,
        features: list[int],
        by: Client | str,
        score: tuple[str, ...],
        examples: int,
        settings: Settings,
        control: bool,
        journal: Journal,
    ) -> None:
        self.folder, self.features, self.journal = folder, features, journal
        self._excerpts, self._by, self._score = excerpts, by, score
        self._examples, self._settings, self._control = examples, settings, control
        self.model = by if isinstance(by, str) else by.model
        self._prompt_hash = fingerprint(EXPLAIN, examples)
        self._refused: dict[str, Answer] = {}  # of this run: another one tries them again

    @cached_property
    def cost(self) -> Cost:
        """What is to be asked, as far as it is known: explanations that are not there yet are guessed to be a dozen words."""
        requests = dict.fromkeys(("explanation", *self._score), 0)
        prompt_tokens = answer_tokens = answered = 0
        met: set[str] = set()
        for chunk in self._chunks():
            for kind, prompt in self._all_prompts(chunk):
                if prompt.id in met:  # two features may have the same random window
                    continue
                met.add(prompt.id)
                if self.journal.get(prompt):
                    answered += 1
                    continue
                requests[kind] += 1
                prompt_tokens += prompt.tokens
                answer_tokens += prompt.tokens if kind == "simulation" else GUESSED_ANSWER
        return Cost(requests, prompt_tokens, answer_tokens, answered)

    def __str__(self) -> str:
        cost = self.cost
        kinds = ", ".join(f"{n:,} of {kind}" for kind, n in cost.requests.items() if n)
        known = f"; {cost.answered:,} more are answered in {self.journal.path}" if cost.answered else ""
        return (
            f"{len(self.features):,} features by {self.model}: {sum(cost.requests.values()):,} requests"
            f"{f' ({kinds})' if kinds else ''}, about {cost.prompt_tokens:,} tokens of prompts and {cost.answer_tokens:,} of "
            f"answers (estimated){known}"
        )

    def run(self, progress: Progress | None = None) -> Explained:
        """Ask what the journal lacks and write explanations and scores, some features at a time.

        Ctrl-C keeps every answer that has come and writes what is whole, then raises `Interrupted`; the same plan goes on.
        """
        if isinstance(self._by, str):
            raise InvalidInput(f"explain: {self._by!r} is a name; to ask a model give an Endpoint or a Local")
        expected, came = sum(self.cost.requests.values()), 0
        done = Explained()

        def keep(prompt: Prompt, answer: Answer) -> None:
            nonlocal came
            self.journal.keep(prompt, answer)
            if answer.error:
                self._refused[prompt.id] = answer
            came += 1
            if progress:
                progress(came, max(came, expected))

        for chunk in self._chunks():
            try:
                while prompts := list(self._outstanding(chunk)):
                    self._by.ask(prompts, keep)
                    if not any(self._answer(prompt) for prompt in prompts):
                        raise InvalidInput(f"explain: {self.model} gave none of {len(prompts)} answers")
            except KeyboardInterrupt:
                self._write(chunk, done)
                raise Interrupted(
                    f"explain: stopped after {came} answers, which are kept in {self.journal.path}; the same call goes on"
                ) from None
            self._write(chunk, done)
        done.cut = getattr(self._by, "cut", 0)
        return done

    def write_prompts(self, path: str | Path) -> int:
        """Write the prompts that can be asked now as JSON lines; returns how many.

        The lines are requests as batch endpoints take them (`custom_id`, `method`, `url`, `body`). Scores are asked about
        explanations: so once the answers of a first file are read in, a second file holds the judge's prompts.
        """
        n = 0
        path = Path(path)
        try:
            with path.open("w", encoding="utf-8") as file:
                for prompt in (p for chunk in self._chunks() for p in self._outstanding(chunk)):
                    line = {
                        "custom_id": prompt.id,
                        "method": "POST",
                        "url": "/v1/chat/completions",
                        "body": prompt.body(),
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    n += 1
        except OSError as error:
            raise InvalidInput(f"prompts {path}: cannot be written ({error})") from error
        return n

    def read_answers(self, path: str | Path) -> Explained:
        """Read answers as JSON lines, `{"id": …, "text": …}` or what batch endpoints give, and write what is whole.

        What is not there yet is named in `missing`. Raises `InvalidInput` naming lines that are none and ids that were not
        asked; nothing of such a file is taken.
        """
        from saekit.catalog.explain.lines import read_answers

        asked = {p.id: p for chunk in self._chunks() for _, p in self._asked(chunk)}
        for key, answer in read_answers(Path(path), asked, self.journal).items():
            if answer.error:
                self._refused[key] = answer
            else:
                self.journal.keep(asked[key], answer)
        done = Explained()
        for chunk in self._chunks():
            self._write(chunk, done)
            done.missing += [p.id for p in self._outstanding(chunk)]
        return done

    # What there is to ask

    def _chunks(self) -> Iterator[list[int]]:
        for part in np.array_split(self.features, -(-len(self.features) // CHUNK)):
            yield part.tolist()

    def _explainer(self, feature: int) -> Prompt | None:
        """The prompt that asks what a feature means; None where no explaining document has a context of it."""
        contexts = self._excerpts.contexts(feature, feature + 1)
        contexts = contexts.take((contexts.band == TOP) & explains(contexts.document))
        contexts = contexts.take(rank_in_group(contexts.feature) < self._examples)
        if not len(contexts.feature):
            return None
        shown = [
            (self._excerpts.words(contexts, i), contexts.activations[i, :length].tolist())
            for i, length in enumerate(contexts.length.tolist())
        ]
        return Prompt(self.model, EXPLAIN, with_activations(shown), ROOM)

    def _explanation(self, prompt: Prompt | None) -> str | None:
        answer = self.journal.get(prompt) if prompt else None
        return read_explanation(answer.text) if answer else None

    def _questions(self, feature: int, scorer: str, text: str) -> list[Question]:
        return SCORERS[scorer].questions(self._excerpts, feature, text, self.model, self._settings)

    def _judged(self, chunk: list[int], texts: dict[int, str]) -> Iterator[tuple[int, str, str | None]]:
        """(feature, its explanation, that of another one: the control) of a chunk."""
        explained = [feature for feature in chunk if feature in texts]
        for i, feature in enumerate(explained):
            other = explained[(i + 1) % len(explained)]
            yield feature, texts[feature], texts[other] if self._control and other != feature else None

    def _asked(self, chunk: list[int]) -> Iterator[tuple[str, Prompt]]:
        """The prompts that can be asked now, answered or not: (kind, prompt)."""
        prompts = {feature: self._explainer(feature) for feature in chunk}
        yield from (("explanation", prompt) for prompt in prompts.values() if prompt)
        if any(p and not self._answer(p) for p in prompts.values()) and self._control:
            return  # whose explanation is another's control is not settled yet
        texts = {f: text for f, p in prompts.items() if (text := self._explanation(p))}
        yield from self._judge_prompts(chunk, texts)

    def _all_prompts(self, chunk: list[int]) -> Iterator[tuple[str, Prompt]]:
        """All prompts of a chunk, with a guess for what is not explained yet."""
        prompts = {feature: prompt for feature in chunk if (prompt := self._explainer(feature))}
        yield from (("explanation", prompt) for prompt in prompts.values())
        texts = {
            f: self._explanation(p) or f"{GUESS} {f}" for f, p in prompts.items() if not self._unreadable(p)
        }
        yield from self._judge_prompts(chunk, texts)

    def _judge_prompts(self, chunk: list[int], texts: dict[int, str]) -> Iterator[tuple[str, Prompt]]:
        for feature, text, other in self._judged(chunk, texts):
            for scorer in self._score:
                for said in (text, other):
                    if said is not None:
                        yield from ((scorer, q.prompt) for q in self._questions(feature, scorer, said))

    def _outstanding(self, chunk: list[int]) -> Iterator[Prompt]:
        """Each prompt that can be asked now and has neither an answer nor a refusal, once."""
        met: set[str] = set()
        for _, prompt in self._asked(chunk):
            if prompt.id not in met and not self._answer(prompt):
                met.add(prompt.id)
                yield prompt

    def _answer(self, prompt: Prompt) -> Answer | None:
        return self.journal.get(prompt) or self._refused.get(prompt.id)

    def _unreadable(self, prompt: Prompt) -> bool:
        return self.journal.get(prompt) is not None and self._explanation(prompt) is None

    # What came of it

    def _write(self, chunk: list[int], done: Explained) -> None:
        """Write down the explanations of a chunk, and those scores all of whose questions are answered or refused."""
        explanations, scores = [], []
        texts: dict[int, str] = {}
        for feature in chunk:
            prompt = self._explainer(feature)
            if text := self._explanation(prompt):
                texts[feature] = text
                explanations.append(self._row(feature) | {"text": text})
            elif (why := self._why(prompt)) is not None:
                done.unexplained[feature] = why
        for feature, text, other in self._judged(chunk, texts):
            for scorer in self._score:
                figures = self._figures(feature, scorer, text)
                control = self._figures(feature, scorer, other) if other is not None else None
                if figures is not None and (other is None or control is not None):
                    scores += self._score_rows(feature, scorer, figures, control or [])
        if explanations:
            merge(self.folder, explanations, scores)
        done.explanations += explanations
        done.scores += scores

    def _why(self, prompt: Prompt | None) -> str | None:
        """Why a feature has no explanation; None where its prompt is not answered yet."""
        if prompt is None:
            return "no context in the documents that explain"
        answer = self._answer(prompt)
        return None if answer is None else answer.error or "the answer holds no words"

    def _figures(self, feature: int, scorer: str, text: str) -> list[Figure] | None:
        """Scores of a text as this feature's explanation; None while answers are missing."""
        questions = self._questions(feature, scorer, text)
        answers = [self._answer(question.prompt) for question in questions]
        there = [answer for answer in answers if answer is not None]
        return SCORERS[scorer].score(questions, there) if len(there) == len(answers) else None

    def _score_rows(
        self, feature: int, scorer: str, figures: list[Figure], control: list[Figure]
    ) -> list[Row]:
        shuffled = {figure.scorer: figure.score for figure in control}
        return [
            self._row(feature)
            | {
                "scorer": figure.scorer,
                "judge": self.model,
                "judge_prompt": SCORERS[scorer].prompt_hash(self._settings),
                "score": defined(figure.score),
                "control": defined(shuffled.get(figure.scorer, float("nan"))),
                "n": figure.n,
                "failures": figure.failures,
            }
            for figure in figures
        ]

    def _row(self, feature: int) -> Row:
        return {"feature": feature, "method": METHOD, "model": self.model, "prompt": self._prompt_hash}


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _some(names: Sequence[str], n: int = 5) -> str:
    """The first few, and how many more."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
