"""A catalog as a static page: a folder that opens from disk and from any web server.

index.html, style.css, *.js   the page, the same for every catalog (from `page_files`)
data/*.js                     what it shows (see `page_data`)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.catalog.page_data import PageData
from saekit.errors import InvalidInput
from saekit.files import staged

if TYPE_CHECKING:
    from saekit.catalog.store import Catalog

ASSETS = Path(__file__).parent / "page_files"
INDEX, DATA = "index.html", "data"
MARK = b'<meta name="generator" content="saekit">'


def write_page(catalog: Catalog, folder: Path) -> Path:
    """Write the page, whole or not at all; an earlier page in the folder is replaced.

    Raises `InvalidInput` for a folder that holds anything else.
    """
    place = folder.resolve()  # "." has no name that a new folder could take
    _check_free(place)
    data = PageData(catalog)
    with staged(place) as building:
        for asset in assets():
            shutil.copyfile(asset, building / asset.name)
        (building / DATA).mkdir()
        for name in data.names():
            (building / DATA / f"{name}.js").write_text(data.script(name), "ascii")
    return folder


def assets() -> list[Path]:
    """The files of the page that are the same for every catalog."""
    return sorted(path for path in ASSETS.iterdir() if path.suffix in (".html", ".css", ".js"))


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InvalidInput(f"page: {folder} is a file; expected a new folder or an earlier page")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - {asset.name for asset in assets()} - {DATA})
    if foreign or (found and not _is_page(folder)):
        names = ", ".join(foreign or sorted(found))
        raise InvalidInput(f"page: {folder} holds other files ({names[:200]}); choose a new or empty folder")


def _is_page(folder: Path) -> bool:
    index = folder / INDEX
    return index.is_file() and MARK in index.read_bytes()
