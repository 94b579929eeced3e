"""Answers that were given elsewhere, read from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.catalog.explain.answers import Answer, Journal, Prompt, clean
from saekit.catalog.explain.endpoint import read_completion
from saekit.errors import InvalidInput, first_line
from saekit.files import existing


def read_answers(path: Path, asked: Mapping[str, Prompt], journal: Journal) -> dict[str, Answer]:
    """Id → answer of a file whose lines are `{"id": …, "text": …}`, or the output of a batch endpoint.

    asked: the prompts that can be answered. Answers that the journal holds already are passed over. Raises `InvalidInput`
    naming a line that is neither, an id that comes twice, and ids that nobody asked.
    """
    try:
        lines = existing(path, "answers").read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InvalidInput(f"answers {path}: cannot be read as UTF-8 ({first_line(error)})") from error
    found: dict[str, Answer] = {}
    unknown: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"answers {path}, line {number}: not JSON ({first_line(error)})") from error
        key = value.get("custom_id", value.get("id")) if isinstance(value, dict) else None
        if not isinstance(key, str):
            raise InvalidInput(
                f'answers {path}, line {number}: expected {{"id": …, "text": …}} or a batch answer'
            )
        if key in found:
            raise InvalidInput(f"answers {path}, line {number}: a second answer to {key}")
        if key in asked:
            found[key] = _answer(value, asked[key], f"answers {path}, line {number}")
        elif not journal.known(key):
            unknown.append(key)
    if unknown:
        named = ", ".join(clean(key)[:40] for key in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise InvalidInput(
            f"answers {path}: nobody asked {named}{more}; were the prompts written for other features, another model, or "
            "with other options?"
        )
    return {key: answer for key, answer in found.items() if journal.get(asked[key]) is None}


def _answer(value: dict[str, Any], prompt: Prompt, where: str) -> Answer:
    if isinstance(text := value.get("text"), str):
        return Answer(clean(text)) if text.strip() else Answer("", error="an empty answer")
    response = value.get("response")
    if isinstance(response, dict) and response.get("status_code", 200) == 200:
        answer = read_completion(response.get("body"), prompt)
        if answer is not None:
            return answer
    if isinstance(response, dict) or value.get("error"):
        return Answer("", error=clean(json.dumps(value.get("error") or response))[:200])
    raise InvalidInput(f'{where}: neither a "text" nor a batch endpoint\'s "response"')
