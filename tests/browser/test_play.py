"""The playground, with the embedded catalog and model behind it, as a person uses it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

import saekit
from saekit.steering.kinds import UNITS, WITHOUT_STRENGTH

if TYPE_CHECKING:
    from playwright.sync_api import Page, Request, Route
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Catalog
    from tests.browser.conftest import OpenPage

pytest.importorskip("starlette", reason="the extra saekit[server] is not installed")
pytest.importorskip("uvicorn", reason="the extra saekit[server] is not installed")

PROMPT = "Mike pulls out his"
JEDI = 3900  # catalog.search("Jedi")[0]
READY = "text ready:"


@pytest.fixture(scope="module")
def playground(tiny_catalog: Catalog, model: TransformerBridge) -> Iterator[str]:
    """The address of a server with the embedded catalog and its model."""
    import uvicorn

    from saekit.server.routes import application

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            application(tiny_catalog, model, port), log_level="critical", proxy_headers=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(10)


def state(*edits: str, **changes: Any) -> str:
    """An address, with few tokens so that an answer is quick."""
    asked = {"prompt": PROMPT, "tokens": 5, **changes}
    return "#play?" + urlencode([*asked.items(), *(("edit", edit) for edit in edits)])


def ready(page: Page) -> None:
    page.get_by_text(READY).wait_for()


def texts(page: Page) -> dict[str, str]:
    """What each side says after the prompt."""
    sides = ("plain", "steered", "control")
    said = {side: page.locator(f".side.{side} .text") for side in sides}
    prompt = {side: page.locator(f".side.{side} .text .prompt") for side in sides}
    return {
        side: said[side].inner_text().removeprefix(prompt[side].inner_text())
        for side in sides
        if said[side].count()
    }


def python_of(page: Page) -> str:
    return page.locator(".copyable", has_text="Python").locator("pre").inner_text()


def asked(page: Page, path: str) -> list[dict[str, Any]]:
    """The questions that the page asks from now on, as they come."""
    found: list[dict[str, Any]] = []

    def heard(request: Request) -> None:
        if request.url.endswith(path):
            found.append(json.loads(request.post_data or ""))

    page.on("request", heard)
    return found


def test_the_kinds_and_units_are_those_of_steering(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, "#about")
    kinds = page.evaluate("() => KINDS")
    assert {kind: set(found["units"]) for kind, found in kinds.items()} == {
        kind: set(units) for kind, units in UNITS.items() if kind != "swap"
    }
    assert {kind for kind, found in kinds.items() if found.get("bare")} == {*WITHOUT_STRENGTH} - {"swap"}


def test_first_steered_text_with_one_key(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, "#play")
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    assert page.locator(".edit").count() == 1
    assert not page.locator(".side").count()  # nothing is asked before the reader asks
    page.get_by_role("button", name="Copy link").click()
    page.wait_for_url(re.compile("#play.prompt=Mike.*edit=2189:add:0.3:norm"))
    page.get_by_label("new tokens").fill("12")
    page.evaluate("() => document.activeElement.blur()")  # the key needs no focus
    assert page.locator("[data-state=idle]").count() == 1
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[data-state=done]")
    said = texts(page)
    assert "Star" in said["steered"], said
    assert "Star" not in said["plain"], said
    assert page.locator(".side.steered .same").count()  # quieter, since the plain text has them too
    assert page.locator(".side.steered .text span:not(.same, .prompt)").count()
    assert page.locator(".chances tr").count() > 5
    assert "KL" in page.locator(".outcome").inner_text()


def test_the_python_does_what_the_page_showed(
    open_page: OpenPage, playground: str, model: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, like the served one: in bfloat16 a batch's shape decides near ties."""
    monkeypatch.setattr(saekit, "load_model", {"tiny": model}.__getitem__)
    edits = (f"{JEDI}:add:0.4:norm", "2189:clamp:3:max", "12:ablate:0:raw:off")
    page = open_page(playground, state(*edits, seed=7, control="on", at="generated", temperature="0.8"))
    ready(page)
    code, shown = python_of(page), texts(page)
    known: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "the page's Python", "exec"), known)
    assert "ablate" not in code
    assert shown["plain"].strip()
    assert shown["plain"] != shown["steered"] != shown["control"]
    for side, text in (
        ("plain", known["side"].plain),
        ("steered", known["side"].steered),
        ("control", known["control"].steered),
    ):
        assert shown[side].strip() == text.removeprefix(PROMPT).strip().replace("\n", "⏎"), side


def test_a_link_restores_the_whole_state(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, "#play")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prompt = '<b>50% of "R&D" + é = #1?</b>'
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("new tokens").fill("4")
    page.get_by_label("seed").first.fill("11")
    page.get_by_label("acting").select_option("generated")
    page.get_by_label("as I change things").uncheck()
    page.locator(".edit select").nth(0).select_option("clamp")
    page.get_by_label(re.compile("as a number")).fill("4.5")
    page.get_by_role("button", name="Steer", exact=True).click()
    ready(page)
    page.get_by_role("button", name="Copy link").click()
    page.get_by_text("Copied").wait_for()
    link = page.evaluate("() => navigator.clipboard.readText()")
    other = open_page(playground, link.removeprefix(f"{playground}/"))
    ready(other)
    assert texts(other) == texts(page)
    assert python_of(other) == python_of(page)
    assert other.get_by_label("Prompt", exact=True).input_value() == prompt
    assert other.get_by_label("acting").input_value() == "generated"
    assert not other.get_by_label("as I change things").is_checked()
    assert other.evaluate("() => location.href") == link


def test_a_malformed_state_is_ignored_field_by_field(open_page: OpenPage, playground: str) -> None:
    wrong = [
        "999999:add:1:norm",
        "x",
        "",
        "12:nonsense:abc:furlong",
        "13:cap:1e99:max",
        "14:__proto__:2:raw:off",
    ]
    page = open_page(
        playground,
        state(
            *wrong, at="toString", tokens="-3", temperature="hot", seed="1.5", control="maybe", more="less"
        ),
    )
    page.locator(".edit").nth(2).wait_for()
    found = page.evaluate(
        "() => Promise.all([load('overview'), load('features')]).then(([overview, features]) => "
        "playState(location.hash.split('?')[1], { overview, features }))"
    )
    edits = [(e["feature"], e["kind"], e["unit"], e["on"]) for e in found["edits"]]
    assert edits == [(12, "add", "norm", True), (13, "cap", "norm", True), (14, "add", "raw", False)]
    assert (found["positions"], found["tokens"], found["temperature"], found["seed"]) == ("all", 30, 1, 0)
    assert (found["control"], found["live"], found["prompt"]) == (False, True, PROMPT)


def test_features_of_a_token_are_added_and_taken_away_by_keyboard(
    open_page: OpenPage, playground: str
) -> None:
    page = open_page(playground, "#play")
    tokens = page.locator(".tokens button")
    tokens.nth(3).wait_for()
    tokens.nth(0).focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert tokens.nth(3).get_attribute("aria-pressed") == "true"
    first = page.locator(".on-token li").first
    index, activation = first.locator(".index").inner_text(), first.locator(".bar").inner_text()
    first.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert page.locator(".edit .index").all_inner_texts()[1] == index
    assert page.evaluate("() => document.activeElement.ariaLabel") == f"strength of feature {index}"
    page.get_by_label("coloured by").select_option(index)
    assert tokens.nth(3).get_attribute("title") == activation
    page.get_by_label("Find a feature to add").fill("Jedi")
    page.keyboard.press("Enter")
    page.locator(".edit").nth(2).wait_for()
    assert page.locator(".edit .index").nth(2).inner_text() == str(JEDI)
    page.get_by_role("button", name=f"Remove feature {index}").focus()
    page.keyboard.press("Enter")
    assert page.locator(".edit .index").all_inner_texts() == ["2189", str(JEDI)]
    assert f"catalog[{JEDI}].add" in python_of(page)
    assert f"catalog[{index}]" not in python_of(page)


def test_a_slider_runs_again_and_ends_what_ran_before(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, state("2189:add:0.3:norm", tokens=120))
    page.get_by_text("Writing").wait_for()
    ended: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.url))
    questions = asked(page, "api/stream")
    page.get_by_label("new tokens").fill("3")
    slider = page.get_by_role("slider")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    ready(page)
    assert [url.removeprefix(playground) for url in ended[:1]] == ["/api/stream"]  # the long one
    assert questions[-1]["edits"][0]["strength"] == 0.35
    assert questions[-1]["max_new_tokens"] == 3
    assert len(questions) < 6, "every change asked, none waited for the next"
    page.wait_for_url(re.compile(r"edit=2189:add:0\.35:norm"))


def test_stop_keeps_what_is_written(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, state("2189:add:0.3:norm", tokens=200))
    page.locator(".side.steered .text span").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert page.locator("[data-state=idle]").count() == 1
    assert texts(page)["steered"].strip()
    assert not page.get_by_role("button", name="Stop").count()


def test_who_waits_is_told_how_many_are_before(open_page: OpenPage, playground: str) -> None:
    first, second = open_page(playground, "#play"), open_page(playground, "#play")
    for page, tokens in ((first, "240"), (second, "3")):
        page.get_by_label("new tokens").fill(tokens)
        page.keyboard.press("Control+Enter")
        page.get_by_text("Writing" if page is first else "Waiting: 1 before you.").wait_for()
    first.evaluate("() => { location.hash = '#about' }")  # whoever leaves the view ends the answer
    ready(second)


def test_the_server_s_words_stand_where_they_belong(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, state("2189:add:0.3:norm", f"{JEDI}:add:1:norm:off", "12:add:1:norm"))
    ready(page)

    def refuse(words: str) -> None:
        def answer(route: Route) -> None:
            route.fulfill(status=200, body=json.dumps({"event": "error", "error": words}) + "\n")

        page.unroute_all()
        page.route("**/api/stream", answer)
        page.keyboard.press("Control+Enter")

    page.get_by_label("Prompt", exact=True).focus()
    for words, place in (
        ("edits.1.unit: not a unit", page.locator(".edit").nth(2)),
        ("prompt: 600 tokens and 5 new ones do not fit", page.locator(".asking section").nth(0)),
        ("max_new_tokens: too many", page.locator(".asking section", has_text="temperature")),
        ("the line is full <b>now</b>", page.locator(".answer > .error")),
    ):
        refuse(words)
        page.get_by_text(words).wait_for()
        assert words in place.inner_text()
        assert page.locator(".error:visible").count() == 1
        assert page.locator("[data-state=failed]").count() == 1


def test_a_sweep_marks_the_knee_and_sets_the_strength(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, state("2189:add:0.3:norm", tokens=3, live="off"))
    ready(page)
    page.get_by_role("button", name="Try its strengths").click()
    page.get_by_text(re.compile("Suggested|No strength here")).wait_for()
    points = page.locator(".point")
    assert points.count() == 8
    assert page.locator("circle.steered").count() == 16
    assert page.locator("circle.control").count() == 16
    points.nth(5).focus()
    strength = points.nth(5).get_attribute("data-strength")
    assert f"{strength}: perplexity" in page.locator(".readout").inner_text()
    page.keyboard.press("Enter")
    assert page.get_by_label(re.compile("as a number")).input_value() == strength
    assert points.nth(5).get_attribute("aria-pressed") == "true"
    page.wait_for_url(re.compile(f"edit=2189:add:{strength}:norm"))


def test_a_feature_leads_here_and_a_phone_shows_it(open_page: OpenPage, playground: str) -> None:
    page = open_page(playground, f"#{JEDI}", width=390, height=844)
    page.get_by_role("link", name="Steer with it").first.click()
    ready(page)
    assert page.locator(".edit .index").all_inner_texts() == [str(JEDI)]
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    assert page.evaluate("() => document.querySelector('main').scrollWidth") <= 390
    steer = page.get_by_role("button", name="Steer", exact=True)
    for end in (0, 1e6):  # within reach from everywhere, and over nothing that cannot be scrolled away
        page.evaluate("top => document.querySelector('main').scrollTop = top", end)
        box = steer.bounding_box()
        assert box
        assert 0 < box["y"] < 844 - box["height"] - 50
    last, bar = page.locator(".answer pre").bounding_box(), page.locator(".going").bounding_box()
    assert last
    assert bar
    assert last["y"] + last["height"] < bar["y"]
