"""The map, used as a person uses it: looked at, zoomed, searched, walked through with the keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from saekit.catalog import Catalog

    OpenPage = Callable[..., Page]


def drawn(page: Page, **figures: str) -> None:
    """Waits until the map was drawn with these figures: `zoom="1.00"`, `hovered="~."` for any feature."""
    page.wait_for_function(
        """(wanted) => {
            const canvas = document.querySelector(".map-plane canvas");
            const fits = ([name, value]) =>
                value.startsWith("~") ? new RegExp(value.slice(1)).test(canvas.dataset[name]) : canvas.dataset[name] === value;
            return canvas?.dataset.zoom && Object.entries(wanted).every(fits);
        }""",
        arg=figures,
    )


def figure(page: Page, name: str) -> str:
    return str(page.evaluate("(name) => document.querySelector('.map-plane canvas').dataset[name]", name))


def middle(page: Page) -> tuple[float, float]:
    box = page.locator(".map-plane canvas").bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def at(page: Page, feature: int) -> tuple[float, float]:
    """Where a feature lies on the screen while the whole map is shown."""
    x, y = page.evaluate("async (i) => { const { x, y } = await load('map'); return [x[i], y[i]]; }", feature)
    box: Any = page.locator(".map-plane canvas").bounding_box()
    scale = (min(box["width"], box["height"]) - 32) / 65535
    left, top = middle(page)
    return left + (x - 65535 / 2) * scale, top + (y - 65535 / 2) * scale


def hover_a_feature(page: Page) -> int:
    """Moves the pointer on to a feature near the middle; its number."""
    page.mouse.move(*at(page, nearest_to_the_middle(page)))
    drawn(page, hovered="~.")
    return int(figure(page, "hovered"))


def nearest_to_the_middle(page: Page) -> int:
    return int(
        page.evaluate(
            """async () => {
                const { x, y } = await load("map");
                const far = (i) => (x[i] === null ? Infinity : (x[i] - 32767.5) ** 2 + (y[i] - 32767.5) ** 2);
                return [...x.keys()].reduce((best, i) => (far(i) < far(best) ? i : best));
            }"""
        )
    )


def test_wheel_zooms_where_the_pointer_is_and_a_click_opens(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#map")
    drawn(page, zoom="1.00", highlighted="all", hovered="")
    other = hover_a_feature(page)
    left, top = middle(page)
    page.mouse.move(left + 120, top - 40)
    drawn(page, hovered=f"~^(?!{other}$).")
    feature = int(figure(page, "hovered"))
    page.mouse.move(*at(page, feature))
    drawn(page, hovered=str(feature))
    page.mouse.wheel(0, -400)
    drawn(page, zoom="~^1\\.[1-9]", hovered=str(feature))  # what is under the pointer stays there
    page.mouse.move(*at(page, other))
    drawn(page, hovered=f"~^(?!{other}$)")  # and all else moves
    for _ in range(12):
        page.mouse.wheel(0, 400)
    drawn(page, zoom="1.00")
    page.mouse.move(left, top)
    feature = hover_a_feature(page)
    card = page.locator(".map-card")
    assert f"#{feature}" in card.inner_text()
    assert "of tokens" in card.inner_text()
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(f"**#{feature}")


def test_drag_moves_the_map_and_opens_nothing(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#map")
    drawn(page, zoom="1.00")
    page.get_by_label("Zoom in").click()
    drawn(page, zoom="1.60")
    feature = hover_a_feature(page)
    left, top = at(page, feature)
    page.mouse.down()
    page.mouse.move(left + 80, top + 50, steps=4)
    page.mouse.up()
    drawn(page, hovered="")
    page.mouse.move(left + 81, top + 50)
    drawn(page, hovered=str(feature))  # it came along
    assert page.url.endswith("#map")
    page.get_by_label("Show the whole map").click()
    drawn(page, zoom="1.00")


def test_the_features_worth_a_first_look_are_named(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site)
    page.evaluate(
        """() => {
            const pen = CanvasRenderingContext2D.prototype, fillText = pen.fillText;
            window.written = [];
            pen.fillText = function (text, ...at) { written.push(text); return fillText.call(this, text, ...at); };
        }"""
    )
    examples = page.locator(".examples bdi").all_inner_texts()
    names = {" · ".join(name.split(" · ")[:2]) for name in examples}
    page.evaluate("() => { location.hash = '#map' }")
    drawn(page, zoom="1.00")
    assert len(names & {*page.evaluate("() => written")}) > len(names) / 2  # those that have room
    page.fill("#query", "zzzzqqq")
    drawn(page, highlighted="0")
    page.evaluate("() => { written.length = 0; dispatchEvent(new Event('resize')) }")
    page.set_viewport_size({"width": 1200, "height": 800})
    page.wait_for_function("() => document.querySelector('.map-plane canvas').width < 800")
    assert page.evaluate("() => written") == []


def test_the_search_highlights(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#map")
    drawn(page, highlighted="all")
    page.fill("#query", "Jedi")
    drawn(page, highlighted="~^[1-9]")
    said = page.locator(".map-highlight").inner_text()
    count = int(re.sub(r"\D", "", said.split(" of ")[0]))
    assert figure(page, "highlighted") == str(count)
    assert 0 < count < 1000
    page.fill("#query", "zzzzqqq")
    drawn(page, highlighted="0")
    assert "No feature fits" in page.locator(".map-highlight").inner_text()
    page.get_by_label("Show all features").click()
    drawn(page, highlighted="all")
    assert page.locator(".map-highlight").is_hidden()


def test_keys_walk_from_feature_to_feature_and_open_one(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#map")
    drawn(page, zoom="1.00")
    page.locator(".map-plane canvas").focus()
    page.keyboard.press("ArrowRight")
    drawn(page, focused="~.")
    first = int(figure(page, "focused"))
    assert first == nearest_to_the_middle(page)
    spoken = page.locator("main [role=status]")
    assert f"#{first}" in spoken.inner_text()
    place = "async (i) => (await load('map')).x[i]"
    page.keyboard.press("ArrowRight")
    drawn(page, focused=f"~^(?!{first}$).")
    second = int(figure(page, "focused"))
    assert page.evaluate(place, second) > page.evaluate(place, first)
    assert f"#{second}" in spoken.inner_text()
    page.keyboard.press("+")
    drawn(page, zoom="1.60")
    page.keyboard.press("0")
    drawn(page, zoom="1.00")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**#{second}")


def test_from_a_feature_its_nearest_show(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    page = open_page(tiny_site, "#742")
    page.locator('#places [data-place="map"]').click()
    drawn(page, opened="742")
    neighbours = [n.feature for n in tiny_catalog[742].neighbours if tiny_catalog[n.feature].density > 0]
    assert f"#742 and the {len(neighbours)} features nearest" in page.locator(".map-highlight").inner_text()
    page.locator(".map-plane canvas").focus()
    page.keyboard.press("Escape")
    drawn(page, opened="", highlighted="all")


def pixel(page: Page, x: float, y: float) -> list[int]:
    """The colour in a canvas at a place of the screen."""
    found: list[int] = page.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector(".map-plane canvas"), box = canvas.getBoundingClientRect();
            const ratio = canvas.width / box.width;
            return [...canvas.getContext("2d").getImageData((x - box.left) * ratio, (y - box.top) * ratio, 1, 1).data];
        }""",
        [x, y],
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_choice_and_the_theme(open_page: OpenPage, tiny_site: Path, scheme: str) -> None:
    page = open_page(tiny_site, "#map", scheme=scheme)
    drawn(page, zoom="1.00")
    left, top = middle(page)
    corner = (left - 200, top - 200)  # inside the canvas, outside the map
    before = pixel(page, *corner)
    assert (before[0] > 128) == (scheme == "light")
    ends = page.locator(".map-legend").inner_text()
    page.locator(".map-choices select").first.select_option("max")
    page.wait_for_function("(ends) => document.querySelector('.map-legend').innerText !== ends", arg=ends)
    for _ in range(2):  # auto, light, dark: one of them is the other theme
        page.locator("#theme").click()
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector(".map-plane canvas");
            return canvas.getContext("2d").getImageData(2, 2, 1, 1).data[0] < 128;
        }"""
    )


def test_a_finger_looks_first_then_opens(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#map", width=390, height=844)
    drawn(page, zoom="1.00")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    x, y = at(page, nearest_to_the_middle(page))
    page.touchscreen.tap(x, y)
    drawn(page, focused="~.")
    assert page.url.endswith("#map")
    feature = figure(page, "focused")
    page.locator(".map-card").tap()
    page.wait_for_url(f"**#{feature}")
