"""Small pieces of coloured text for a terminal of any width."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from rich.console import Console, ConsoleRenderable
from rich.table import Table
from rich.text import Text

from saekit.lens.tokens import visible

BLOCKS = " ▁▂▃▄▅▆▇█"
SOFT, STRONG, UP, DOWN = "dim", "bold", "green", "red"


class Shown(Protocol):
    """What shows itself in a terminal."""

    def __rich__(self) -> Any: ...


def line(value: object, style: str = "") -> Text:
    """Any text in one line, harmless."""
    return Text(visible(str(value)).replace("\n", "↵"), style)


def token(text: str, style: str = "") -> Text:
    """A token, quoted so that its spaces show."""
    return Text(repr(visible(text)), style)


def listed(parts: Iterable[Text], between: str = ", ") -> Text:
    return Text(between).join(parts)


def named(rows: Iterable[tuple[str, ConsoleRenderable]]) -> Table:
    """Names at the left, and beside each what is said, which wraps in its own column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=SOFT, no_wrap=True)
    grid.add_column(overflow="fold", ratio=1)
    for name, what in rows:
        grid.add_row(name, what)
    return grid


def spark(counts: Sequence[float]) -> str:
    """Counts as a line of blocks: the highest is the greatest, and whatever is not 0 is seen."""
    most = max(counts, default=0)
    if most <= 0:
        return ""
    return "".join(BLOCKS[0 if n <= 0 else max(1, round(8 * n / most))] for n in counts)


def in_colour(what: Shown) -> str | None:
    """As `print` can show it on this terminal; None where there is no terminal, or one without colours."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=sys.stdout.isatty(), highlight=False)
    if not console.is_terminal or console.color_system is None or console.no_color:
        return None
    console.print(what)
    return shown.getvalue().rstrip("\n")


def pretty(what: Shown, p: Any) -> None:
    """For IPython: coloured where it runs in a terminal that has colours, as `print` has it elsewhere."""
    p.text(in_colour(what) or str(what))
