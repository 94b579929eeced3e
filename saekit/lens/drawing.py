"""Texts that matplotlib can draw."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from saekit.lens.tokens import visible

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font


def drawable(text: str) -> str:
    """A text for a label or a title: harmless, in one line, no mathematics in it, and letters that the chosen fonts lack as
    escapes (matplotlib would warn of each, and draw a box)."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    family = tuple(FontProperties().get_family())
    fonts = _fonts(family) or (get_font(findfont("DejaVu Sans")),)
    shown = visible(text).replace("\n", "↵")
    return "".join(
        c if any(font.get_char_index(ord(c)) for font in fonts) else c.encode("unicode_escape").decode()
        for c in shown
    ).replace("$", r"\$")


def drawable_token(token: str) -> str:
    """A token for a label: quoted, so that its spaces show."""
    return drawable(repr(visible(token)))


@cache
def _fonts(family: tuple[str, ...]) -> tuple[FT2Font, ...]:
    """The fonts that a text of this family is drawn with, in the order in which they are asked for a letter."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found = []
    for name in family:
        try:
            found.append(get_font(findfont(FontProperties(family=[name]), fallback_to_default=False)))
        except ValueError:  # there is no such font here
            continue
    return tuple(found)
