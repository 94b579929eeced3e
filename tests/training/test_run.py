from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import sentences

import saekit
from saekit.errors import FileMissing, Interrupted, InvalidInput, UnknownName
from saekit.locks import exclusive
from saekit.recipe import parse_recipe
from saekit.sae import SAE
from saekit.training import checkpoint
from saekit.training.run import train
from saekit.training.tracking import Tracker, read_rows

SITE = "blocks.1.hook_resid_pre"  # of six blocks one is all that has to run for it


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(120)))

    def make(**changes):
        raw = {
            "name": "run", "model": "tiny", "dtype": "float32", "site": SITE, "report": False,
            "data": {"text": str(text), "context_size": 32, "held_out": 0.015},
            "sae": {"architecture": "topk", "d_sae": 96, "k": 8},
            "training": {"tokens": 20 * 128, "batch_size": 128, "lr": 1e-3, "ring": 512, "contexts": 8, "log_every": 3,
                         "evaluate_tokens": 200, "evaluate_every": 7, "checkpoint_every": 4},
        }  # fmt: skip
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section] = {**raw[section], name: value}
            else:
                raw[section] = value
        return parse_recipe(raw)

    return make


@pytest.fixture(scope="module")
def whole(recipe, model, tmp_path_factory):
    """A run that nothing interrupts. Tests look at it and change nothing."""
    return train(recipe(), model=model, runs=tmp_path_factory.mktemp("whole") / "runs")


def same_weights(a: Path, b: Path) -> bool:
    one, two = SAE.load(a / "final"), SAE.load(b / "final")
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_second_run_over_a_cache_calls_no_model_and_ends_with_the_same_bits(
    recipe, model, tmp_path, monkeypatch
) -> None:
    lines = []

    class Told:
        def line(self, text: str) -> None:
            lines.append(text)

        def progress(self, *_) -> None: ...

    cache = str(tmp_path / "activations")
    first = train(recipe(data__cache=cache), model=model, runs=tmp_path / "runs", reporter=Told())
    assert any(cache in line and "MB" in line for line in lines), "the size is told before it is written"

    def refuse(*_, **__):
        raise AssertionError("the stream called the model")

    monkeypatch.setattr("saekit.activations.capture", refuse)
    second = train(recipe(name="second", data__cache=cache), model=model, runs=tmp_path / "runs")
    assert same_weights(first.path, second.path)
    wider = recipe(name="wider", data__cache=cache, sae={"architecture": "standard", "d_sae": 128})
    assert train(wider, model=model, runs=tmp_path / "runs").metrics["l0"] > 0, "another SAE reads it, too"


def test_a_run_leaves_what_the_surface_says(whole) -> None:
    run = whole
    assert run.path.parts[-2:] == ("runs", "run")
    assert {p.name for p in run.path.iterdir()} == {
        "recipe.yaml",
        "metrics.jsonl",
        "final",
        "step-16",
        "step-20",
    }
    assert run.metrics == json.loads((run.path / "final" / "metrics.json").read_text())
    loaded = SAE.load(run.path / "final")
    assert loaded.site == SITE
    assert loaded.model_name == "tiny"
    x = torch.randn(5, 256)
    assert torch.equal(loaded.encode(x), run.sae.encode(x))
    rows = read_rows(run.path)
    steps = [row["step"] for row in rows if "losses/overall_loss" in row]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    assert [row["step"] for row in rows if "held_out/l0" in row] == [7, 14, 20]
    assert {
        "losses/mse_loss",
        "metrics/l0",
        "metrics/explained_variance",
        "details/n_training_samples",
    } <= set(rows[0])


def test_the_same_recipe_gives_the_same_bits_and_rows(recipe, model, whole, tmp_path) -> None:
    again = train(recipe(), model=model, runs=tmp_path / "again")
    assert same_weights(whole.path, again.path)
    assert (whole.path / "metrics.jsonl").read_bytes() == (again.path / "metrics.jsonl").read_bytes()
    other = train(recipe(seed=1), model=model, runs=tmp_path / "other")
    assert not same_weights(whole.path, other.path)


class StopAfter:
    """A reporter that sends a signal to its own process at a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def line(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "architecture"),
    [(signal.SIGINT, None), (signal.SIGTERM, {"architecture": "standard", "d_sae": 96})],
)
def test_an_interrupted_run_resumes_to_the_same_bits_and_rows(
    recipe, model, whole, tmp_path, number, architecture
) -> None:
    before = signal.getsignal(signal.SIGINT)  # CI may start us with it ignored
    wanted = recipe()
    if architecture:
        wanted = recipe(sae=architecture)
        whole = train(wanted, model=model, runs=tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 9 of 20; go on with --resume"):
        train(wanted, model=model, runs=tmp_path / "cut", reporter=StopAfter(9, number))
    with pytest.raises(Interrupted, match="stopped at step 15"):
        train(wanted, model=model, runs=tmp_path / "cut", resume=True, reporter=StopAfter(15, number))
    resumed = train(wanted, model=model, runs=tmp_path / "cut", resume=True)
    assert same_weights(whole.path, resumed.path)
    assert (whole.path / "metrics.jsonl").read_bytes() == (resumed.path / "metrics.jsonl").read_bytes()
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_rules(recipe, model, tmp_path) -> None:
    first = train(recipe(), model=model, runs=tmp_path, resume=True)  # nothing there: it starts
    before = {
        p: p.stat().st_mtime_ns for p in first.path.rglob("*") if p.is_file() and p.name != "recipe.yaml"
    }
    again = train(recipe(), model=model, runs=tmp_path, resume=True)  # finished: nothing changes
    assert {
        p: p.stat().st_mtime_ns for p in first.path.rglob("*") if p.is_file() and p.name != "recipe.yaml"
    } == before
    assert again.metrics == first.metrics
    with pytest.raises(InvalidInput, match="exists: resume it"):
        train(recipe(), model=model, runs=tmp_path)
    with pytest.raises(
        InvalidInput, match=r"another recipe \(sae\.k: 8 then, 9 now; training\.lr: 0\.001 then, 0\.01 now\)"
    ):
        train(recipe(training__lr=1e-2, sae__k=9), model=model, runs=tmp_path, resume=True)
    longer = train(
        recipe(training__tokens=24 * 128, training__log_every=5), model=model, runs=tmp_path, resume=True
    )
    assert read_rows(longer.path)[-1]["step"] == 24


def test_a_run_that_another_process_writes_is_left_alone(recipe, model, tmp_path) -> None:
    with exclusive(tmp_path / "run"):
        with pytest.raises(InvalidInput, match="another process .* is writing this run"):
            train(recipe(), model=model, runs=tmp_path)
        with pytest.raises(InvalidInput, match="another process .* is writing this run"):
            train(recipe(), model=model, runs=tmp_path, resume=True)
    assert not (tmp_path / "run").exists()


def test_what_killed_processes_left_is_removed(recipe, model, tmp_path) -> None:
    for left in ("step-4.tmp-99999999", "final.old-99999999"):
        (tmp_path / "run" / left).mkdir(parents=True)
    run = train(recipe(training__tokens=256), model=model, runs=tmp_path, resume=True)
    assert not [p for p in run.path.iterdir() if ".tmp-" in p.name or ".old-" in p.name]


def test_a_checkpoint_made_with_another_recipe_is_refused_though_the_yaml_agrees(
    recipe, model, tmp_path
) -> None:
    run = train(recipe(), model=model, runs=tmp_path)
    changed = recipe(sae__k=9, training__tokens=24 * 128)
    (run.path / "recipe.yaml").unlink()
    with pytest.raises(InvalidInput, match=r"another recipe \(sae\.k: 8 then, 9 now\)"):
        train(changed, model=model, runs=tmp_path, resume=True)


def test_rare_latents_are_told_once_they_can_be(recipe, model, tmp_path, monkeypatch) -> None:
    from saekit.training import trainee

    monkeypatch.setattr(trainee, "RARE", {"sparsity/below_1e-5": 900, "sparsity/below_1e-6": 2000})
    run = train(recipe(), model=model, runs=tmp_path)
    rows = [row for row in read_rows(run.path) if "losses/overall_loss" in row]
    assert [row["step"] for row in rows if "sparsity/below_1e-5" in row] == [9, 12, 15, 18, 20]
    assert [row["step"] for row in rows if "sparsity/below_1e-6" in row] == [18, 20]
    assert all(0 <= row["sparsity/below_1e-6"] <= row["sparsity/below_1e-5"] <= 96 for row in rows[-2:])
    assert rows[-1]["sparsity/below_1e-5"] > 0  # 96 latents, eight at a time: some were not drawn


def test_checkpoints_are_pruned_and_damaged_ones_passed_over(recipe, model, tmp_path) -> None:
    run = train(recipe(training__keep_checkpoints=3), model=model, runs=tmp_path)
    assert sorted(p.name for p in run.path.glob("step-*")) == ["step-12", "step-16", "step-20"]
    for damage in ("state.safetensors", "manifest.json"):
        newest = checkpoint.newest(run.path)
        file = newest / damage
        file.write_bytes(file.read_bytes()[:-10])
        assert checkpoint.newest(run.path) != newest
        with pytest.raises(InvalidInput, match="differ from its manifest"):
            checkpoint.load(newest)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)}, {"x": 1}, keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(
        InvalidInput, match=r"step-2: could not be written .*No space left.*earlier ones are whole"
    ):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(3)}, {"x": 1}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_what_is_wrong_is_told_before_training(recipe, model, tmp_path) -> None:
    with pytest.raises(UnknownName, match="Did you mean blocks"):
        train(recipe(site="blocks.3.hook_resid_per"), model=model, runs=tmp_path / "a")
    with pytest.raises(FileMissing, match="nowhere"):
        train(recipe(data__text="nowhere.jsonl"), model=model, runs=tmp_path / "b")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InvalidInput, match="corpus is empty"):
        train(recipe(data__text=str(tmp_path / "empty.jsonl")), model=model, runs=tmp_path / "c")
    with pytest.raises(InvalidInput, match="held_out: 0 leaves nothing"):
        train(recipe(data__held_out=0), model=model, runs=tmp_path / "d")
    assert not [p for name in "abcd" for p in (tmp_path / name).rglob("*")]


def test_held_out_text_of_its_own(recipe, model, tmp_path) -> None:
    (tmp_path / "held.txt").write_text(" ".join(sentences(4, seed=9)))
    run = train(recipe(data__held_out_text=str(tmp_path / "held.txt")), model=model, runs=tmp_path / "runs")
    assert run.metrics["tokens"] > 100


def test_a_nan_loss_ends_the_run_with_advice(recipe, model, tmp_path) -> None:
    with pytest.raises(InvalidInput, match=r"NaN at step .*lower training\.lr"):
        train(recipe(training__lr=1e30, training__clip_grad_norm=None), model=model, runs=tmp_path)


def test_train_by_path_with_overrides_on_a_llama_model(tmp_path) -> None:
    from conftest import SHARED

    if not (SHARED / "models" / "stories260k").is_dir():
        pytest.skip("../shared/models/stories260k is missing")
    (tmp_path / "t.json").write_text(json.dumps(sentences(60)))
    (tmp_path / "r.yaml").write_text(
        f"name: llama\nmodel: {SHARED}/models/stories260k\ndtype: float32\ndata: {{text: {tmp_path}/t.json, context_size: 64, held_out: 0.2}}\n"
        "site: blocks.2.hook_resid_mid\nsae: {architecture: standard, d_sae: 128}\n"
        "training: {tokens: 4000, batch_size: 256, ring: 1024, lr: 1e-3}\n"
    )
    run = saekit.train(
        tmp_path / "r.yaml", overrides=["sae.d_sae=64", "training.tokens=2_560"], runs=tmp_path
    )
    assert run.sae.d_sae == 64
    assert run.sae.d_in == 64
    assert 0 <= run.metrics["dead"] <= 1


def test_a_full_disk_under_the_rows_is_one_clear_error(recipe, model, whole, tmp_path, monkeypatch) -> None:
    log = Tracker.log

    def full(self, row):
        if row["step"] > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        log(self, row)

    monkeypatch.setattr(Tracker, "log", full)
    with pytest.raises(
        InvalidInput, match=r"could not be written \(.*No space left.*its checkpoints are whole"
    ):
        train(recipe(), model=model, runs=tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(recipe(), model=model, runs=tmp_path / "cut", resume=True)
    assert same_weights(whole.path, resumed.path)
    assert (whole.path / "metrics.jsonl").read_bytes() == (resumed.path / "metrics.jsonl").read_bytes()
