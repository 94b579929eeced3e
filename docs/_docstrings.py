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
            names = [parameter.name.lstrip("*") for parameter in func.parameters]
            func.docstring.value = listed(func.docstring.value, names)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """After dataclasses have got their signatures: fields need no heading each."""
        for member in list(pkg.members.values()):
            if isinstance(member, Class):
                describe(member)
            if isinstance(member, Class | Module):
                self.on_package(pkg=member)  # type: ignore[arg-type]


def describe(kind: Class) -> None:
    """Fields out of the members and into the docstring."""
    names = [name for name, member in kind.members.items() if field_like(member)]
    if not names:
        return
    fields = [kind.members.pop(name) for name in names]
    said = kind.docstring.value if kind.docstring else ""
    lines = [line(field) for field in fields if not field.name.startswith("_")]
    kind.docstring = Docstring("\n".join([said, "", *lines]), parent=kind)


def field_like(member: Any) -> bool:
    """Whether it is `name: type` in the body of a class, no property."""
    if not isinstance(member, Attribute):
        return False
    return member.name.startswith("_") or (member.annotation is not None and "property" not in member.labels)


def line(field: Attribute) -> str:
    value = str(field.value) if field.value is not None else ""
    plain = value and not value.startswith(("field(", "Field("))
    said = " ".join(filter(None, [field.docstring.value if field.docstring else "", comments(field)]))
    return f"- `{field.name}: {field.annotation}{f' = {value}' if plain else ''}`" + (f" · {said}" if said else "")


def listed(text: str, names: list[str]) -> str:
    """The docstring with each `name: …` of a parameter as an item of a list."""
    name = "|".join(map(re.escape, names))
    start = rf"((?:{name})(?:, (?:{name}))*): "
    made = []
    for paragraph in text.split("\n\n"):
        if not names or not re.match(start, paragraph):
            made.append(paragraph)
            continue
        body, rest = re.split(r"\n(?=Raises )|$", paragraph, maxsplit=1)
        parts = re.split(rf"(?:^|(?<=[.;] )){start}", re.sub(r"\s*\n\s*", " ", body))
        made += [
            f"- {', '.join(f'`{one}`' for one in heads.split(', '))}: {said.strip().rstrip(';')}"
            for heads, said in zip(parts[1::2], parts[2::2], strict=True)
        ]
        made[-1] += "\n"
        made += [rest] if rest else []
    return re.sub(r"\n\n(- [^\n]*)\n\n(?=- `)", r"\n\n\1\n", "\n\n".join(made))


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
    return " ".join(text.lstrip("# ") for text in [*lines[first : field.lineno - 1], *beside])
