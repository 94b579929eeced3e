"""A real browser for the page: Debian's chromium (or another one that is there), driven by playwright.

    open_page(folder or address, "#7650", width=390, scheme="dark") → a playwright Page that has loaded

A page that logs an error, breaks its content-security policy, or asks for anything outside its folder or its server fails
the test when the test ends.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from saekit import embedded
from saekit.catalog import Catalog

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here to open the page with")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    contexts, wrong = list[Any](), list[str]()

    def open_(
        where: Path | str, address: str = "", *, width: int = 1280, height: int = 800, scheme: str = "light"
    ) -> Page:
        home = where if isinstance(where, str) else where.resolve().as_uri()
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=width < 600,
        )
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        allowed = home.rstrip("/")
        page.on("request", lambda r: None if _at_home(r.url, allowed) else wrong.append(f"asked {r.url}"))
        start = f"{home}/index.html" if isinstance(where, Path) and where.is_dir() else home
        page.goto(start + address)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong, wrong


def _at_home(url: str, home: str) -> bool:
    return url.startswith((home, "data:", "blob:"))


@pytest.fixture(scope="session")
def tiny_catalog() -> Catalog:
    """The catalog that ships: 4,096 features."""
    return Catalog.open(embedded.folder("catalog"))


@pytest.fixture(scope="session")
def tiny_site(
    tiny_catalog: Catalog, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Its page, with the prompts view; made once for all processes of a run."""
    prompts = ["Mike pulls out his", "Once upon a time there was a little boat."]
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            tiny_catalog.page(folder, prompts=prompts, model=request.getfixturevalue("model"))
    return folder
