"""A catalog in W&B: its files as they are on the hub, and a table of its features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from catalog.brute import made
from training.test_tracking import logged

import saekit
from saekit.catalog.artifact import COLUMNS, artifact, summary_rows
from saekit.catalog.publish import FILES
from saekit.catalog.tables import CATALOG, write_table
from saekit.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings("default")  # W&B's own


@pytest.fixture
def catalog(tmp_path: Path) -> saekit.Catalog:
    """Made up, with two explanations that are scored, on a model from a local folder."""
    folder = made(tmp_path / "catalog")
    write_table(
        folder,
        "explanations",
        {"feature": [2, 5, 7], "method": ["tokens"] * 3, "model": [""] * 3, "prompt": [""] * 3, "text": ["two", "five", "seven"]},
    )  # fmt: skip
    write_table(
        folder,
        "scores",
        {
            "feature": [2, 5], "method": ["tokens"] * 2, "model": [""] * 2, "prompt": [""] * 2, "scorer": ["pearson"] * 2,
            "judge": [""] * 2, "judge_prompt": [""] * 2, "score": [0.25, 0.75], "control": [0.0, 0.1], "n": [9, 9],
            "failures": [0, 0],
        },
    )  # fmt: skip
    info = json.loads((folder / CATALOG).read_text("utf-8"))
    info["model"]["name"] = "/data/ann/her-gpt"
    (folder / CATALOG).write_text(json.dumps(info), "utf-8")
    return saekit.Catalog.open(folder)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are written, offline, and what they stage beside them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_the_best_scored_features_come_first(
    catalog: saekit.Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = summary_rows(catalog)
    assert len(rows) == len(catalog)
    assert [row[0] for row in rows[:2]] == [5, 2]
    rest = [row[0] for row in rows[2:]]
    assert rest == sorted(rest, key=lambda i: -catalog[i].max_activation)
    five = dict(zip(COLUMNS, rows[0], strict=True))
    feature = catalog[5]
    assert five == {
        "index": 5, "label": feature.label, "explanation": "five", "score": pytest.approx(0.75),
        "density": feature.density, "max": feature.max_activation,
    }  # fmt: skip
    assert rows[-1][3] is None
    monkeypatch.setattr("saekit.catalog.artifact.ROWS", 3)
    assert [row[:2] for row in summary_rows(catalog)] == [row[:2] for row in rows[:3]]


def test_an_offline_run_holds_the_files_and_the_table(catalog: saekit.Catalog, runs: Path) -> None:
    import wandb

    mine = wandb.init(dir=str(runs), settings=wandb.Settings(silent=True))
    assert artifact(catalog) == "her-gpt-blocks.2.hook_resid_pre"
    assert wandb.run is mine  # a run of the user's own stays open beside
    mine.finish()
    records = next(run for run in logged(runs) if any(record["type"] == "artifact" for record in run))
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    (of_catalog,) = [made for made in artifacts if made["type"] == "catalog"]
    assert of_catalog["name"] == "her-gpt-blocks.2.hook_resid_pre"
    contents = {entry["path"]: entry for entry in of_catalog["manifest"]["contents"]}
    assert set(contents) == set(FILES)
    for name, entry in contents.items():
        staged = Path(entry["local_path"]).read_bytes()
        if name == CATALOG:
            assert json.loads(staged)["model"]["name"] == "her-gpt"
        else:
            assert staged == (catalog.path / name).read_bytes(), name
    metadata = json.loads(of_catalog["metadata"])
    assert metadata["features"] == 24
    assert metadata["alive"] == 23
    assert metadata["scores"][0]["above"] == 1
    assert metadata["model"]["local"]
    assert "/data/ann" not in json.dumps(records)
    (table,) = runs.glob("wandb/offline-run-*/files/media/table/features_*.table.json")
    written: dict[str, Any] = json.loads(table.read_text("utf-8"))
    assert written["columns"] == COLUMNS
    assert [row[0] for row in written["data"]] == [row[0] for row in summary_rows(catalog)]
    assert written["data"][0][2] == "five"


def test_a_run_of_ones_own_is_logged_to_and_stays_open(catalog: saekit.Catalog, runs: Path) -> None:
    import wandb

    mine = wandb.init(dir=str(runs), settings=wandb.Settings(silent=True))
    assert artifact(catalog, name="a b/c", run=mine) == "a_b_c"
    mine.log({"still": 1})
    mine.finish()
    (records,) = logged(runs)
    assert any(r["type"] == "artifact" and r["artifact"]["name"] == "a_b_c" for r in records)


def test_nothing_is_written_where_wandb_is_off(
    catalog: saekit.Catalog, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert artifact(catalog) is None
    assert not list(runs.iterdir())


def test_what_wandb_refuses_is_one_line(
    catalog: saekit.Catalog, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(*_: Any, **__: Any) -> None:
        raise wandb.errors.UsageError("no API key configured\nuse wandb login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        InvalidInput, match="did not take the catalog: no API key configured. Log in"
    ) as raised:
        artifact(catalog)
    assert "\n" not in str(raised.value)


def test_a_catalog_whose_table_is_missing_leaves_no_open_run(catalog: saekit.Catalog, runs: Path) -> None:
    import wandb

    shutil.copytree(catalog.path, runs / "copy")
    copy = saekit.Catalog.open(runs / "copy")
    (copy.path / "tokens.parquet").unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        artifact(copy)
    assert wandb.run is None
