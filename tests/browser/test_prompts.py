"""Texts token by token, as a person reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saekit.catalog import Catalog
from saekit.catalog.firing import Firing, firing

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from transformer_lens.model_bridge import TransformerBridge

OpenPage = Callable[..., "Page"]
TEXT = "Once upon a time there was a little boat."  # the second that the site of the tests is made with


@pytest.fixture(scope="module")
def fired(tiny_catalog: Catalog, model: TransformerBridge) -> Firing:
    """What the library says fires on the text; the token that the model adds left out."""
    found = firing(model, tiny_catalog.sae, TEXT)
    kept = [i for i, token in enumerate(found.tokens) if token not in tiny_catalog.info["excluded"]]
    return Firing([found.tokens[i] for i in kept], [found.features[i] for i in kept])


@pytest.fixture
def page(open_page: OpenPage, tiny_site: Path) -> Page:
    return open_page(tiny_site, "#prompts/1")


def listed(page: Page) -> list[int]:
    """The features listed beside the text, from the top."""
    links = page.locator(".firing li a").all()
    return [int(str(link.get_attribute("href"))[1:]) for link in links]


def token(page: Page, text: str) -> str:
    return f".pickable:text-is('{text}') >> nth=0"


def coloured(page: Page) -> list[str]:
    """The tokens that carry a colour."""
    return page.locator(".pickable.fires").all_inner_texts()


CONTRAST = """token => {
    // WCAG 2: of the text to the colour of its token, laid over the paper
    const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const pixel = (...colours) => {
        for (const colour of colours) {
            pen.fillStyle = colour;
            pen.fillRect(0, 0, 1, 1);
        }
        const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const style = getComputedStyle(token), paper = getComputedStyle(document.body).backgroundColor;
    const [a, b] = [pixel(paper, style.backgroundColor), pixel(style.color)];
    return Math.max(a, b) / Math.min(a, b);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_hottest_token_can_be_read(open_page: OpenPage, tiny_site: Path, scheme: str) -> None:
    page = open_page(tiny_site, "#prompts/1", scheme=scheme)
    hottest = page.locator(".pickable").first
    cold = hottest.evaluate(
        "token => { token.style.setProperty('--heat', 0); return getComputedStyle(token).backgroundColor }"
    )
    hottest.evaluate("token => token.style.setProperty('--heat', 1)")
    assert hottest.evaluate("token => getComputedStyle(token).backgroundColor") != cold
    assert hottest.evaluate(CONTRAST) > 4.5


def test_texts_are_chosen_from_a_list(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#prompts")
    texts = page.locator(".excerpt").all_inner_texts()
    assert texts[:2] == ["Mike pulls out his", TEXT]
    assert len(texts) > 2  # and some of the catalog's own sample
    page.click(f"text={TEXT}")
    page.wait_for_selector("h2:text-is('Text 2 of')".replace("text-is", "has-text"))
    assert "".join(page.locator(".token-flow").inner_text()) == TEXT
    page.click("text=← before")
    page.wait_for_selector("h2:has-text('Text 1 of')")
    page.click("text=All texts")
    page.wait_for_selector(".excerpt")
    page.evaluate("location.hash = '#prompts/999'")
    page.wait_for_selector("[role=alert]:has-text('There is no text 999')")


def test_the_whole_text_by_summed_activation(page: Page, fired: Firing, tiny_catalog: Catalog) -> None:
    sums: dict[int, float] = {}
    for row in fired.features:
        for index, activation in row:
            sums[index] = sums.get(index, 0) + activation
    rare = {index: total for index, total in sums.items() if tiny_catalog.density[index] <= 0.01}
    first = sorted(rare, key=rare.__getitem__, reverse=True)
    assert listed(page)[:5] == first[:5]
    assert page.locator(".firing li .bar").first.inner_text() == f"{rare[first[0]]:#.3g}"
    page.click(f"text=and {len(sums) - len(rare)} that fire everywhere")
    assert listed(page)[0] == max(sums, key=sums.__getitem__)
    page.click("text=leave out common features")
    assert listed(page)[:5] == first[:5]
    page.click("text=/^\\d+ more$/")
    assert sorted(listed(page)) == sorted(rare)


def test_token_by_token(page: Page, fired: Firing) -> None:
    at = fired.tokens.index(" little")
    page.click(token(page, "little"))
    assert listed(page) == [index for index, _ in fired.features[at]]
    values = [float(text) for text in page.locator(".firing li .bar").all_inner_texts()]
    assert values == pytest.approx([a for _, a in fired.features[at]], rel=1e-2)
    page.keyboard.press("ArrowRight")
    assert listed(page) == [index for index, _ in fired.features[at + 1]]
    assert page.locator(".pickable[aria-pressed=true]").inner_text() == "boat"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert listed(page) == [index for index, _ in fired.features[at - 1]]
    page.keyboard.press("Escape")
    assert page.inner_text(".firing h3") == "In the whole text"


def test_a_feature_colours_the_text(page: Page, fired: Firing) -> None:
    row = page.locator(".firing li").nth(1)
    index = listed(page)[1]
    where = {i: dict(found)[index] for i, found in enumerate(fired.features) if index in dict(found)}
    row.hover()
    assert coloured(page) == [fired.tokens[i].strip() for i in where]
    strongest = page.locator(".pickable.fires").first
    assert strongest.get_attribute("data-activation") == f"{where[min(where)]:#.3g}"
    page.mouse.move(0, 0)
    assert len(coloured(page)) > len(where)
    row.locator(".strip").focus()
    page.keyboard.press("Enter")  # pins it
    page.locator(".firing li a").first.focus()
    page.focus(".steps a")
    assert coloured(page) == [fired.tokens[i].strip() for i in where]
    assert f"Coloured by {index} " in page.inner_text(".read [role=status]")
    row.locator("a").click()
    page.wait_for_selector(f".number:text-is('Feature {index}')")


def test_on_a_phone(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#prompts/5", width=390, height=844, scheme="dark")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.locator("#view").evaluate("e => e.scrollWidth <= e.clientWidth")
    page.locator(".pickable.fires").first.tap()
    page.wait_for_selector(".firing h3:has-text('On ')")
    page.locator(".strip").first.tap()
    assert page.locator(".strip[aria-pressed=true]").count() == 1
