"""The view of a feature, as a person reads it: from disk, with a pointer, with the keyboard alone, on a phone."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saekit.catalog import Catalog, Feature
from saekit.cli import main

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page
    from transformer_lens.model_bridge import TransformerBridge

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def jedi(tiny_catalog: Catalog) -> Feature:
    """A feature with a clear meaning and contexts longer than what stands around their peaks."""
    return tiny_catalog.search("Jedi")[0]


@pytest.fixture
def page(open_page: OpenPage, tiny_site: Path, jedi: Feature) -> Page:
    return open_page(tiny_site, f"#{jedi.index}")


def short(number: float) -> str:
    return f"{number:#.3g}"


def one_in(density: float) -> str:
    """As the page has it: from a density of three digits, to two."""
    return f"1 in {float(f'{1 / float(short(density)):.2g}'):,.0f} tokens"


def shown_value(token: Locator) -> str:
    """What floats above a token; "none" where nothing does."""
    return str(token.evaluate("e => getComputedStyle(e, '::after').content")).strip('"')


def peaks(page: Page) -> list[float]:
    return [float(text) for text in page.locator("#contexts .peak").all_inner_texts()]


def fits(page: Page) -> bool:
    """Whether nothing is wider than the screen, also inside the view, which cuts off what is."""
    wide = "e => e.scrollWidth <= e.clientWidth"
    return page.evaluate(f"({wide})(document.scrollingElement)") and page.locator("#view").evaluate(wide)


def test_a_feature_opened_from_disk(page: Page, jedi: Feature) -> None:
    text = page.inner_text("#view")
    assert page.title().startswith(f"#{jedi.index} ")
    assert page.get_attribute("#rows [aria-current]", "href") == f"#{jedi.index}"
    context = jedi.contexts[0]
    around = "".join(context.tokens[max(0, context.peak - 2) : context.peak + 3]).strip()
    assert around in text
    strongest = page.locator("#contexts .strongest").first
    assert strongest.get_attribute("data-activation") == short(context.max_activation)
    assert one_in(jedi.density) in text
    assert jedi.score is not None
    assert page.get_attribute(".head [role=meter]", "aria-valuenow") == f"{jedi.score:.2f}"
    assert page.inner_text(".head .how")  # how the score came about
    for found in (jedi.top_tokens[:5], jedi.logits_top, jedi.logits_bottom):
        assert all(t.token.replace(" ", "·") in text for t in found)
    for near in (*jedi.neighbours, *jedi.coactive):
        assert page.locator(f'.nears a[href="#{near.feature}"]').count() >= 1
    assert page.locator(".actions >> text=Steer").count() == 0  # nobody steers here


def test_the_activation_shows_under_the_pointer_and_to_the_keyboard(page: Page, jedi: Feature) -> None:
    context = next(c for c in jedi.contexts if sum(a > 0 for a in c.activations) > 1)
    line = page.locator("#contexts li").nth(jedi.contexts.index(context))
    page.click("text=whole contexts")
    strongest = line.locator(".strongest")
    assert shown_value(strongest) == "none"
    strongest.hover()
    assert shown_value(strongest) == short(context.max_activation)
    fires = [i for i, a in enumerate(context.activations) if a > 0]
    step = -1 if fires[-1] == context.peak else 1
    strongest.focus()
    page.keyboard.press("ArrowRight" if step == 1 else "ArrowLeft")
    beside = context.activations[fires[fires.index(context.peak) + step]]
    assert page.evaluate("document.activeElement.dataset.activation") == short(beside)
    assert shown_value(page.locator(":focus")) == short(beside)


def test_bands_show_one_part_of_its_range_each(page: Page, jedi: Feature) -> None:
    bands = page.locator(".ruler [role=tab]")
    assert bands.count() == len(jedi.bands)
    for i, band in enumerate(jedi.bands):
        bands.nth(i).click()
        assert bands.nth(i).get_attribute("aria-selected") == "true"
        assert peaks(page) == pytest.approx([c.max_activation for c in band.contexts], rel=1e-2)
        assert f"from {short(band.low)} to".replace("0.00", "0") in page.inner_text("#contexts .caption")
    page.click("role=tab[name='Whole range']")
    assert page.locator(".counts .beyond").count() == 0
    every = [c.max_activation for band in reversed(jedi.bands) for c in band.contexts]
    assert peaks(page) == pytest.approx(every, rel=1e-2)
    page.keyboard.press("ArrowLeft")  # the tabs are one stop, the arrows go between them
    assert peaks(page)[0] == pytest.approx(jedi.contexts[0].max_activation, rel=1e-2)
    page.keyboard.press("End")
    assert bands.last.get_attribute("aria-selected") == "true"
    page.keyboard.press("]")
    page.wait_for_function("i => location.hash === `#${i}`", arg=jedi.index + 1)
    page.wait_for_selector(f".number:text-is('Feature {jedi.index + 1}')")
    assert bands.last.get_attribute("aria-selected") == "true"  # kept, to compare features


def test_long_contexts_are_cut_around_their_peak(page: Page, jedi: Feature) -> None:
    at = next(i for i, c in enumerate(jedi.contexts) if len("".join(c.tokens[c.peak + 1 :])) > 200)
    line, whole = page.locator("#contexts li").nth(at), "".join(jedi.contexts[at].tokens)
    cut = line.inner_text()
    assert len(cut) < len(whole)
    assert line.locator(".strongest").is_visible()
    line.locator("text=…").last.click()
    assert whole.strip().replace("\n", "⏎") in line.inner_text()
    page.click("#contexts button.more")
    assert len(peaks(page)) == len(jedi.contexts)


def test_the_histogram_says_what_its_bars_stand_for(page: Page, jedi: Feature) -> None:
    plot = page.locator(".counts").first
    bars, said = plot.locator("span"), page.locator(".feature .readout").first
    fullest = max(range(len(jedi.histogram)), key=lambda i: jedi.histogram[i].count)
    for i in (0, fullest):
        bars.nth(i).hover()
        b = jedi.histogram[i]
        assert said.inner_text().startswith(f"{short(b.low)} to {short(b.high)}: {b.count:,} token")
    page.mouse.move(0, 0)
    assert "log scale" in said.inner_text()
    page.keyboard.press("Tab")
    plot.focus()
    page.keyboard.press("Home")
    assert str(plot.get_attribute("aria-valuetext")).startswith(f"{short(jedi.histogram[0].low)} to ")
    page.keyboard.press("Enter")  # shows the contexts of that part of the range
    assert page.locator(".ruler [role=tab]").first.get_attribute("aria-selected") == "true"
    assert plot.locator(".beyond").count() > 0
    low, high = (page.locator(".counts").nth(1).locator("span").nth(i) for i in (0, -1))
    high.hover()
    readout = page.locator(".feature .readout").nth(1)
    assert f"to +{short(jedi.effects[-1].high)}" in readout.inner_text()
    low.hover()
    assert f"−{short(-jedi.effects[0].low)} to" in readout.inner_text()


def test_what_the_page_says_to_type_runs(
    page: Page,
    jedi: Feature,
    model: TransformerBridge,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("saekit.load_model", {"tiny": model}.__getitem__)  # loaded once for all tests
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    python, command = page.locator(".recipes .copyable").all()
    python.locator("button").click()
    python.locator("button >> text=Copied").wait_for()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == python.locator("pre").inner_text()
    exec(compile(code, "the page", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out
    program, *arguments = shlex.split(command.locator("pre").inner_text())
    assert program == "saekit"
    assert main(arguments) == 0
    assert "Once upon a time" in capsys.readouterr().out
    page.click("text=Copy link")
    page.locator(".actions >> text=copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    assert page.url.endswith(f"#{jedi.index}")


def test_the_way_to_a_neighbour_and_back(page: Page, jedi: Feature, tiny_catalog: Catalog) -> None:
    near = tiny_catalog[jedi.neighbours[0].feature]
    link = page.locator(f'.nears a[href="#{near.index}"]').first
    link.hover()
    glimpse = page.locator(".glimpse")
    glimpse.wait_for()
    assert near.contexts[0].tokens[near.contexts[0].peak].strip() in glimpse.inner_text()
    page.mouse.move(0, 0)
    glimpse.wait_for(state="detached")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f".number:text-is('Feature {near.index}')")
    assert one_in(near.density) in page.inner_text(".figures")
    page.go_back()
    page.wait_for_selector(f".number:text-is('Feature {jedi.index}')")


def test_the_keyboard_alone(page: Page, jedi: Feature) -> None:
    for key, index in (("]", jedi.index + 1), ("[", jedi.index), ("[", jedi.index - 1)):
        page.keyboard.press(key)
        page.wait_for_selector(f".number:text-is('Feature {index}')")
    page.focus("#view")
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[role=tab], .fires, .counts, .unfold, .copyable button, .nears a') && document.activeElement.className + document.activeElement.getAttribute('role')"))  # fmt: skip
    assert any("tab" in r for r in reached if r)
    assert any("fires" in r for r in reached if r)
    page.fill("#query", "[")  # typed there it is a letter
    assert page.url.endswith(f"#{jedi.index - 1}")


def test_a_feature_that_never_fired(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    dead = tiny_catalog[int((tiny_catalog.density == 0).argmax())]
    page = open_page(tiny_site, f"#{dead.index}")
    text = page.inner_text("#view")
    assert "It never fired on the 800,913 tokens of this corpus" in text
    assert page.locator("[role=tab], .figures, [role=meter]").count() == 0
    assert all(t.token.replace(" ", "·") in text for t in dead.logits_top)
    assert f'Catalog.open("tiny")[{dead.index}]' in text


def test_attention_sinks_and_neurons_are_shown(page: Page, jedi: Feature) -> None:
    page.evaluate(
        """async (index) => {
            const [overview, features] = await Promise.all([load("overview"), load("features")]);
            const found = await record(index, overview.shard);
            found.contexts[0].sink = found.contexts[1].sink = true;
            found.neurons = [[17, -0.5]];
            document.getElementById("view").replaceChildren(...featureView({ overview, features }, index, found));
        }""",
        jedi.index,
    )
    assert page.locator("#contexts li >> text=attention sink").count() == 2
    assert "2 of these are at attention sinks" in page.inner_text("#contexts .caption")
    assert page.locator("tr:has-text('neuron 17')").inner_text().split()[-1] == "−0.500"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page: OpenPage, tiny_site: Path, jedi: Feature, scheme: str) -> None:
    page = open_page(tiny_site, f"#{jedi.index}", width=390, height=844, scheme=scheme)
    assert fits(page)
    page.click("text=whole contexts")
    assert fits(page)
    token = page.locator("#contexts .strongest").first
    token.tap()
    assert shown_value(token) == short(jedi.max_activation)
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    red = [int(colour.split("(")[1].split(",")[0]) for colour in (ink, paper)]
    assert (red[0] > red[1]) == (scheme == "dark")
    page.click("text=All features")
    page.wait_for_selector("#rows a >> visible=true")
