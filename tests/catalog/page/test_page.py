"""The static page: its files, whole or in one, and what hostile text does to them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
from catalog.page.hostile import HOSTILE, hostile_copy

import saekit
from saekit.catalog import Catalog
from saekit.catalog.explain import note
from saekit.catalog.page import ASSETS, assets
from saekit.catalog.page.data import SHARD, PageData
from saekit.cli import main
from saekit.errors import InvalidInput, UnknownFeature, UnknownName

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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
    return hostile_copy(catalog, tmp_path_factory.mktemp("hostile") / "catalog")


@pytest.fixture(autouse=True)
def no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying out takes seconds and is tested for itself; the page of the fixture above has a real one."""
    monkeypatch.setattr("saekit.catalog.page.layout.layout_of", lambda catalog: ([0] * len(catalog),) * 2)


def value(script: str) -> Any:
    """What a data script hands to `receive`."""
    found = re.fullmatch(r'receive\("[\w-]+", (.*)\);\n', script, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_columns_of_the_list(catalog: Catalog) -> None:
    features = value(PageData(catalog).script("features"))
    assert features["label"] == [feature.explanation or "" for feature in catalog]
    assert features["density"] == pytest.approx(catalog.density.tolist(), rel=5e-3)
    assert features["max"] == pytest.approx(catalog.max_activation.tolist(), rel=5e-3)
    scores = [feature.score for feature in catalog]
    assert [x is None for x in features["score"]] == [x is None for x in scores]
    told = [(x, y) for x, y in zip(features["score"], scores, strict=True) if y is not None]
    assert [x for x, _ in told] == pytest.approx([y for _, y in told], abs=5e-3)


def test_every_shard_holds_its_features(catalog: Catalog) -> None:
    data = PageData(catalog)
    shards = [value(data.script(name)) for name in data.names() if name.startswith("shard-")]
    assert [len(shard["features"]) for shard in shards] == [SHARD] * 9 + [6]
    records = [record for shard in shards for record in shard["features"]]
    assert [[row[0] for row in record["neighbours"]] for record in records] == [
        [near.feature for near in feature.neighbours] for feature in catalog
    ]


@pytest.mark.parametrize(
    "name", ["", "shard-10", "shard--1", "shard-01", "shard-1\n", "../../catalog", "overview.js", "search\0"]
)
def test_unknown_data_files(catalog: Catalog, name: str) -> None:
    with pytest.raises(UnknownName):
        PageData(catalog).script(name)


def test_the_page_is_whole_and_names_no_place(catalog: Catalog, page: Path) -> None:
    written = {path.name for path in page.iterdir()}
    assert written == {asset.name for asset in assets()} | {"data"}
    assert {path.stem for path in (page / "data").iterdir()} == set(PageData(catalog).names())
    places = value((page / "data" / "map.js").read_text())
    assert (
        [x is None for x in places["x"]]
        == [y is None for y in places["y"]]
        == (catalog.density == 0).tolist()
    )
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
        text = asset.read_text("utf-8").replace('"http://www.w3.org/2000/svg"', "")  # a name, not an address
        if asset.suffix != ".html":  # nothing that would end it where it stands inside of a single file
            assert not re.search(r"</(script|style)|<!--", text, re.IGNORECASE), asset.name
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
    (site / "about.js").write_text("of an earlier version")
    catalog.page(str(site))
    assert not (site / "data" / "shard-99.js").exists()
    assert not (site / "about.js").exists()
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
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(InvalidInput, match="is a file"):
        catalog.page(tmp_path / "plain")


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


# Live


def test_what_every_visit_asks_for_is_made_once_and_again_when_somebody_has_written(
    catalog: Catalog, tmp_path: Path
) -> None:
    folder = tmp_path / "catalog"
    shutil.copytree(catalog.path, folder)
    own = Catalog.open(folder)
    data = PageData(own, live={"text": 9})
    lay = Mock(wraps=data._makers["map"])
    data._makers["map"] = lay
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(data.script, ["map"] * 8))) == 1
    before = data.script("features"), data.script("map"), data.script("shard-0")
    assert data.script("features") is before[0]
    note(own, 3, "a word from a person", author="somebody")
    label = value(data.script("features"))["label"]
    assert label[3] == "a word from a person"
    said = value(data.script("shard-0"))["features"][3]["explanations"]
    assert ["note", "a word from a person"] in [row[:2] for row in said]
    assert data.script("map") is before[1]
    assert lay.call_count == 1


# One file


def test_who_waits_for_the_map_keeps_no_other_waiting(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(catalog: Catalog) -> tuple[list[int], list[int]]:
        begun.set()
        assert go_on.wait(30)
        return [0] * len(catalog), [0] * len(catalog)

    monkeypatch.setattr("saekit.catalog.page.layout.layout_of", slow)
    data = PageData(catalog)
    with ThreadPoolExecutor(2) as pool:
        drawn = pool.submit(data.script, "map")
        try:
            assert begun.wait(30)
            assert value(pool.submit(data.script, "overview").result(timeout=30))["map"]
            assert not drawn.done()
        finally:
            go_on.set()
        assert value(drawn.result())["x"] == [0] * len(catalog)


@pytest.fixture
def chosen(catalog: Catalog) -> list[int]:
    """Some features that fire, not in order."""
    return np.argsort(-catalog.density)[[3, 0, 5]].tolist()


def inline(page: Path) -> tuple[list[str], list[str]]:
    """(scripts, styles) in a file."""
    text = page.read_text("utf-8")
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL), re.findall(
        r"<style>(.*?)</style>", text, re.DOTALL
    )


def test_a_file_holds_the_chosen_features(catalog: Catalog, chosen: list[int], tmp_path: Path) -> None:
    file = catalog.page(tmp_path / "few.html", features=[*chosen, chosen[0]])
    assert file == tmp_path / "few.html"
    assert [path.name for path in tmp_path.iterdir()] == ["few.html"]
    scripts, _ = inline(file)
    data = {m[1]: value(s) for s in scripts if (m := re.match(r'receive\("([\w-]+)", ', s))}
    assert set(data) == {"overview", "features", "search", *(f"shard-{i}" for i in chosen)}
    overview, features = data["overview"], data["features"]
    assert (overview["only"], overview["shard"]) == (chosen, 1)
    assert (overview["map"], overview["prompts"], overview["examples"]) == (False, 0, chosen)
    whole = PageData(catalog)
    columns = value(whole.script("features"))
    shown = {
        near
        for i in chosen
        for n in (catalog[i].neighbours, catalog[i].coactive)
        for near in (x.feature for x in n)
    }
    for name, column in features.items():
        assert column == {str(i): columns[name][i] for i in sorted({*chosen, *shown})}
    for i in chosen:
        there = value(whole.script(f"shard-{i // SHARD}"))["features"][i % SHARD]
        here = data[f"shard-{i}"]["features"][0]
        assert {k: v for k, v in here.items() if k not in ("contexts", "bands")} == {
            k: v for k, v in there.items() if k not in ("contexts", "bands")
        }
        assert len(here["contexts"]) == len(there["contexts"]) > 0
    hits = {
        feature for _, fires, raised in data["search"]["words"] for feature in (*fires[::2], *raised[::2])
    }
    assert hits == set(chosen)


def test_a_file_runs_only_what_it_came_with(hostile: Catalog, tmp_path: Path) -> None:
    file = hostile.page(tmp_path / "few.html", features=range(12))
    scripts, styles = inline(file)
    text = file.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    parts = dict(part.strip().split(" ", 1) for part in policy[1].split(";"))
    for name, found in (("script-src", scripts), ("style-src", styles)):
        hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in found]
        assert parts[name].split() == [f"'sha256-{x}'" for x in hashes]
    assert parts["default-src"] == "'none'"
    assert "unsafe" not in policy[1]
    assert text.count("<script") == text.count("</script>") == len(scripts)
    assert not re.search(r"<script[^>]*src|<link|\sstyle=|\son\w+=\"", text.split("<style>")[0])
    assert scripts[-1] == (ASSETS / "page.js").read_text("utf-8")


def test_a_file_takes_a_few_features_and_nothing_else(catalog: Catalog, tmp_path: Path) -> None:
    file = tmp_path / "few.html"
    for wrong, message in (
        ({}, "name them"),
        ({"features": []}, "name them"),
        ({"features": [1], "prompts": ["x"]}, "prompts"),
    ):
        with pytest.raises(InvalidInput, match=message):
            catalog.page(file, **wrong)
    with pytest.raises(UnknownFeature):
        catalog.page(file, features=[len(catalog)])
    with pytest.raises(InvalidInput, match="for a single file"):
        catalog.page(tmp_path / "site", features=[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.catalog.page.writing.IN_A_FILE", 3)
        with pytest.raises(InvalidInput, match="4 features; a single file takes 3"):
            catalog.page(file, features=range(4))
    assert not list(tmp_path.iterdir())


def test_a_file_replaces_only_its_like(
    catalog: Catalog, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = catalog.page(tmp_path / "few.html", features=[1])
    catalog.page(file, features=[2])
    before = file.read_bytes()
    for other in ("mine.html", "index.html"):  # somebody's own, and the first file of a folder's page
        (tmp_path / other).write_bytes(
            (page / "index.html").read_bytes() if other == "index.html" else b"<p>mine"
        )
        with pytest.raises(InvalidInput, match="something else"):
            catalog.page(tmp_path / other, features=[1])
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InvalidInput, match="something else"):
        catalog.page(tmp_path / "folder.html", features=[1])

    def break_down(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(PageData, "script", break_down)
    with pytest.raises(OSError, match="no space"):
        catalog.page(file, features=[3])
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "few.html",
        "folder.html",
        "index.html",
        "mine.html",
    ]


# The command line


def test_the_command_writes_a_folder_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["catalog", "page", "tiny", "few.html", "--features", "3900,1406"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == "few.html"
    assert printed.err.strip() == f"{(tmp_path / 'few.html').stat().st_size / 1e6:.1f} MB"
    assert main(["catalog", "page", "tiny", "few.html", "--features", "3900", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"page": "few.html", "bytes": (tmp_path / "few.html").stat().st_size}
    (tmp_path / "texts.txt").write_text("first of a file\n\n  second of it  \n")
    command = ["catalog", "page", "tiny", "site", "--prompt", "given", "--prompts", "texts.txt", "--json"]
    monkeypatch.setattr("saekit.catalog.page.data.PageData.names", lambda self: ["overview", "prompts"])
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == "site/index.html"
    assert told["bytes"] == sum(path.stat().st_size for path in Path("site").rglob("*.*"))
    prompts = value(Path("site/data/prompts.js").read_text())
    assert [text["text"] for text in prompts[:3]] == ["given", "first of a file", "second of it"]
    assert value(Path("site/data/overview.js").read_text())["prompts"] == len(prompts)
    assert main([*command[:4], "--prompts", "nowhere.txt"]) == 1
    (tmp_path / "texts.txt").write_bytes(b"\xff\xfe")
    assert main(command) == 1
    assert "not a text file" in capsys.readouterr().err
