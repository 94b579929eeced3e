"""How the reference reads the house's docstrings: a griffe extension.

    name: what it is. other: …      in a docstring, `name` a parameter     ─▶  a list of parameters
    field: int  # what it is        beside a field, or in lines above it   ─▶  the field's description
"""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function


class HouseStyle(Extension):
    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.docstring:
            names = [parameter.name.lstrip("*") for parameter in func.parameters]
            func.docstring.value = listed(func.docstring.value, names)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = listed(cls.docstring.value, [*cls.attributes])

    def on_attribute(self, *, attr: Attribute, **_: Any) -> None:
        if attr.docstring is None and (said := comments(attr)):
            attr.docstring = Docstring(said, parent=attr)


def listed(text: str, names: list[str]) -> str:
    """The docstring with each `name: …` of a parameter as an item of a list."""
    if not names:
        return text
    name = "|".join(map(re.escape, names))
    starts = re.compile(rf"(?:^|(?<=[.;] )|(?<=\.\n))[ ]*((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
    made = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    ") or not starts.match(paragraph):
            made.append(paragraph)
            continue
        joined = re.sub(r"\n\s*(?!Raises\b|Returns\b)", " ", paragraph)
        body, _, rest = joined.partition("\n")
        parts = re.split(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", body)
        items = [
            f"- {', '.join(f'`{one}`' for one in heads.split(', '))}: {said.strip().rstrip(';')}"
            for heads, said in zip(parts[1::2], parts[2::2], strict=True)
        ]
        made.append("\n".join(items) + (f"\n\n{rest}" if rest else ""))
    return "\n\n".join(made)


def comments(attr: Attribute) -> str:
    """What the comments beside an attribute, else in the lines right above it, say."""
    if not isinstance(attr.filepath, type(None) | list) and attr.lineno and attr.endlineno:
        lines = attr.filepath.read_text("utf-8").splitlines(keepends=True)
        own = "".join(lines[attr.lineno - 1 : attr.endlineno])
        readable = io.StringIO("\n".join(line.strip() for line in own.splitlines())).readline
        beside = [t.string for t in tokenize.generate_tokens(readable) if t.type == tokenize.COMMENT]
        above: list[str] = []
        for line in reversed(lines[: attr.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip())
        said = " ".join(line.lstrip("#: ") for line in above + beside if "type: ignore" not in line and "noqa" not in line)
        return said[:1].upper() + said[1:]
    return ""
