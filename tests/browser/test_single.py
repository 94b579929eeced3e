"""One file with a few features, as somebody finds it in a mail; and what data.js makes of the records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from saekit.catalog import Catalog, Feature
from saekit.catalog.page.data import SHARD
from saekit.catalog.page.records import ALPHABET, AROUND

if TYPE_CHECKING:
    from browser.conftest import OpenPage

FEW = [3900, 2443, 1406]


@pytest.fixture(scope="module")
def single(tiny_catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_catalog.page(tmp_path_factory.mktemp("mail") / "few.html", features=FEW)


def check_record(record: dict[str, Any], feature: Feature) -> None:
    for written, context in zip(record["contexts"], feature.contexts, strict=True):
        assert written["tokens"] == context.tokens
        assert (written["peak"], written["document"]) == (context.peak, context.document)
        firings = dict(zip(written["firings"][::2], written["firings"][1::2], strict=True))
        assert [firings.get(i, 0) for i in range(len(context.tokens))] == pytest.approx(
            context.activations, rel=5e-3
        )
    for (*_, contexts), band in zip(record["bands"], feature.bands, strict=True):
        assert [len(context["tokens"]) for context in contexts] == [
            min(AROUND, len(context.tokens)) for context in band.contexts
        ]
    counts = [count for *_, count in record["effects"]]
    assert [n for n in counts if n] == [b.count for b in feature.effects]
    assert record["effects"][0][0] == pytest.approx(feature.effects[0].low, rel=5e-3)
    assert record["effects"][-1][1] == pytest.approx(feature.effects[-1].high, rel=5e-3)


def test_records_arrive_as_they_were(open_page: OpenPage, tiny_site: Path, tiny_catalog: Catalog) -> None:
    page = open_page(tiny_site)
    assert page.evaluate("ALPHABET") == ALPHABET
    dead = int((tiny_catalog.density == 0).argmax())
    for index in (0, 2189, 4095):
        check_record(page.evaluate(f"record({index}, {SHARD})"), tiny_catalog[index])
    record = page.evaluate(f"record({dead}, {SHARD})")
    assert record["contexts"] == record["histogram"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_file_from_a_mail(open_page: OpenPage, single: Path, tiny_catalog: Catalog, width: int) -> None:
    page = open_page(single, width=width)
    shown = page.evaluate(
        "[...document.querySelectorAll('#rows a')].map((link) => link.getAttribute('href'))"
    )
    assert sorted(shown) == sorted(f"#{i}" for i in FEW)
    page.goto(f"{single.as_uri()}#{FEW[0]}")
    feature = tiny_catalog[FEW[0]]
    near = feature.neighbours[0].feature
    page.wait_for_function(f"document.title.startsWith('#{FEW[0]}')")
    text = page.inner_text("#view")
    assert "Jedi" in text
    assert str(near) in text
    for index in FEW:
        check_record(page.evaluate(f"record({index}, 1)"), tiny_catalog[index])
    order = sorted(FEW)  # from one to the next by number, in whatever order they were chosen
    page.evaluate("address => location.hash = address", f"#{order[1]}")
    page.wait_for_function(f"document.title.startsWith('#{order[1]}')")
    steps = [page.locator(f".steps [rel={rel}]").get_attribute("href") for rel in ("previous", "next")]
    assert steps == [f"#{order[0]}", f"#{order[2]}"]
    assert "holds no map" in page.evaluate("load('map').catch((error) => error.message)")


def test_the_search_of_a_file_finds_what_it_holds(open_page: OpenPage, single: Path) -> None:
    page = open_page(single, "#q=Jedi")
    page.wait_for_function("document.querySelectorAll('#rows a').length === 2")
    found = page.evaluate(
        "[...document.querySelectorAll('#rows a')].map((link) => link.getAttribute('href'))"
    )
    assert set(found) == {"#3900", "#1406"}
