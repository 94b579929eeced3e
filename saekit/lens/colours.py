"""Tokens on coloured grounds, for a terminal and for a notebook: blue above zero, orange below, white at zero."""

from __future__ import annotations

import html
import io
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from saekit.lens.tokens import visible

if TYPE_CHECKING:
    from rich.text import Text

ABOVE, BELOW = (76, 139, 209), (232, 144, 60)
SILENT = 0.03  # levels nearer to zero get no colour


def ground(level: float) -> tuple[int, int, int] | None:
    """The colour of a level from −1 to 1, or None for none."""
    if not abs(level) >= SILENT:
        return None
    share = min(1.0, abs(level))
    red, green, blue = (round(255 + share * (c - 255)) for c in (ABOVE if level > 0 else BELOW))
    return red, green, blue


def coloured(tokens: Iterable[tuple[str, float]]) -> Text:
    """(token, level) pairs as running text for a terminal."""
    from rich.text import Text

    text = Text(overflow="fold")
    for token, level in tokens:
        colour = ground(level)
        style = "" if colour is None else "black on rgb({},{},{})".format(*colour)
        text.append(visible(token).replace("\n", "↵\n"), style)
    return text


def in_colour(text: Text) -> str | None:
    """The text as `print` can show it on this terminal; None where there is no terminal, or one without colours."""
    from rich.console import Console

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=sys.stdout.isatty(), highlight=False)
    if not console.is_terminal or console.color_system is None or console.no_color:
        return None
    console.print(text, soft_wrap=True)
    return shown.getvalue().rstrip("\n")


def span(token: str, level: float, title: str) -> str:
    """A token as HTML, with its value to be seen under the pointer. Everything is escaped."""
    colour = ground(level)
    style = "" if colour is None else ' style="background:rgb({},{},{});color:#000"'.format(*colour)
    shown = html.escape(visible(token)).replace("\n", "↵\n")
    return f'<span title="{html.escape(title)}"{style}>{shown}</span>'
