"""The pages in docs/ are true: their Python runs as it stands, their commands parse, their links and tables agree with the code."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from saekit.catalog.tables import SCHEMAS
from saekit.cli import _parser
from saekit.steering.kinds import UNITS, WITHOUT_STRENGTH

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md"]
NO_RUN = "no-run"  # blocks that need a network, or an endpoint
SOME = 3  # such blocks, in all pages together


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    words: str  # what else stands after the language
    code: str
    line: int  # of its first line in the page


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(found[1], found[2].strip(), found[3], text.count("\n", 0, found.start(3)) + 1)
        for found in re.finditer(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def python(page: Path, *, run: bool) -> list[Block]:
    return [b for b in blocks(page) if b.language == "python" and (b.words != NO_RUN) == run]


def called(page: Path, block: Block) -> str:
    """The block as a module of its own, whose tracebacks name the page's lines."""
    return "\n" * (block.line - 1) + block.code


def of(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_in_sequence(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    written = python(page, run=True)
    assert len(written) > 5
    for block in written:
        exec(compile(called(page, block), str(page), "exec"), names)


def test_few_blocks_do_not_run_and_what_they_name_is_there() -> None:
    left = [(page, block) for page in DOCS for block in python(page, run=False)]
    assert len(left) <= SOME
    assert all(b.words in ("", NO_RUN) for page in DOCS for b in blocks(page) if b.language == "python")
    for page, block in left:
        for node in ast.walk(ast.parse(called(page, block), str(page))):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {node.module}"


def commands(page: Path) -> list[str]:
    """What stands after `saekit` in the page's blocks; what is said of a command stands two spaces or a # away from it."""
    lines = (
        line for b in blocks(page) if b.language == "" for line in b.code.replace("\\\n", "").splitlines()
    )
    found = (re.match(r"(?:saekit|.* -m saekit) +(\S.*)", line) for line in lines)
    return [re.split(r"\s{2,}|\s#", line[1])[0] for line in found if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_command_parses(page: Path) -> None:
    for line in commands(page):
        arguments = shlex.split(line)
        try:
            _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: saekit {line}")
        for word in arguments:
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), f"{page.name}: {word}"


def test_there_are_commands_to_parse() -> None:
    counts = {page.name: len(commands(page)) for page in DOCS}
    assert all(counts.values()), counts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!\w+:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links to {target}"


def test_the_tables_of_a_catalog_are_those_of_the_page() -> None:
    told = {
        file[1]: re.findall(r"`(\w+)`", row[1])
        for row in rows(of("catalog.md"))
        if (file := re.fullmatch(r"`(\w+)\.parquet`", row[0]))
    }
    assert told == {name: schema.names for name, schema in SCHEMAS.items()}


def test_the_keys_of_a_description_are_those_of_the_page() -> None:
    from saekit import Catalog

    text = of("catalog.md")
    told = rows(text[text.index("`catalog.json` has") : text.index("### With other tools")])
    keys = [key for row in told for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(keys) == sorted(Catalog.open("tiny").info)


def test_the_kinds_of_edit_and_their_units_are_those_of_the_page() -> None:
    text = of("steering.md")
    told = {
        kind[1]: tuple(re.findall(r"`(raw|max|norm)`", row[-1]))
        for row in rows(text[text.index("## Edits") : text.index("**Positions**")])
        if (kind := re.match(r"`(\w+)\(", row[0]))
    }
    assert told == {kind: () if kind in WITHOUT_STRENGTH else units for kind, units in UNITS.items()}
