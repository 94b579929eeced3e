"""The static page: its files, what hostile text does to them, and what a browser shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import saekit
from saekit.catalog import Catalog
from saekit.catalog.page import ASSETS, assets
from saekit.catalog.page_data import SHARD, PageData
from saekit.catalog.tables import write_table
from saekit.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page with")

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "javascript:alert(1)",
    "\u202eright to left\u2066",
    "line\u2028and paragraph\u2029",
    "\x1b[31mred\x1b[0m\x00",
    "&lt;b&gt;",
    "zero\u200bwidth\ufeff",
    "שלום 😀",
]


@pytest.fixture(scope="module")
def catalog(model: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """A random SAE over lines that each say one thing; wider than one shard."""
    sae = saekit.SAE.new("topk", d_in=256, d_sae=96, k=8, site="blocks.3.hook_resid_pre", model="tiny")
    lines = [f"The small boat number {i} sailed past the harbour with a red lamp." for i in range(20)]
    folder = tmp_path_factory.mktemp("page") / "catalog"
    return Catalog.build(model, sae, saekit.tokenize(lines, model, 32), folder)


@pytest.fixture(scope="module")
def page(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return catalog.page(tmp_path_factory.mktemp("written") / "site")


@pytest.fixture(scope="module")
def hostile(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The catalog with a vocabulary, labels and explanations that try to leave their place."""
    folder = tmp_path_factory.mktemp("hostile") / "catalog"
    shutil.copytree(catalog.path, folder)
    n = catalog.table("vocabulary").num_rows
    tokens = [f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(n)]
    write_table(folder, "vocabulary", {"token_id": np.arange(n), "token": tokens})
    features = catalog.table("features").to_pydict()
    features["label"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(catalog))]
    write_table(folder, "features", features)
    n = len(catalog)
    said = {"feature": np.arange(n), "method": ["<b>judge</b>"] * n, "model": [""] * n, "prompt": [""] * n}
    write_table(folder, "explanations", {**said, "text": features["label"]})
    return Catalog.open(folder)


def value(script: str) -> Any:
    """What a data script hands to `receive`."""
    found = re.fullmatch(r'receive\("[\w-]+", (.*)\);\n', script, re.DOTALL)
    assert found
    return json.loads(found[1])


def dom(page: Path, address: str = "") -> str:
    """The document as chromium shows it after its scripts have run."""
    profile = page.parent / "profile"
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", f"--user-data-dir={profile}",
        "--window-size=1200,800", "--virtual-time-budget=5000", "--dump-dom", f"file://{page}/index.html{address}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def listed(markup: str) -> list[int]:
    """The features whose rows are in the document, from the top."""
    rows = markup[markup.index('id="rows"') : markup.index('id="view"')]
    return [int(n) for n in re.findall(r'href="#(\d+)"', rows)]


def test_records_are_the_catalogs(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    around = 6  # less than the lines of this catalog
    monkeypatch.setattr("saekit.catalog.page_data.AROUND", around)
    data = PageData(catalog)
    features = value(data.script("features"))
    assert features["density"] == pytest.approx(catalog.density.tolist(), rel=1e-2)
    assert features["max"] == pytest.approx(catalog.max_activation.tolist(), rel=1e-2)
    for index in (0, SHARD - 1, SHARD, len(catalog) - 1):
        shard = value(data.script(f"shard-{index // SHARD}"))
        record, feature = shard["features"][index % SHARD], catalog[index]
        contexts = [[shard["tokens"][i] for i in context["tokens"]] for context in record["contexts"]]
        assert contexts == [context.tokens for context in feature.contexts]
        for written, context in zip(record["contexts"], feature.contexts, strict=True):
            firings = dict(zip(written["firings"][::2], written["firings"][1::2], strict=True))
            assert [firings.get(i, 0) for i in range(len(context.tokens))] == pytest.approx(
                context.activations, rel=1e-2
            )
            assert written["peak"] == context.peak
        assert [row[0] for row in record["tokens"]] == [t.token for t in feature.top_tokens]
        assert [row[0] for row in record["raised"]] == [t.token for t in feature.logits_top]
        assert [row[0] for row in record["neighbours"]] == [n.feature for n in feature.neighbours]
        assert [row[0] for row in record["coactive"]] == [n.feature for n in feature.coactive]
        for written, band in zip(record["bands"], feature.bands, strict=True):
            assert written[:3] == pytest.approx([band.low, band.high, band.share], rel=1e-2)
            for shown, context in zip(written[3], band.contexts, strict=True):
                assert len(shown["tokens"]) == min(around, len(context.tokens))
                at = context.peak - shown["peak"]
                tokens = [shard["tokens"][i] for i in shown["tokens"]]
                assert tokens == context.tokens[at : at + around]
                firings = dict(zip(shown["firings"][::2], shown["firings"][1::2], strict=True))
                assert firings[shown["peak"]] == pytest.approx(context.max_activation, rel=1e-2)
                assert sorted(firings) == [
                    i for i, a in enumerate(context.activations[at : at + around]) if a
                ]
        assert sum(row[2] for row in record["histogram"]) == sum(b.count for b in feature.histogram)


@pytest.mark.parametrize(
    "name", ["", "shard-2", "shard--1", "shard-01", "../../catalog", "overview.js", "search\0"]
)
def test_unknown_data_files(catalog: Catalog, name: str) -> None:
    with pytest.raises(UnknownName):
        PageData(catalog).script(name)


def test_the_page_is_whole_and_names_no_place(catalog: Catalog, page: Path) -> None:
    written = {path.name for path in page.iterdir()}
    assert written == {asset.name for asset in assets()} | {"data"}
    assert {path.stem for path in (page / "data").iterdir()} == set(PageData(catalog).names())
    for path in page.rglob("*.js"):
        assert str(catalog.path.parent) not in path.read_text("utf-8")


def test_nothing_inline_nothing_from_elsewhere_nothing_as_markup() -> None:
    index = (ASSETS / "index.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', index)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src=)", index)
    for asset in assets():
        text = asset.read_text("utf-8")
        assert not re.search(r"https?:|//\w+\.", text), f"{asset.name} asks another host"
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text
        )


def test_hostile_text_stays_data(hostile: Catalog) -> None:
    data = PageData(hostile)
    for name in data.names():
        script = data.script(name)
        assert script.isascii()
        assert "<" not in script
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", script)
        value(script)
    assert value(data.script("features"))["label"][: len(HOSTILE)] == HOSTILE


def test_an_earlier_page_is_replaced_and_nothing_else(catalog: Catalog, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert catalog.page(site) == site
    (site / "data" / "shard-99.js").write_text("old")
    catalog.page(str(site))
    assert not (site / "data" / "shard-99.js").exists()
    (site / "CNAME").write_text("example.org")
    with pytest.raises(InvalidInput, match="CNAME"):
        catalog.page(site)
    assert (site / "CNAME").exists()
    (tmp_path / "empty").mkdir()
    catalog.page(tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("<p>somebody's own page")
    with pytest.raises(InvalidInput, match="other files"):
        catalog.page(other)
    with pytest.raises(InvalidInput, match="is a file"):
        catalog.page(other / "index.html")


def test_a_page_that_fails_leaves_no_trace(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.page(tmp_path / "site")
    before = (tmp_path / "site" / "data" / "features.js").read_bytes()

    def break_down(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(PageData, "script", break_down)
    for folder in ("site", "new"):
        with pytest.raises(OSError, match="no space"):
            catalog.page(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (tmp_path / "site" / "data" / "features.js").read_bytes() == before


@needs_chromium
def test_a_feature_opened_from_disk(catalog: Catalog, page: Path) -> None:
    feature = max(catalog, key=lambda feature: feature.density)
    shown = dom(page, f"#{feature.index}")
    text = text_of(shown)
    assert f"<title>#{feature.index} " in shown
    assert 'aria-current="true"' in shown
    context = feature.contexts[0]
    assert "".join(context.tokens).strip() in text
    assert f'data-activation="{context.max_activation:#.3g}"' in shown
    assert f'saekit.Catalog.open("catalog")[{feature.index}]' in text
    assert f"saekit steer catalog {feature.index} " in text
    for near in feature.neighbours[:3]:
        assert f'href="#{near.feature}"' in shown
    assert "Try it" not in text  # no server, no steering
    assert "There is no feature 9999" in text_of(dom(page, "#9999"))


@needs_chromium
def test_search_in_the_page_is_search_in_the_catalog(catalog: Catalog, page: Path) -> None:
    hits = [feature.index for feature in catalog.search("harbour", limit=len(catalog))]
    shown = dom(page, "#q=harbour")
    assert listed(shown)[:3] == hits[:3]
    assert set(listed(shown)) <= set(hits)
    assert f"{len(hits)} of {len(catalog)}" in text_of(shown)
    assert listed(dom(page, "#q=71"))[0] == 71
    assert "No feature fits." in dom(page, "#q=<xyzzy>")


@needs_chromium
def test_hostile_text_shows_literally(hostile: Catalog, tmp_path: Path) -> None:
    page = hostile.page(tmp_path / "site")
    feature = max(hostile, key=lambda feature: len(feature.contexts))
    shown = dom(page, f"#{feature.index}")
    text = text_of(shown.split("<body", 1)[1])
    assert "<title>owned" not in shown
    assert shown.count("<script") == sum(asset.suffix == ".js" for asset in assets())
    assert "<img" not in shown
    for literal in (
        "</script><script>",
        "\\u202eright to left",
        "\\u2028and",
        "\\x1b[31mred",
        "zero\\u200bwidth",
        "&lt;b&gt;",
    ):
        assert literal in text, literal
    for character in "\u202e\u2066\u2028\x1b\x00\u200b":
        assert character not in shown
