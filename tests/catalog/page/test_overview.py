"""What the page says of a catalog as a whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saekit import embedded
from saekit.catalog import Catalog
from saekit.catalog.page.data import PageData
from saekit.catalog.page.overview import COMMON, EXAMPLES, RARE, WELL, examples, figures, place
from saekit.catalog.tables import write_table


@pytest.fixture(scope="module")
def tiny() -> Catalog:
    return Catalog.open(embedded.folder("catalog"))


def overview(catalog: Catalog, **options: Any) -> dict[str, Any]:
    script = PageData(catalog, **options).script("overview")
    found = json.loads(script.removeprefix('receive("overview", ').removesuffix(");\n"))
    assert isinstance(found, dict)
    return found


def changed(catalog: Catalog, folder: Path, **info: Any) -> Catalog:
    """A copy whose catalog.json says something else."""
    shutil.copytree(catalog.path, folder)
    (folder / "catalog.json").write_text(json.dumps(catalog.info | info))
    return Catalog.open(folder)


@pytest.mark.parametrize(
    ("site", "blocks", "words"),
    [
        ("blocks.3.hook_resid_pre", 6, "before block 3 of 6"),
        ("blocks.11.hook_resid_post", None, "after block 11"),
        ("blocks.0.attn.hook_z", 2, "the attention heads of block 0 of 2"),
        ("blocks.2.mlp.hook_post", 6, "the neurons of block 2 of 6"),
        ("hook_embed", 6, "hook_embed"),
        ("blocks.2.hook_q_input", 6, "blocks.2.hook_q_input"),
    ],
)
def test_sites_in_plain_words(site: str, blocks: int | None, words: str) -> None:
    assert place(site, blocks) == words


def test_the_embedded_catalog(tiny: Catalog) -> None:
    told = overview(tiny)
    assert (told["name"], told["model"], told["embedded"]) == ("tiny", "tiny", True)
    assert told["place"] == "before block 3 of 6"
    assert told["alive"] == int((tiny.density > 0).sum())
    assert (told["live"], told["only"], told["map"], told["prompts"]) == (False, None, True, 12)
    assert "limits" not in told
    assert told["prompts"] == len(PageData(tiny)._prompts)
    scores = tiny.score[~np.isnan(tiny.score)]
    assert told["scored"] == len(scores)
    assert told["median_score"] == pytest.approx(float(np.median(scores)), abs=5e-3)
    methods = tiny.table("explanations")["method"].to_pylist()
    assert told["explained"] == {method: methods.count(method) for method in set(methods)}


def test_the_figures_are_the_catalogs_and_the_evaluations(tiny: Catalog, tmp_path: Path) -> None:
    found = {label: text for label, text, _ in figures(tiny)}
    metrics = json.loads((embedded.folder("sae") / "metrics.json").read_text())
    assert found["Variance explained"] == f"{metrics['explained_variance']:.1%}"
    assert found["Predictions kept"] == f"{metrics['ce_recovered']:.1%}"
    assert float(found["Active at once"]) == pytest.approx(metrics["l0"], rel=0.05)  # on another text
    # Beside another SAE's evaluation, nothing of it is told.
    shutil.copytree(embedded.folder("sae"), tmp_path / "sae")
    sae = tiny.info["sae"]
    other = sae | {"metadata": sae["metadata"] | {"sha256": {"W_dec": "another"}}}
    there = {label for label, *_ in figures(changed(tiny, tmp_path / "catalog", sae=other))}
    assert there == set(found) - {"Variance explained", "Predictions kept"}


def test_examples_are_worth_a_look(tiny: Catalog) -> None:
    found = [tiny[i] for i in examples(tiny)]
    assert len({f.index for f in found}) == EXAMPLES
    assert all(RARE <= f.density <= COMMON and (f.score or 0) >= WELL for f in found)
    tops = [f.max_activation for f in found]
    assert tops == sorted(tops, reverse=True)
    assert tops[0] > 1.5 * tops[-1]
    assert len({f.label.split(", ")[0] for f in found}) == EXAMPLES


def test_examples_of_a_catalog_without_scores_or_firings(tiny: Catalog, tmp_path: Path) -> None:
    folder = tmp_path / "catalog"
    shutil.copytree(tiny.path, folder)
    write_table(folder, "scores", tiny.table("scores").slice(0, 0).to_pydict())
    bare = Catalog.open(folder)
    assert 0 < len(examples(bare)) <= EXAMPLES
    assert overview(bare)["median_score"] is None
    features = tiny.table("features").to_pydict()
    for name in ("density", "count", "max_activation", "mean_activation", "std_activation"):
        features[name] = np.zeros(len(tiny))
    write_table(folder, "features", features)
    dead = overview(Catalog.open(folder))
    assert (dead["examples"], dead["alive"], dead["map"]) == ([], 0, False)
    assert [label for label, *_ in dead["figures"]][:1] == ["Alive"]


def test_paths_stay_here_unless_the_page_is_live(tiny: Catalog, tmp_path: Path) -> None:
    where = str(tmp_path / "models" / "mine")
    local = changed(tiny, tmp_path / "catalog", model=tiny.info["model"] | {"name": where})
    assert overview(local)["model"] == "mine"
    assert str(tmp_path) not in json.dumps(overview(local))
    live = overview(local, live={"text": 5, "edits": 2})
    assert live["model"] == where
    assert (live["live"], live["limits"]) == (True, {"text": 5, "edits": 2})
