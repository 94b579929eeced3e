"""The shell, the home view and the list, as a person uses them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from saekit.catalog import Catalog
from saekit.catalog.page import ASSETS, assets

if TYPE_CHECKING:
    from playwright.sync_api import Page

MANY = 24_576
OpenPage = Callable[..., "Page"]


def value(site: Path, name: str) -> Any:
    """What a data script of a site hands to `receive`."""
    found = re.fullmatch(
        r'receive\("[\w-]+", (.*)\);\n', (site / "data" / f"{name}.js").read_text(), re.DOTALL
    )
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def big_site(tiny_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny site, its features repeated up to 24,576: the list has to stay quick."""
    site = tmp_path_factory.mktemp("big") / "site"
    shutil.copytree(tiny_site, site, ignore=lambda _, names: [n for n in names if n.startswith("shard-")])
    overview, features, search = (value(tiny_site, name) for name in ("overview", "features", "search"))
    few = len(features["label"])
    times = MANY // few
    overview["sae"]["d_sae"] = MANY
    overview |= {"alive": overview["alive"] * times, "scored": overview["scored"] * times, "examples": []}
    search["words"] = [
        [
            token,
            *(
                [x + few * t * (i % 2 == 0) for t in range(times) for i, x in enumerate(flat)]
                for flat in lists
            ),
        ]
        for token, *lists in search["words"]
    ]
    search["said"] = [[i + few * t, text] for t in range(times) for i, text in search["said"]]
    data = {"overview": overview, "features": {k: v * times for k, v in features.items()}, "search": search}
    for name, found in data.items():
        (site / "data" / f"{name}.js").write_text(f"receive({json.dumps(name)}, {json.dumps(found)});\n")
    return site


def listed(page: Page) -> list[int]:
    """The features whose rows are in the document, from the top."""
    return [int(href[1:]) for href in page.eval_on_selector_all("#rows a", "all => all.map(a => a.hash)")]


def searched(page: Page, query: str, count: str) -> None:
    """Types a search and waits for the count of what it finds."""
    page.fill("#query", query)
    page.wait_for_function(
        "count => document.getElementById('shown').textContent.startsWith(count)", arg=count
    )


def drag(page: Page, plot: int, start: float, end: float) -> None:
    """Brushes a plot from one share of its width to another."""
    area = page.locator(".brushable").nth(plot)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=3)
    page.mouse.up()


def test_home_says_what_this_is(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    page = open_page(tiny_site)
    text = page.inner_text("#view")
    assert f"{(tiny_catalog.density > 0).sum():,} patterns found inside tiny" in text
    assert "before block 3 of 6" in text
    assert "saekit serve tiny" in text
    overview = value(tiny_site, "overview")
    for label, figure, words in overview["figures"]:
        assert {label, figure, words} <= set(text.split("\n"))
    for index in overview["examples"]:
        entry = page.locator(f'.examples li:has(a[href="#{index}"])')
        entry.locator(".strongest").wait_for()
        context = tiny_catalog[index].contexts[0]
        assert entry.locator(".strongest").inner_text().strip() == context.tokens[context.peak].strip()
    assert page.locator('[data-place="play"]').is_hidden()  # nobody answers here
    page.click("#places >> text=About")
    page.wait_for_selector("h2 >> text=About this catalog")
    about = page.inner_text("#view")
    for definition in tiny_catalog.info["definitions"].values():
        assert str(definition) in about
    assert 'saekit.Catalog.open("tiny")' in about
    assert page.get_attribute('[data-place="about"]', "aria-current") == "page"


def test_search_in_the_page_is_search_in_the_catalog(
    open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog
) -> None:
    page = open_page(tiny_site)
    for query in ("Jedi", "jed", "little boat"):
        hits = [feature.index for feature in tiny_catalog.search(query, limit=len(tiny_catalog))]
        searched(page, query, f"{len(hits):,} of 4,096")
        shown = listed(page)
        assert shown == hits[: len(shown)], query
    assert page.url.endswith("#q=little+boat")  # which opens the same search elsewhere:
    elsewhere = open_page(tiny_site, "#q=little+boat")
    elsewhere.wait_for_function("() => document.getElementById('shown').textContent.includes(' of ')")
    assert listed(elsewhere) == shown
    searched(page, "71", "1")
    assert listed(page)[0] == 71
    page.fill("#query", "<xyzzy>")
    page.click("text=Show all features")
    assert page.inner_text("#shown") == "4,096 features"
    assert page.input_value("#query") == ""


def test_a_brushed_plot_filters_the_list(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    page = open_page(tiny_site)
    drag(page, 0, 0.4, 0.6)
    chip = page.locator(".chip")
    low, high = [float(x) / 100 for x in re.findall(r"[\d.]+(?= %)", chip.inner_text())]
    kept = ((tiny_catalog.density >= low) & (tiny_catalog.density <= high)).sum()
    said = re.fullmatch(r"([\d,]+) of 4,096 features", page.inner_text("#shown"))
    assert said
    assert int(said[1].replace(",", "")) == pytest.approx(kept, rel=0.02)  # the chip's ends are rounded
    assert page.inner_text(".readout >> nth=0").endswith(f": {said[1]}")
    assert page.locator(".left").inner_text().startswith(said[0])
    assert page.input_value("[aria-label^='fires on: at least']") != ""
    drag(page, 1, 0.0, 0.5)
    assert chip.count() == 2
    both = int(page.inner_text("#shown").split(" of ")[0].replace(",", ""))
    assert 0 < both < int(said[1].replace(",", ""))
    assert tiny_catalog.score[listed(page)].max() <= 0.5
    chip.first.click()
    assert chip.count() == 1
    assert page.locator(".brush").nth(0).is_hidden()
    page.locator(".brushable").nth(1).click(position={"x": 300, "y": 20})  # beside the selection
    assert chip.count() == 0
    assert page.inner_text("#shown") == "4,096 features"


def test_the_page_with_the_keyboard_alone(
    open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog
) -> None:
    page = open_page(tiny_site)
    page.keyboard.press("/")
    page.keyboard.type("Jedi")
    page.wait_for_function("() => document.getElementById('shown').textContent.includes(' of ')")
    hits = [feature.index for feature in tiny_catalog.search("Jedi", limit=3)]
    for index in hits:
        page.keyboard.press("ArrowDown")
        page.wait_for_selector(f'#rows a[aria-current]:focus[href="#{index}"]')
    page.wait_for_function("index => document.title.startsWith(`#${index} `)", arg=hits[-1])
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#keys:not([open])", state="hidden")
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.getElementById('shown').textContent === '4,096 features'")
    page.evaluate("location.hash = ''")
    plot = page.locator(".brushable").first
    plot.focus()
    for key in ["ArrowRight"] * 20 + ["Shift+ArrowRight"] * 8:
        page.keyboard.press(key)
    assert ", selected " in (plot.get_attribute("aria-valuetext") or "")
    assert page.locator(".chip").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".chip").count() == 0


def test_sorted_by_what_is_chosen(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    page = open_page(tiny_site)
    for by, falling in (
        ("density", tiny_catalog.density),
        ("max", tiny_catalog.max_activation),
    ):
        page.select_option("#sort", by)
        first = listed(page)[:10]
        assert falling[first].tolist() == pytest.approx(sorted(falling.tolist(), reverse=True)[:10], rel=1e-2)
    page.click("#ranges summary")
    page.fill("[aria-label^='fires on: at most']", "0.01")
    assert page.locator(".chip").inner_text() == "fires on at most 0.0100 %"
    rare = (tiny_catalog.density <= 1e-4).sum()
    assert page.inner_text("#shown") == f"{rare} of 4,096 features"
    page.keyboard.press("Escape")
    page.click(".chip")
    page.click("#turn")
    first = listed(page)[:10]
    assert tiny_catalog.max_activation[first].tolist() == sorted(tiny_catalog.max_activation.tolist())[:10]


def test_colours_are_the_systems_until_chosen(open_page: OpenPage, tiny_site: Path) -> None:
    def paper(page: Page) -> int:
        rgb = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
        return sum(map(int, rgb[:3]))

    page = open_page(tiny_site, scheme="dark")
    assert paper(page) < 150
    page.click("#theme")
    assert paper(page) > 600
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert paper(page) > 600  # the choice stays
    page.click("#theme")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") is None
    assert paper(open_page(tiny_site, scheme="light")) > 600


def test_on_a_phone_list_and_views_take_turns(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, width=390, height=844)
    assert page.locator("#view").is_visible()
    assert page.locator("#browse").is_hidden()
    bar = page.locator("#places").bounding_box()
    assert bar
    assert bar["y"] + bar["height"] == 844  # under the thumb
    page.click("#places >> text=Features")
    page.wait_for_selector("#browse", state="visible")
    searched(page, "boat", "")
    page.wait_for_function("() => document.getElementById('shown').textContent.includes(' of ')")
    found, count = listed(page), page.inner_text("#shown")
    page.evaluate("document.getElementById('rows').scrollTop = 120")
    page.click(f'#rows a[href="#{found[6]}"]')
    page.wait_for_selector("#view h2", state="visible")
    assert page.locator("#browse").is_hidden()
    page.click("#places >> text=Features")
    page.wait_for_selector("#browse", state="visible")
    assert page.input_value("#query") == "boat"
    assert page.inner_text("#shown") == count
    page.wait_for_function("() => document.getElementById('rows').scrollTop > 0")
    for address in ("#", "#features", "#about"):
        page.evaluate("address => location.hash = address", address)
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
        assert page.evaluate(
            "(view => view.scrollWidth <= view.clientWidth)(document.getElementById('view'))"
        )


def test_24576_features(open_page: OpenPage, big_site: Path) -> None:
    page = open_page(big_site)
    assert page.inner_text("#shown") == "24,576 features"
    assert page.locator("#rows li").count() < 60
    page.evaluate("document.getElementById('rows').scrollTop = 1e9")
    page.wait_for_selector(f'#rows a[href="#{MANY - 1}"]')
    assert page.locator("#rows li").count() < 60
    drag(page, 0, 0.5, 0.55)
    kept = int(page.inner_text("#shown").split(" of ")[0].replace(",", ""))
    assert 0 < kept < MANY
    assert kept % (MANY // 4096) == 0  # every copy alike
    page.click("text=Show all")
    searched(page, "Jedi", "")
    page.wait_for_function("() => document.getElementById('shown').textContent.includes(' of 24,576')")
    assert len({index % 4096 for index in listed(page)[:6]}) == 1  # copies of one feature match equally well


def test_a_page_of_chosen_features(open_page: OpenPage, tiny_catalog: Catalog, tmp_path: Path) -> None:
    chosen = [feature.index for feature in tiny_catalog.search("Jedi", limit=3)]
    page = open_page(tiny_catalog.page(tmp_path / "chosen.html", features=chosen))
    assert page.inner_text("h2").startswith("3 of 4,080 patterns")
    assert page.inner_text("#shown") == "3 features"
    assert listed(page) == sorted(chosen)
    assert page.locator(".brushable").count() == 0
    other = next(i for i in range(len(tiny_catalog)) if i not in chosen)
    page.evaluate("address => location.hash = address", f"#{other}")
    assert page.inner_text("[role=alert]") == f"There is no feature {other} on this page."


def test_a_view_left_before_its_data_came_leaves_nothing_behind(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#about")
    assert page.evaluate("() => leaving.length") == 0
    for address, data in (("#map", "map"), ("#prompts", "prompts"), ("#7", "shard-0")):
        page.evaluate(
            """async ([address, data]) => {
                const value = await load(data);
                loaded.set(data, new Promise((resolve) => (window.come = () => resolve(value))));
                location.hash = address;
                await new Promise((turned) => addEventListener("hashchange", () => setTimeout(turned), { once: true }));
                location.hash = "#about";
                await new Promise((turned) => addEventListener("hashchange", () => setTimeout(turned), { once: true }));
                come();
                await new Promise((turned) => setTimeout(turned));
            }""",
            [address, data],
        )
        assert page.evaluate("() => leaving.length") == 0, address
        assert page.inner_text("h2") == "About this catalog"
        assert page.get_attribute("body", "data-view") == "about"


@pytest.mark.parametrize("width", [800, 1000])
def test_on_a_tablet_the_list_gives_way(open_page: OpenPage, tiny_site: Path, width: int) -> None:
    page = open_page(tiny_site, "#3900", width=width)
    share = page.evaluate("() => document.getElementById('view').offsetWidth / innerWidth")
    assert share > 0.6
    page.click("#ranges summary")
    for part in page.locator("#ranges p span, #rows .index, #ranges summary").all():
        assert part.evaluate(
            "part => part.scrollWidth <= part.clientWidth || getComputedStyle(part).display === 'inline'"
        )


def test_what_is_not_there_is_said(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site, "#9999")
    assert page.inner_text("[role=alert]") == "There is no feature 9999 in this catalog."
    for address in ("#<b>nowhere</b>", "#%E0%A4%A", "#play?prompt=hello"):
        page.evaluate("address => location.hash = address", address)
        page.wait_for_function("() => document.querySelector('[role=alert]').textContent.includes('no view')")
        assert page.locator("h2.grand").is_visible()


def test_names_and_coloured_text(open_page: OpenPage, tiny_site: Path) -> None:
    page = open_page(tiny_site)
    for label, name in {
        '" Jedi", " Sith"': "Jedi · Sith",
        'say one of "ate", "\\n", "  ", "", "\\""': 'say one of ate · ⏎ · ␣ · ∅ · "',
        'words after "the"': 'words after "the"',
        '"\\q", "not JSON"': '"\\q", "not JSON"',
    }.items():
        assert page.evaluate("label => readable(label)", label) == name
    page.evaluate(
        """() => document.getElementById("view").replaceChildren(
             tokenText([" A", "\\n", " <b>", " boat"], [0.5, 0, 2, 4], 4, { peak: 3 }))"""
    )
    assert page.inner_text("#view .text") == "A⏎ <b> boat"
    fires = page.locator("#view .fires")
    assert fires.all_inner_texts() == ["A", "<b>", "boat"]
    assert [fires.nth(i).get_attribute("data-activation") for i in range(3)] == ["0.500", "2.00", "4.00"]
    fires.nth(1).hover()
    shown = "token => getComputedStyle(token, '::after').content"
    assert fires.nth(1).evaluate(shown) == '"2.00"'
    assert fires.nth(0).evaluate(shown) == "none"
    page.locator("#view").focus()
    page.keyboard.press("Tab")
    page.wait_for_selector(".fires.strongest:focus")  # one stop per text, at its peak
    for i in (1, 0):
        page.keyboard.press("ArrowLeft")
        assert fires.nth(i).evaluate("token => token === document.activeElement")
    assert fires.nth(0).evaluate(shown) == '"0.500"'


def test_scripts_share_no_name() -> None:
    """Classic scripts share one scope: a second function of a name would silently take the place of the first."""
    index = (ASSETS / "index.html").read_text("utf-8")
    scripts = {path.name for path in assets() if path.suffix == ".js"}
    assert set(re.findall(r'<script src="([^"]+)"', index)) == scripts
    names = [
        name
        for script in sorted(scripts)
        for name in re.findall(
            r"^(?:async )?(?:function\*?|const|let|class) (\w+)", (ASSETS / script).read_text("utf-8"), re.M
        )
    ]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
