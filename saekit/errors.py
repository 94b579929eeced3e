"""The error tree. Every error raised on purpose is a `SaekitError` and the built-in a caller expects.

    SaekitError
    ├── InvalidInput   (ValueError)         a value, field, tensor or file content is wrong
    ├── FileMissing    (FileNotFoundError)  a path or a published artefact is not there
    ├── UnknownName    (KeyError)           a site, feature, release or key nobody knows
    │   └── UnknownFeature (also IndexError)
    └── Interrupted    (RuntimeError)       a signal ended the work; its state is saved

A message says what was given, what was expected and what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaekitError(Exception):
    """Root of every error that saekit raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the repr, OSError would look for an errno
        return str(self.args[0]) if self.args else ""


class InvalidInput(SaekitError, ValueError):
    """A value, a field, a tensor or a file's content is not what it has to be."""


class FileMissing(SaekitError, FileNotFoundError):
    """A path, or a published artefact, is not there."""


class UnknownName(SaekitError, KeyError):
    """A name that is not among the known ones; the message lists near names."""


class UnknownFeature(UnknownName, IndexError):
    """A feature index outside 0 … d_sae − 1."""


class Interrupted(SaekitError, RuntimeError):
    """SIGINT or SIGTERM ended a run after its state was saved."""


def near(name: str, known: Iterable[str], n: int = 5) -> str:
    """`"Did you mean a, b or c?"`, or an empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    if not close:
        return ""
    head, last = close[:-1], close[-1]
    return f"Did you mean {', '.join(head)} or {last}?" if head else f"Did you mean {last}?"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of bounded length."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
