"""Tokens, labels and explanations that try to leave their place: in every view they show as the text that they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from catalog.page.hostile import HOSTILE, hostile_copy

import saekit
from saekit.catalog import Catalog
from saekit.catalog.page import assets

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from transformer_lens.model_bridge import TransformerBridge

OpenPage = Callable[..., "Page"]
LITERALS = (
    "</script><script>",
    "<img src=x onerror=",
    "javascript:alert(1)",
    "\\u202eright to left",
    "\\u2028and",
    "\\x1b[31mred",
    "zero\\u200bwidth",
    "&lt;b&gt;",
    "<svg onload=alert(1)>",
)


@pytest.fixture(scope="module")
def hostile(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A random SAE over lines that each say one thing, its tokens and labels hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    sae = saekit.SAE.new("topk", d_in=256, d_sae=96, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    lines = [f"The small boat number {i} sailed past the harbour with a red lamp." for i in range(20)]
    tokens = saekit.tokenize(lines, model, 32)
    return hostile_copy(Catalog.build(model, sae, tokens, folder / "plain"), folder / "catalog")


@pytest.fixture(scope="module")
def site(hostile: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.page(tmp_path_factory.mktemp("site") / "site")


@pytest.fixture(scope="module")
def feature(hostile: Catalog) -> int:
    """One that fires on every kind of token."""
    return max(hostile, key=lambda feature: len(feature.contexts)).index


def check(page: Page, scripts: int) -> None:
    """Nothing of the catalog became an element, ran, turned the reading direction, or is wider than the page."""
    page.on("dialog", lambda dialog: pytest.fail(f"a dialog: {dialog.message}"))
    assert "owned" not in page.title() or "<" in page.title()
    assert page.locator("script").count() == scripts
    assert page.locator("img, iframe, object, embed, svg [onload], main style").count() == 0
    assert page.evaluate("[...document.querySelectorAll('a')].every(a => !a.href.startsWith('javascript:'))")
    assert page.evaluate("[...document.querySelectorAll('*')].every(e => ![...e.attributes].some(a => /^on/.test(a.name)))")  # fmt: skip
    text = page.evaluate("document.documentElement.textContent")
    for character in "\u202e\u2066\u2028\x1b\x00\u200b\ufeff":
        assert character not in text
    assert page.locator("#view").evaluate("e => e.scrollWidth <= e.clientWidth")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "address",
    ["", "#feature", "#map", "#prompts", "#prompts/0", "#about", "#q=<img src=x onerror=alert(1)>", "#<b>"],
)
def test_every_view_shows_it_literally(
    open_page: OpenPage, site: Path, feature: int, address: str, width: int
) -> None:
    page = open_page(site, f"#{feature}" if address == "#feature" else address, width=width)
    check(page, sum(asset.suffix == ".js" for asset in assets()))
    if address == "#feature":
        text = page.evaluate("document.body.textContent")
        for literal in LITERALS:
            assert literal in text, literal
        page.click("text=whole contexts")
        page.click("role=tab[name='Whole range']")
        check(page, sum(asset.suffix == ".js" for asset in assets()))
    if address == "#prompts/0":
        page.locator(".pickable.fires").first.click()
        check(page, sum(asset.suffix == ".js" for asset in assets()))


def test_a_search_for_hostile_words_finds_them(open_page: OpenPage, site: Path) -> None:
    page = open_page(site)
    for word in ("script", HOSTILE[1], "</script>"):
        page.fill("#query", word)
        page.wait_for_function("() => document.getElementById('shown').textContent.includes(' of ')")
        assert page.locator("#rows a").count() > 0
        check(page, sum(asset.suffix == ".js" for asset in assets()))


def test_in_a_single_file(open_page: OpenPage, hostile: Catalog, feature: int, tmp_path: Path) -> None:
    others = [i for i in range(len(HOSTILE)) if i != feature]
    file = hostile.page(tmp_path / "mail.html", features=[feature, *others])
    scripts = file.read_text("utf-8").count("<script")
    page = open_page(file, f"#{feature}")
    check(page, scripts)
    text = page.inner_text("#view")
    assert f"Feature {feature}" in text
    assert sum(literal in page.evaluate("document.body.textContent") for literal in LITERALS) > 3
