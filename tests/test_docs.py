"""The pages in docs/ are true: their blocks run as they stand, their links and tables agree with the code.

A block that is not run has `<!-- not run: why -->` above it. The pages as a site: `test_site.py`.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from saekit.catalog.tables import SCHEMAS
from saekit.cli import _parser, main
from saekit.steering.kinds import UNITS, WITHOUT_STRENGTH

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted(ROOT.glob("docs/**/*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md"]
# Their commands name what a reader has, so they are parsed and not run; serve.md's curl is run by tests/server.
PARSED = ("catalog.md", "steering.md", "serve.md")
NOT_RUN = (
    12  # blocks that need an account, a hub, an endpoint, more machines or a person, in all pages together
)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    words: str  # what else stands after the language
    code: str
    line: int  # of its first line in the page
    why: str  # it is not run, as the comment above it says; empty: it is


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    fence = r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)([^\n]*)\n(.*?)^```$"
    return [
        Block(
            found[2],
            found[3].strip(),
            found[4],
            text.count("\n", 0, found.start(4)) + 1,
            found[1] or "",
        )
        for found in re.finditer(fence, text, re.DOTALL | re.MULTILINE)
    ]


def called(page: Path, block: Block) -> str:
    """The block as a module of its own, whose tracebacks name the page's lines."""
    return "\n" * (block.line - 1) + block.code


def of(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


def commands_of(block: Block) -> list[str]:
    """What stands after `saekit` in a block; what is said of a command stands two spaces or a # away from it."""
    lines = block.code.replace("\\\n", "").splitlines() if block.language == "" else []
    found = (re.match(r"((?:torchrun .* -m )?saekit) +(\S.*)", line) for line in lines)
    return [re.split(r"\s{2,}|\s#", line[0])[0] for line in found if line]


def command(line: str) -> list[str]:
    """The arguments that saekit gets."""
    return shlex.split(line.partition("saekit ")[2])


def run_command(line: str) -> None:
    if line.startswith("torchrun "):
        arguments = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    else:
        assert main(command(line)) == 0, line


@pytest.mark.filterwarnings(
    "ignore:The .utils. module has been deprecated:DeprecationWarning"
)  # sae_lens, when it is imported
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)], ids=name_of)
def test_the_blocks_of_a_page_run_in_sequence(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder: Python in one namespace, commands as they are typed, files by the title they have."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.why:
            continue
        if title := re.fullmatch(r'title="([\w.-]+)"', block.words):
            Path(title[1]).write_text(block.code)
        elif block.language == "python":
            exec(compile(called(page, block), str(page), "exec"), names)
        elif name_of(page) not in PARSED:
            assert block.language in ("", "json"), (
                f"{page.name}, line {block.line}: nothing runs {block.language}"
            )
            for line in commands_of(block):
                run_command(line)


def test_what_does_not_run_is_counted_and_can_be_read() -> None:
    left = [(page, block) for page in DOCS for block in blocks(page) if block.why]
    assert len(left) == NOT_RUN, [(page.name, block.line, block.why) for page, block in left]
    for page, block in left:
        for node in ast.walk(
            ast.parse(called(page, block)) if block.language == "python" else ast.Module([])
        ):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {node.module}"


def test_a_block_says_what_it_is() -> None:
    """Nothing after a language but a file's title: what is not run says so above, where it is read."""
    for page in DOCS:
        for block in blocks(page):
            assert re.fullmatch(r'(title="[\w.-]+")?', block.words), f"{page.name}, line {block.line}"
            assert block.language in ("", "python", "sh", "yaml", "json"), f"{page.name}, line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_parses(page: Path) -> None:
    for line in (line for block in blocks(page) for line in commands_of(block)):
        arguments = command(line)
        try:
            _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: saekit {line}")
        for word in arguments:
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), f"{page.name}: {word}"


def test_there_are_commands_to_parse_and_blocks_to_run() -> None:
    counts = {name_of(page): sum(len(commands_of(b)) for b in blocks(page)) for page in DOCS}
    told = {name for name, count in counts.items() if count}
    assert told >= {
        "index.md",
        "tutorial.md",
        "formats.md",
        *PARSED,
        *(n for n in counts if n.startswith("how-to/")),
    } - {"how-to/index.md"}
    assert sum(b.language == "python" for page in DOCS for b in blocks(page) if not b.why) > 60


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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
