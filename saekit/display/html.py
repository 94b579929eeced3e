"""Small HTML: texts made harmless, tables, and one style that suits a dark notebook as well as a light one.

Nothing is fetched and nothing runs. Colours are tints over whatever ground the notebook has, and text is of the notebook's own
colour, so no theme has to be guessed. The style's class is named by what it says: outputs of two versions leave each
other alone.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Sequence

from saekit.display.colours import ABOVE, BELOW, SILENT
from saekit.lens.tokens import visible

_RULES = """
& { font: 13px/1.5 system-ui, sans-serif; color: inherit; max-width: 76rem; padding: 2px 0; }
& * { box-sizing: border-box; }
& .soft, & th, & .axis { opacity: 0.68; font-weight: normal; }
& .say { font-size: 1.3em; font-weight: 600; line-height: 1.3; margin: 1px 0 3px; }
& .facts { display: flex; flex-wrap: wrap; gap: 0 1.4em; }
& .facts b { font-weight: 600; }
& .name { font-weight: 600; margin: 10px 0 2px; }
& .columns { display: flex; flex-wrap: wrap; gap: 0 26px; }
& .columns > * { flex: 1 1 11rem; min-width: 0; }
& .columns > .wide { flex: 3 1 26rem; }
& .columns > .side { flex: 2 1 16rem; }
& .panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 0 20px; margin-bottom: 8px; }
& .run { white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.65 ui-monospace, Menlo, Consolas, monospace; }
& .run b { font-weight: inherit; border-radius: 2px; background: rgb(ABOVE / var(--a)); }
& .run b.below { background: rgb(BELOW / var(--a)); }
& .run b.peak { box-shadow: inset 0 -2px rgb(ABOVE); }
& .context { display: flex; gap: 10px; padding: 3px 0; border-top: 1px solid rgb(128 128 128 / 0.22); }
& .context > :first-child { flex: 0 0 3.6em; text-align: right; font-variant-numeric: tabular-nums; opacity: 0.68; }
& .context > :last-child { flex: 1 1 auto; min-width: 0; }
& details { margin: 4px 0; }
& summary { cursor: pointer; opacity: 0.8; }
& table { border-collapse: collapse; width: 100%; margin: 0; border: 0; font-size: 12px; table-layout: auto; color: inherit; }
& tr { background: none; border: 0; }
& th, & td { text-align: right; padding: 1px 8px 1px 0; border: 0; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; background: none; color: inherit; max-width: none; }
& tbody tr { border-top: 1px solid rgb(128 128 128 / 0.16); }
& tbody tr.chosen { background: rgb(ABOVE / 0.2); }
& th.words, & td.words { text-align: left; }
& td.words + td, & th.words + th { padding-left: 8px; }
& td.words:not(:first-child) { white-space: normal; overflow-wrap: anywhere; }
& code { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; color: inherit; white-space: pre-wrap; padding: 0 2px;
  border-radius: 3px; background: rgb(128 128 128 / 0.16); }
& .bar { display: block; height: 7px; border-radius: 1px; background: rgb(ABOVE / 0.75); margin-top: 2px; }
& .bar.plain { background: rgb(128 128 128 / 0.6); margin: 3px 0 0; }
& svg { display: block; width: 100%; overflow: visible; }
& .bars { height: 84px; }
& .bars rect { fill: rgb(ABOVE); }
& .axis { display: flex; justify-content: space-between; font-size: 11px; border-top: 1px solid rgb(128 128 128 / 0.5);
  font-variant-numeric: tabular-nums; }
& text { fill: currentColor; font: 10px system-ui, sans-serif; }
& .frame { stroke: currentColor; stroke-opacity: 0.35; fill: none; }
""".strip()
for _name, _colour in {"ABOVE": ABOVE, "BELOW": BELOW}.items():
    _RULES = _RULES.replace(_name, "{} {} {}".format(*_colour))
SCOPE = f"saekit-{hashlib.sha256(_RULES.encode()).hexdigest()[:6]}"
# Thrice the class: a notebook's own rules for tables have two classes and two elements.
STYLE = _RULES.replace("&", f".{SCOPE}.{SCOPE}.{SCOPE}")


def whole(*parts: str) -> str:
    """An output: its style and its parts."""
    return f'<div class="{SCOPE}"><style>{STYLE}</style>{"".join(parts)}</div>'


def text(value: object) -> str:
    """Any text, harmless: control characters and bidi overrides as escapes, a line's end as ↵, markup escaped."""
    return html.escape(visible(str(value)).replace("\n", "↵"))


def code(token: str) -> str:
    """A token, whose spaces show."""
    return f"<code>{text(token)}</code>"


def facts(named: Iterable[tuple[str, str]]) -> str:
    """(name, value) pairs in a line, both plain text."""
    pairs = (
        f'<span><span class="soft">{text(name)}</span> <b>{text(value)}</b></span>' for name, value in named
    )
    return f'<div class="facts">{"".join(pairs)}</div>'


def run(*parts: str) -> str:
    """Running text, spaces and line ends kept; of `literal` and `grounds`."""
    return f'<div class="run">{"".join(parts)}</div>'


def literal(value: str) -> str:
    """Any text inside a `run`."""
    return html.escape(visible(value)).replace("\n", "↵\n")


def grounds(tokens: Iterable[tuple[str, float, str]], peak: int | None = None) -> str:
    """(token, level from −1 to 1, what shows under the pointer) inside a `run`; what is silent is plain text."""
    parts = []
    for i, (token, level, title) in enumerate(tokens):
        shown = literal(token)
        if not abs(level) >= SILENT and i != peak:  # also what is no number
            parts.append(shown)
            continue
        kind = " ".join(["below"] * (level < 0) + ["peak"] * (i == peak))
        class_ = f' class="{kind}"' if kind else ""
        alpha = f"{0.08 + 0.67 * min(1.0, abs(level)):.2f}".lstrip("0")
        parts.append(f'<b{class_} title="{text(title)}" style="--a:{alpha}">{shown}</b>')
    return "".join(parts)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: Sequence[int] = (0,),
    chosen: int | None = None,
) -> str:
    """A table; cells are HTML. words: columns that are read rather than compared. chosen: the row that stands out."""
    if not rows:
        return ""
    kinds = [' class="words"' if i in words else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        ('<tr class="chosen">' if i == chosen else "<tr>")
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def titled(name: str, *parts: str) -> str:
    """Parts under a name; nothing where there are none."""
    inside = "".join(parts)
    return f'<div><div class="name">{text(name)}</div>{inside}</div>' if inside else ""


def folded(name: str, *parts: str) -> str:
    """Parts that open at a click; nothing where there are none."""
    inside = "".join(parts)
    return f"<details><summary>{text(name)}</summary>{inside}</details>" if inside else ""
