"""How the reference reads the house's docstrings: an extension of griffe, which reads the code as text.

name: what it is. other: …      in a docstring, `name` a parameter     ─▶  a list of parameters
field: int  # what it is        beside a field, or in lines above it   ─▶  an item of the class's list of fields
"""

from __future__ import annotations

import io
import re
import tokenize
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Function, Module


class HouseStyle(Extension):
    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = listed(func.docstring.value, [p.name.lstrip("*") for p in func.parameters])

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """After dataclasses have got their signatures: fields need no heading each."""
        for member in list(pkg.members.values()):
            if isinstance(member, Class):
                describe(member)
            if isinstance(member, Class | Module):
                self.on_package(pkg=member)  # type: ignore[arg-type]


def describe(kind: Class) -> None:
    """Fields out of the members and into the docstring."""
    said = kind.docstring.value if kind.docstring else ""
    said = listed(said, [p.name.lstrip("*") for p in kind.parameters])
    fields = [
        kind.members.pop(name) for name in [name for name, it in kind.members.items() if field_like(it)]
    ]
    lines = filter(None, [line(field) for field in fields if not field.name.startswith("_")])
    kind.docstring = Docstring(tight("\n".join([said, "", *lines])), parent=kind)


def field_like(member: Any) -> bool:
    """Whether it is a field, of the class or of its instances, and no property."""
    return isinstance(member, Attribute) and "property" not in member.labels


def line(field: Attribute) -> str:
    said = comments(field)
    if field.annotation is None and not said:
        return ""
    kind = f": {field.annotation}" if field.annotation is not None else ""
    value = str(field.value) if "class-attribute" in field.labels and field.value is not None else ""
    value = f" = {value}" if value and not value.startswith(("field(", "Field(")) else ""
    return f"- `{field.name}{kind}{value}`" + (f" · {said}" if said else "")


def listed(text: str, names: list[str]) -> str:
    """The docstring with each `name: …` of a parameter as an item of a list."""
    name = "|".join(map(re.escape, names))
    start = rf"((?:{name})(?:, (?:{name}))*): "
    made = []
    for paragraph in text.split("\n\n"):
        if not names or not re.match(start, paragraph):
            made.append(paragraph)
            continue
        body, *rest = re.split(r"\n(?=Raises )", paragraph, maxsplit=1)
        parts = re.split(rf"(?:^|(?<=[.;…] )){start}", re.sub(r"\s*\n\s*", " ", body))
        items = [
            f"- {', '.join(f'`{one}`' for one in heads.split(', '))}: {said.strip().rstrip(';')}"
            for heads, said in zip(parts[1::2], parts[2::2], strict=True)
        ]
        made += ["\n".join(items), *rest]
    return tight("\n\n".join(made))


def tight(text: str) -> str:
    """No empty lines between a list's items."""
    return re.sub(r"^(- `.*)\n\n(?=- `)", r"\1\n", text, flags=re.MULTILINE)


def comments(field: Attribute) -> str:
    """What the comments beside a field, and in the lines right above it, say."""
    if field.lineno is None or field.endlineno is None or isinstance(field.filepath, list):
        return ""
    lines = [line.strip() for line in field.filepath.read_text("utf-8").splitlines()]
    own = "\n".join(lines[field.lineno - 1 : field.endlineno])
    tokens = tokenize.generate_tokens(io.StringIO(own).readline)
    beside = [token.string for token in tokens if token.type == tokenize.COMMENT]
    first = field.lineno - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    said = " ".join(text.lstrip("# ") for text in [*lines[first : field.lineno - 1], *beside])
    parts = re.split(r"(`[^`]*`)", said)
    return "".join(part if n % 2 else plain(part) for n, part in enumerate(parts))


def plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\[\]*_])", r"\\\1", text).replace("<", "&lt;")
