"""What models are asked, and how their answers are read.

An answer comes from a model that may say anything: a reader gives what was asked for, whole, or None, which counts as a failure.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence

from saekit.catalog.explain.answers import LARGEST

EXPLAIN = """\
A latent of a sparse autoencoder fires on some tokens of a text and is silent on the others. Below are excerpts in which one \
latent fires. Each line is a token, a tab, and how strongly the latent fires on it, from 0 (silent) to 10 (its strongest).

Say what the latent fires on: what the tokens with high numbers, or the words around them, have in common that the others have \
not. Be as specific as the excerpts allow. Answer with that one phrase and nothing else, for example: names of rivers; or: the \
word "of" after a measure; or: verbs right before a place."""

SIMULATE = """\
A latent of a sparse autoencoder fires on some tokens of a text and is silent on the others. You are told what it fires on, and \
given a text as one token per line. Say how strongly it fires on each token, from 0 (silent) to 10 (its strongest); most tokens \
of most texts are 0. It knows only the text up to the token.

Answer with the same lines in the same order, each the token, a tab, and your number in the place of "unknown", and nothing else."""

DETECT = """\
A latent of a sparse autoencoder fires on some tokens of a text and is silent on the others. You are told what it fires on, and \
given numbered texts. For each text say whether the latent fires anywhere in it: 1 if it does, 0 if it does not.

Answer with a list of 1 and 0, one for each text in order, such as [1, 0, 0, 1], and nothing else."""

FUZZ = """\
A latent of a sparse autoencoder fires on some tokens of a text and is silent on the others. You are told what it fires on, and \
given numbered texts in which some tokens are marked, <<like this>>. For each text say whether the marked tokens are those that \
the latent fires on: 1 if they are, 0 if they are not.

Answer with a list of 1 and 0, one for each text in order, such as [1, 0, 0, 1], and nothing else."""

LONGEST_EXPLANATION = 500  # characters


def fingerprint(instructions: str, *settings: object) -> str:
    """The hash that explanations and scores carry: of what every prompt of a kind says, and of the numbers it was made with."""
    return hashlib.sha256(json.dumps([instructions, *settings]).encode()).hexdigest()[:16]


def spelled(token: str) -> str:
    """A token that keeps to its line."""
    return token.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def with_activations(excerpts: Sequence[tuple[Sequence[str], Sequence[float]]]) -> str:
    """Excerpts as lists of token and number, on one scale for all of them."""
    top = max((max(activations, default=0.0) for _, activations in excerpts), default=0.0)
    return "\n\n".join(
        f"Excerpt {i}:\n"
        + "\n".join(
            f"{spelled(token)}\t{min(LARGEST, math.floor(LARGEST * a / top)) if top > 0 else 0}"
            for token, a in zip(tokens, activations, strict=True)
        )
        for i, (tokens, activations) in enumerate(excerpts, 1)
    )


def to_simulate(explanation: str, tokens: Sequence[str]) -> str:
    lines = "\n".join(f"{spelled(token)}\tunknown" for token in tokens)
    return f"It fires on: {explanation}\n\n{lines}"


def to_judge(explanation: str, texts: Sequence[str]) -> str:
    lines = "\n".join(f"{i}. {json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(texts, 1))
    return f"It fires on: {explanation}\n\n{lines}"


def read_explanation(text: str) -> str | None:
    """The first line that says something, without quotes around it; None where there is none."""
    for line in _after_thought(text)[0].splitlines():
        said = " ".join("".join(c if c.isprintable() else " " for c in line).split())
        said = re.sub(r"^[*_# ]*(?:explanation|answer)[*_ ]*:[*_ ]*", "", said, flags=re.IGNORECASE)
        said = said.strip("*` ").removesuffix(".").strip()
        if len(said) > 1 and said[0] == said[-1] and said[0] in "\"'" and said.count(said[0]) == 2:
            said = said[1:-1].strip()
        if any(c.isalnum() for c in said):
            return said[:LONGEST_EXPLANATION]
    return None


def read_simulation(text: str, n: int) -> list[tuple[int, float]] | None:
    """(where in the text, number) for each of n tokens: the lines that end in a tab and a number, if they are n."""
    answer, begin = _after_thought(text)
    found = []
    for line in answer.split("\n"):
        head, tab, tail = line.rpartition("\t")
        value = tail.strip()
        if tab and (len(value) <= 8 and re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", value)):
            if float(value) > LARGEST:
                return None
            found.append((begin + len(head) + 1 + (len(tail) - len(tail.lstrip())), float(value)))
        begin += len(line) + 1
    return found if len(found) == n else None


def read_judgement(text: str, n: int) -> list[tuple[int, bool]] | None:
    """(where in the text, verdict) for each of n texts: the last list of n ones and zeros, or an answer that is only these."""
    answer, begin = _after_thought(text)
    lists = [m for m in re.finditer(r"\[([01,\s]*)\]", answer) if _binary(m[1], n)]
    if lists:
        start, body = begin + lists[-1].start(1), lists[-1][1]
    elif _binary(answer, n):
        start, body = begin, answer
    else:
        return None
    return [(start + i, c == "1") for i, c in enumerate(body) if c in "01"]


def _binary(text: str, n: int) -> bool:
    """Whether it is n ones and zeros with something between them."""
    parts = text.replace(",", " ").split()
    return len(parts) == n and all(part in ("0", "1") for part in parts)


def _after_thought(text: str) -> tuple[str, int]:
    """What follows a model's thinking, and where that begins."""
    begin = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    return text[begin:], begin
