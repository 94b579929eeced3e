"""Prompts, the answers to them, and the journal that keeps every answer, so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from saekit.errors import InvalidInput, first_line

LARGEST = 10  # the numbers that prompts ask for are 0 … 10
CHARACTERS_PER_TOKEN = 3  # of lists of tokens and numbers; for estimates


@dataclass(frozen=True)
class Prompt:
    """One question to one model."""

    model: str
    instructions: str  # what every prompt of its kind says
    material: str  # what it is about
    max_tokens: int  # of the answer
    chances: bool = False  # whether the chances of other numbers than the one answered are of use

    @cached_property
    def id(self) -> str:
        """Hash of all that the answer depends on."""
        asked = [self.model, self.instructions, self.material, self.max_tokens, self.chances]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    @property
    def text(self) -> str:
        return f"{self.instructions}\n\n{self.material}"

    def body(self) -> dict[str, Any]:
        """The request in the chat-completions protocol: one message, as some models take no system's."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        return body | ({"logprobs": True, "top_logprobs": 20} if self.chances else {})

    @property
    def tokens(self) -> int:
        """An estimate of its length."""
        return len(self.text) // CHARACTERS_PER_TOKEN + 1


@dataclass(frozen=True)
class Place:
    """Where in an answer a token stands at which a number was likely, and how likely each number was."""

    start: int
    end: int  # characters of the answer's text
    chances: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """What a model said, or why it said nothing."""

    text: str
    places: tuple[Place, ...] | None = None  # None: the model gave no probabilities
    error: str = ""  # why there is no answer: the request was refused

    def chances(self, at: int, most: int) -> list[float] | None:
        """Probability of each number 0 … most where the text has a number at `at`; None where nobody knows."""
        index = next((i for i, p in enumerate(self.places or ()) if p.start <= at < p.end), None)
        if self.places is None or index is None:
            return None
        place = self.places[index]
        found = [place.chances.get(n, 0.0) for n in range(most + 1)]
        if most >= 10 and self.text[place.start : place.end].strip() == "1" and index + 1 < len(self.places):
            after = self.places[index + 1]  # a tokenizer that writes 10 as two tokens
            if after.start == place.end:
                ten = found[1] * after.chances.get(0, 0.0)
                found[1], found[10] = found[1] - ten, found[10] + ten
        total = sum(found)
        return [p / total for p in found] if total > 1e-6 else None


def number(token: str) -> int | None:
    """The number 0 … 10 that a token spells, spaces aside."""
    digits = token.strip()
    return int(digits) if digits in _NUMBERS else None


_NUMBERS = {str(n) for n in range(LARGEST + 1)}


def places(text: str, pieces: Sequence[tuple[int, int, dict[int, float]]]) -> tuple[Place, ...]:
    """Those of an answer's tokens (start, end, chances of numbers) at which a number was likely at all."""
    return tuple(
        Place(start, end, {n: round(p, 6) for n, p in chances.items() if p > 1e-5})
        for start, end, chances in pieces
        if end <= len(text) and sum(chances.values()) > 1e-3
    )


def clean(text: str) -> str:
    """Text that can be stored: JSON may carry half of a surrogate pair, which UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


Keep = Callable[
    [Prompt, Answer], None
]  # takes an answer the moment it is there; may be called from several threads


class Client(Protocol):
    """Somebody who answers prompts."""

    model: str  # the name under which answers are kept and scores are written

    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        """Answer all prompts, in any order. Raises `InvalidInput` where it cannot go on; what was kept stays kept."""


class Journal:
    """Answers in a file of JSON lines, one per answered prompt, written as they come.

    A line that a kill tore is passed over: its prompt is asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._torn = False
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        except OSError as error:
            raise InvalidInput(f"answers {path}: cannot be read ({first_line(error)})") from error
        self._torn = lines[-1] != b""
        for line in lines:
            if (entry := _entry(line)) is not None:
                self._answers[entry[0]] = entry[1]

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, prompt: Prompt) -> Answer | None:
        return self._answers.get(prompt.id)

    def known(self, key: str) -> bool:
        return key in self._answers

    def keep(self, prompt: Prompt, answer: Answer) -> None:
        """Write an answer down; refusals are left out, so that they are tried again another time."""
        if answer.error:
            return
        line: dict[str, Any] = {"id": prompt.id, "text": answer.text}
        if answer.places is not None:
            line["places"] = [[p.start, p.end, p.chances] for p in answer.places]
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                with self.path.open("ab") as file:
                    file.write(b"\n" + data if self._torn else data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InvalidInput(f"answers {self.path}: cannot be written ({first_line(error)})") from error
            self._torn = False
            self._answers[prompt.id] = answer


def _entry(line: bytes) -> tuple[str, Answer] | None:
    """A line of the journal, or None where it is not whole."""
    try:
        value = json.loads(line)
        found = value.get("places")
        known = None if found is None else tuple(
            Place(int(start), int(end), {int(n): float(p) for n, p in chances.items()})
            for start, end, chances in found
        )  # fmt: skip
        return str(value["id"]), Answer(clean(str(value["text"])), known)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
