"""Rows: the file is the record, W&B a view of it that holds each row once."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import SITE, sentences

from saekit.errors import Interrupted, InvalidInput
from saekit.recipe import parse_recipe
from saekit.training.run import train
from saekit.training.tracking import Tracker, WandbConfig, read_rows

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedPlantedPlanted",
    "MY_SECRET": "hunter2hunter2",
    "AWS_SECRET_ACCESS_KEY": "plantedAwsPlantedAws",
}
TOPK = {"architecture": "topk", "d_sae": 48, "k": 6}


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.json"
    text.write_text(json.dumps(sentences(40)))
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps([text.partition(".")[0] for text in sentences(2, seed=9)]))

    def make(sae: Any):
        return parse_recipe(
            {
                "name": "tracked", "model": "tiny", "dtype": "float32", "site": SITE, "sae": sae,
                "report": isinstance(sae, dict),
                "data": {"text": str(text), "context_size": 32, "held_out_text": str(held_out)},
                "training": {"tokens": 800, "batch_size": 100, "ring": 400, "contexts": 4, "log_every": 2,
                             "evaluate_every": 3, "evaluate_tokens": 100, "checkpoint_every": 4},
            }
        )  # fmt: skip

    return make


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def logged(folder: Path) -> list[list[dict[str, Any]]]:
    """What each offline W&B run in the folder holds, record by record, oldest run first."""
    from wandb.util import get_core_path

    runs = []
    for log in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        # what `wandb leet inspect --json` runs, without the seconds its command line takes to start
        command = [
            get_core_path(),
            "leet",
            "inspect",
            "--no-observability",
            "--json",
            "--run-file",
            str(log),
            str(folder),
        ]
        inspected = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([json.loads(line) for line in inspected.stdout.splitlines()])
    return runs


def rows_by_step(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """W&B's step → row."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {
        item["_step"]: {key: value for key, value in item.items() if not key.startswith("_")}
        for item in items
    }


def info(records: list[dict[str, Any]]) -> dict[str, Any]:
    return next(record["run"] for record in records if record["type"] == "run")


def no_secret_in(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], file


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("offline")
def test_wandb_holds_the_rows_of_metrics_jsonl_and_no_secret(recipe, model, tmp_path) -> None:
    import wandb

    mine = wandb.init(dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True))
    run = train(recipe(TOPK), model=model, runs=tmp_path)
    assert wandb.run is mine  # a run of the user's own stays open beside
    mine.finish()
    (records,) = logged(run.path)
    rows = read_rows(run.path)
    assert rows_by_step(records) == dict(enumerate(rows))
    assert len(rows) == 4 + 3
    assert info(records)["display_name"] == "tracked"
    assert "run_group" not in info(records)
    (shown,) = run.path.glob("wandb/offline-run-*/files/media/html/report_html*.html")
    assert shown.read_bytes() == (run.path / "report.html").read_bytes()
    (picture,) = run.path.glob("wandb/offline-run-*/files/media/images/report_png*.png")
    assert picture.read_bytes() == (run.path / "report.png").read_bytes()
    no_secret_in(run.path)


@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("offline")
def test_a_resumed_sweep_goes_on_with_its_wandb_runs(recipe, model, tmp_path) -> None:
    """One W&B run per SAE in one group, all live at once; together the pieces hold every row, each the same wherever."""

    class Stop:
        def line(self, text: str) -> None: ...

        def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
            if step == 6:
                signal.raise_signal(signal.SIGTERM)

    wanted = recipe([TOPK, {"architecture": "standard", "d_sae": 40}])
    with pytest.raises(Interrupted):
        train(wanted, model=model, runs=tmp_path, reporter=Stop())
    # As if killed after step 4's checkpoint: what was logged since is logged again.
    checkpoint = tmp_path / "tracked" / "step-6"
    for file in checkpoint.iterdir():
        file.unlink()
    sweep = train(wanted, model=model, runs=tmp_path, resume=True)
    ids = set()
    for name, run in zip(sweep.names, sweep, strict=True):
        first, second = logged(run.path)
        assert info(first)["run_id"] == info(second)["run_id"]
        ids.add(info(first)["run_id"])
        for records in (first, second):
            assert (info(records)["run_group"], info(records)["display_name"]) == (
                "tracked",
                f"tracked/{name}",
            )
        early, late = rows_by_step(first), rows_by_step(second)
        assert early | late == late | early == dict(enumerate(read_rows(run.path)))
        assert early.keys() & late.keys()
        pictures = [path.name for path in run.path.glob("wandb/*/files/media/images/*.png")]
        for picture in ("pareto", "feature_density"):
            assert any(name.startswith(picture) for name in pictures)
    assert len(ids) == 2
    no_secret_in(sweep.path)


def test_wandb_mode_comes_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandbConfig().resolved_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(InvalidInput, match="WANDB_MODE: 'sometimes'"):
        WandbConfig().resolved_mode()
    monkeypatch.delenv("WANDB_MODE")
    assert WandbConfig().resolved_mode() == "disabled"


def test_rows_beyond_the_checkpoint_and_cut_rows_are_dropped(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    tracker = Tracker(tmp_path, "x", {}, WandbConfig(), wandb_id=None, step=2)
    tracker.log({"step": 3, "a": 1.5})
    tracker.close()
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "a": 1.5}]
