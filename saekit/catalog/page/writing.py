"""A catalog as a static page: a folder that opens from disk and from any web server, or one file to attach to a mail.

index.html, *.css, *.js    the page, the same for every catalog (from `files`)
data/*.js                  what it shows (see `data`)

<name>.html                all of it in one file, for chosen features
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.catalog.page.data import PageData
from saekit.errors import InvalidInput
from saekit.files import replacing, staged

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog.store import Catalog

ASSETS = Path(__file__).parent / "files"
INDEX, DATA = "index.html", "data"
FORMER = {"about.js", "live.js"}  # assets of earlier pages
MARK = b'<meta name="generator" content="saekit">'
SINGLE = b'<html lang="en" data-single="yes">'
IN_A_FILE = 200  # features: some 2 MB
POLICY = "default-src 'none'; script-src {scripts}; style-src {styles}; base-uri 'none'; form-action 'none'"


def write_page(
    catalog: Catalog,
    place: Path,
    *,
    prompts: Sequence[str] | None = None,
    model: TransformerBridge | None = None,
    features: Sequence[int] | None = None,
) -> Path:
    """Write the page, whole or not at all; an earlier one in its place is replaced. See `Catalog.page`."""
    if place.suffix.lower() in (".html", ".htm"):
        if prompts:
            raise InvalidInput("page: a single file shows no prompts; a folder does")
        return _write_file(catalog, place, _chosen(catalog, place, features))
    if features is not None:
        raise InvalidInput(f"page: features are for a single file; {place} does not end in .html")
    final = place.resolve()  # "." has no name that a new folder could take
    _check_free(final)
    data = PageData(catalog, prompts=prompts or (), model=model)
    with staged(final) as building:
        for asset in assets():
            shutil.copyfile(asset, building / asset.name)
        (building / DATA).mkdir()
        for name in data.names():
            (building / DATA / f"{name}.js").write_text(data.script(name), "ascii")
    return place


def assets() -> list[Path]:
    """The files of the page that are the same for every catalog."""
    return sorted(path for path in ASSETS.iterdir() if path.suffix in (".html", ".css", ".js"))


def size_of(page: Path) -> int:
    """Bytes of a page that was written."""
    files = page.rglob("*") if page.is_dir() else [page]
    return sum(path.stat().st_size for path in files if path.is_file())


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidInput(f"page: {folder} is a file; expected a new folder or an earlier page")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - {asset.name for asset in assets()} - FORMER - {DATA})
    if foreign or (found and not _is_page(folder)):
        names = ", ".join(foreign or sorted(found))
        raise InvalidInput(f"page: {folder} holds other files ({names[:200]}); choose a new or empty folder")


def _is_page(folder: Path) -> bool:
    index = folder / INDEX
    return index.is_file() and MARK in index.read_bytes()


# A single file


def _chosen(catalog: Catalog, place: Path, features: Sequence[int] | None) -> list[int]:
    if features is None or len(features) == 0:
        raise InvalidInput(
            f"page: {place} is a single file, for chosen features; name them: features=[3, 5], or --features 3,5"
        )
    chosen = list(dict.fromkeys(catalog[i].index for i in features))
    if len(chosen) > IN_A_FILE:
        raise InvalidInput(
            f"page: {len(chosen)} features; a single file takes {IN_A_FILE}, a folder all of them"
        )
    return chosen


def _write_file(catalog: Catalog, place: Path, features: Sequence[int]) -> Path:
    if place.exists() and not (place.is_file() and SINGLE in place.read_bytes()):
        raise InvalidInput(
            f"page: {place} is something else; a single file replaces only an earlier one of its kind"
        )
    data = PageData(catalog, only=features)
    text = _single(data)
    with replacing(place) as building:
        building.write_bytes(text.encode())
    return place


def _single(data: PageData) -> str:
    """index.html with its styles, its scripts and the data in it, each allowed by its hash."""
    index = (ASSETS / INDEX).read_text("utf-8")
    styles = [_asset(name) for name in re.findall(r'<link rel="stylesheet" href="([\w.-]+)">', index)]
    names = re.findall(r'<script src="([\w.-]+)" defer></script>', index)
    scripts = [_asset(name) for name in names]
    received = names.index("data.js") + 1  # data are received by the script that loads them elsewhere
    scripts[received:received] = [data.script(name) for name in data.names()]
    policy = POLICY.format(scripts=" ".join(map(_hash, scripts)), styles=" ".join(map(_hash, styles)))
    index = re.sub(r'\n<(?:link rel="stylesheet"|script src=)[^>]*>(?:</script>)?', "", index)
    for old, new in (
        ('<html lang="en">', SINGLE.decode()),
        (re.findall(r'Content-Security-Policy" content="([^"]*)"', index)[0], policy),
        ("</head>", "".join(f"<style>{style}</style>\n" for style in styles) + "</head>"),
        ("</body>", "".join(f"<script>{script}</script>\n" for script in scripts) + "</body>"),
    ):
        index = index.replace(old, new, 1)
    return index


def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
