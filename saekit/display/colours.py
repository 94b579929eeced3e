"""The colours of levels from −1 to 1: blue above zero, orange below, nothing where it is silent; and text in them for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from saekit.lens.tokens import visible

ABOVE, BELOW = (76, 139, 209), (232, 144, 60)
SILENT = 0.03  # levels nearer to zero get no colour
FAINT = 0.25  # levels below get coloured letters and no ground: on a ground that nobody knows any block stands out
GREY = 150  # where grounds begin: seen, and not glaring, on dark and on light


def coloured(tokens: Iterable[tuple[str, float]]) -> Text:
    """(token, level) pairs as running text for a terminal."""
    text = Text(overflow="fold")
    for token, level in tokens:
        text.append(visible(token).replace("\n", "↵\n"), _style(level))
    return text


def _style(level: float) -> str:
    if not abs(level) >= SILENT:  # also what is no number
        return ""
    share, colour = min(1.0, abs(level)), ABOVE if level > 0 else BELOW
    if share < FAINT:
        return _rgb(colour)
    return f"black on {_rgb([round(GREY + share * (c - GREY)) for c in colour])}"


def _rgb(colour: Iterable[int]) -> str:
    return "rgb({},{},{})".format(*colour)
