"""The documentation as a site: it builds without a warning, its links lead somewhere, it has every public name, and no page asks
another host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import saekit

ROOT = Path(__file__).resolve().parent.parent
FETCHING = {  # attributes whose address a browser asks for by itself
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src", "srcdoc"),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "form": ("action",),
    "use": ("href", "xlink:href"),
    "base": ("href",),
}
TOLD = ("canonical", "alternate")  # kinds of <link> that nothing is fetched for


class Read(HTMLParser):
    """What a page links to, fetches, and can be linked to at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.styles: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        self.classes |= set(given.get("class", "").split())
        self.styles += [given["style"]] if "style" in given else []
        self._in_style = tag == "style"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in TOLD:
            self.fetched.append(given.get("href", ""))
        self.fetched += [given[key] for key in FETCHING.get(tag, ()) if key in given]

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: broken links and anchors, pages that are in no menu, names that are nowhere."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        build,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    return {path: Read(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site: Path, pages: dict[Path, Read]) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    assert {path.relative_to(site) for path in pages} == written | {Path("tour.html"), Path("404.html")}
    assert not list(site.rglob("*.py"))


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Read]) -> None:
    seen = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":  # the latter is shown at any address
                assert parts.scheme in ("https", "http", "mailto", ""), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()), f"{path.name}: {link}"
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
            seen += 1
    assert seen > 500


def test_no_page_asks_another_host(site: Path, pages: dict[Path, Read]) -> None:
    def stays(address: str, where: Path) -> None:
        parts = urlsplit(address)
        assert not parts.netloc, f"{where.name} asks {address}"
        assert parts.scheme in ("", "data", "javascript"), f"{where.name} asks {address}"

    for path, page in pages.items():
        for address in page.fetched:
            stays(address, path)
        for style in page.styles:
            for address in asked_by(style):
                stays(address, path)
        assert "mermaid" not in page.classes  # the theme would fetch what draws it
    for path in site.rglob("*.css"):
        for address in asked_by(path.read_text("utf-8")):
            stays(address, path)


def asked_by(style: str) -> list[str]:
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", style)
    return [one or other for one, other in found]


def test_the_reference_has_every_public_name(pages: dict[Path, Read], site: Path) -> None:
    anchors = set().union(*(page.anchors for path, page in pages.items() if path.parent.name == "reference"))
    assert [name for name in saekit.__all__ if f"saekit.{name}" not in anchors] == []
    overview = (site / "reference" / "index.html").read_text("utf-8")
    assert [name for name in saekit.__all__ if f"<code>{name}</code>" not in overview] == []


def test_parameters_and_fields_are_lists(site: Path) -> None:
    """What a docstring says of a parameter, and a comment of a field, is an item of its own."""
    training = (site / "reference" / "training.html").read_text("utf-8")
    assert "<li><code>overrides</code>: " in training
    assert "<li><code>tokens: Count = 10000000</code> · activations to train on</li>" in training


def test_the_notebook_is_a_page_with_what_it_shows(site: Path) -> None:
    tour = (site / "tour.html").read_text("utf-8")
    assert "saekit-output-" not in tour
    assert tour.count('<div class="shown">') == (site / "tour.ipynb").read_text("utf-8").count(
        '"output_type"'
    )
    assert 'href="tour.ipynb"' in tour
    assert 'href="tour.html"' in (site / "index.html").read_text("utf-8")
