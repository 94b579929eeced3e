"""Several SAEs from one forward: each is, bit for bit, what it is alone; the whole is resumed as one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import SITE, sentences

from saekit.activations import Activations
from saekit.cli import main
from saekit.errors import Interrupted, InvalidInput, UnknownName
from saekit.recipe import parse_recipe, write_recipe
from saekit.sae import SAE
from saekit.training import checkpoint
from saekit.training.run import Run, Sweep, train
from saekit.training.tracking import read_rows

OTHER, MLP = "blocks.1.hook_resid_pre", "blocks.3.hook_mlp_out"
TOPK = {"architecture": "topk", "d_sae": 48, "k": 6}
KINDS = [
    {"name": "standard", "architecture": "standard", "d_sae": 40, "training": {"l1_coefficient": 2, "target_l0": 9}},
    {"name": "topk", **TOPK},
    {"name": "batchtopk", **TOPK, "architecture": "batchtopk", "site": OTHER},
    {"name": "matryoshka", **TOPK, "architecture": "matryoshka", "seed": 5},
    {"name": "jumprelu", "architecture": "jumprelu", "d_sae": 40, "training": {"lr": 2e-3}},
    {"name": "gated", "architecture": "gated", "d_sae": 40, "training": {"dead_latents": "resample", "dead_after": 300}},
    {"name": "transcoder", **TOPK, "target_site": MLP, "skip": True},
    {"name": "crosscoder", **TOPK, "site": [OTHER, SITE]},
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.json"
    text.write_text(json.dumps(sentences(50)))
    held_out = text.with_name("held_out.json")
    held_out.write_text(json.dumps([text.partition(".")[0] for text in sentences(3, seed=9)]))

    def make(sae, name="sweep", **training):
        return parse_recipe(
            {
                "name": name, "model": "tiny", "dtype": "float32", "site": SITE, "sae": sae, "report": False,
                "data": {"text": str(text), "context_size": 32, "held_out_text": str(held_out)},
                "training": {"tokens": 12 * 100, "batch_size": 100, "lr": 1e-3, "ring": 450, "contexts": 4, "log_every": 3,
                             "evaluate_tokens": 200, "checkpoint_every": 5} | training,
            }
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def sweep(recipe, model, tmp_path_factory) -> Sweep:
    """All kinds at once."""
    result = train(recipe(KINDS), model=model, runs=tmp_path_factory.mktemp("runs"))
    assert isinstance(result, Sweep)
    return result


def weights(folder: Path) -> bytes:
    return (folder / "final" / "sae_weights.safetensors").read_bytes()


def same(one: Run, two: Run) -> None:
    assert weights(one.path) == weights(two.path)
    assert (one.path / "metrics.jsonl").read_bytes() == (two.path / "metrics.jsonl").read_bytes()
    assert one.metrics == two.metrics
    assert (one.path / "final" / "cfg.json").read_bytes() == (two.path / "final" / "cfg.json").read_bytes()


def test_a_sweep_leaves_what_the_surface_says(sweep) -> None:
    names = [section["name"] for section in KINDS]
    assert {p.name for p in sweep.path.iterdir()} == {
        "recipe.yaml", "step-10", "step-12", "pareto.png", *names
    }  # fmt: skip
    for name in names:
        assert {p.name for p in (sweep.path / name).iterdir()} == {"metrics.jsonl", "final"}
    assert (len(sweep), list(sweep), sweep.names) == (8, list(sweep.runs), tuple(names))
    assert sweep["gated"].path == sweep.path / "gated"
    assert sweep["gated"].metrics == json.loads((sweep.path / "gated/final/metrics.json").read_text())
    with pytest.raises(UnknownName, match="'gate' is no SAE of the sweep .* Did you mean gated"):
        sweep["gate"]


@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["name"])
def test_each_is_what_it_is_alone(recipe, model, sweep, section, tmp_path) -> None:
    alone = train(recipe(section), model=model, runs=tmp_path)
    assert isinstance(alone, Run)
    same(alone, sweep[section["name"]])


def test_a_list_cut_to_one_is_the_same_too(recipe, model, sweep, tmp_path) -> None:
    (cut,) = train(recipe(KINDS[4:5]), model=model, runs=tmp_path)
    same(cut, sweep["jumprelu"])
    assert (tmp_path / "sweep" / "jumprelu" / "final").is_dir()


def test_each_says_what_it_is(sweep) -> None:
    for run in sweep:
        metadata = json.loads((run.path / "final" / "cfg.json").read_text())["metadata"]
        assert metadata["training_architecture"].startswith(run.sae.architecture)
        assert (metadata["model_name"], metadata["context_size"]) == ("tiny", 32)
    assert SAE.load(sweep["transcoder"].path / "final").target_sites == (MLP,)
    assert SAE.load(sweep["crosscoder"].path / "final").sites == (OTHER, SITE)
    assert sweep["matryoshka"].sae.prefixes == (6, 12, 24, 48)


def test_one_forward_serves_all(recipe, model, tmp_path, monkeypatch) -> None:
    """As many contexts go through the model for three SAEs as for one."""
    from saekit import activations

    captured = []
    capture = activations.capture
    monkeypatch.setattr(
        activations, "capture", lambda model, sites, ids: captured.append(sites) or capture(model, sites, ids)
    )
    train(recipe(TOPK), model=model, runs=tmp_path / "one")
    alone = len(captured)
    captured.clear()
    train(recipe([KINDS[1], KINDS[2], KINDS[6]]), model=model, runs=tmp_path / "all")
    assert len(captured) == alone
    assert set(captured[0]) == {SITE, OTHER, MLP}


class StopAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def line(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, figures: dict[str, float]) -> None:
        assert figures["saes"] == len(KINDS)
        if step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_an_interrupted_sweep_resumes_to_the_same_bits_and_rows(recipe, model, sweep, tmp_path) -> None:
    with pytest.raises(Interrupted, match="stopped at step 9 of 12"):
        train(recipe(KINDS), model=model, runs=tmp_path, reporter=StopAfter(9))
    assert checkpoint.newest(tmp_path / "sweep").name == "step-9"
    with (tmp_path / "sweep" / "topk" / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 10, "details/n_training_samples": 1}\n{"st')  # a kill came after the checkpoint
    resumed = train(recipe(KINDS), model=model, runs=tmp_path, resume=True)
    for run in resumed:
        same(run, sweep[run.path.name])
    for file in ("state.safetensors", "state.json"):  # counters, optimizers, controllers, frames: all of it
        assert (resumed.path / "step-12" / file).read_bytes() == (sweep.path / "step-12" / file).read_bytes()
    again = train(recipe(KINDS), model=model, runs=tmp_path, resume=True)
    assert [run.metrics for run in again] == [run.metrics for run in sweep]
    with pytest.raises(InvalidInput, match=r"another recipe \(sae\.1\.k: 6 then, 7 now\)"):
        changed = [*KINDS[:1], {**KINDS[1], "k": 7}, *KINDS[2:]]
        train(recipe(changed), model=model, runs=tmp_path, resume=True)


def test_rows_carry_the_keys_of_each_kind(sweep) -> None:
    def keys(name):
        return set(next(row for row in read_rows(sweep[name].path) if "losses/mse_loss" in row))

    assert {"losses/l1_loss", "details/l1_coefficient"} <= keys("standard")
    assert {"losses/l0_loss", "details/l0_coefficient"} <= keys("jumprelu")
    assert {"losses/l1_loss", "losses/auxiliary_reconstruction_loss"} <= keys("gated")
    assert "losses/auxiliary_reconstruction_loss" in keys("topk")
    assert not {key for key in keys("topk") if "l1" in key or "l0_" in key}
    rows = [row for row in read_rows(sweep["standard"].path) if "details/l1_coefficient" in row]
    assert len({row["details/l1_coefficient"] for row in rows}) == len(rows)  # the controller moves it


def test_a_crosscoder_and_a_transcoder_get_what_their_sites_give(recipe, model) -> None:
    """The batches the trainers saw are those of the stream, side by side and as target."""
    from saekit.training.trainee import Trainee

    made = recipe(KINDS)
    batch = next(Activations(model, made.sites, torch.randint(5, 500, (8, 16)), 64, ring=64).batches())
    seen = {}
    for member in made.members[-2:]:
        trainee = Trainee(member, dict.fromkeys(made.sites, 256), model, {}, Path())
        trainee.trainer.step = lambda x, target, part=None, name=member.name: seen.update({name: (x, target)})
        trainee.step(batch)
    assert seen["transcoder"] == (batch[SITE], batch[MLP])
    x, target = seen["crosscoder"]
    assert target is None
    assert torch.equal(x, torch.cat([batch[OTHER], batch[SITE]], 1))


def test_a_nan_names_the_sae(recipe, model, tmp_path) -> None:
    hot = [TOPK, {**TOPK, "training": {"lr": 1e30, "clip_grad_norm": None}}]
    with pytest.raises(InvalidInput, match=r"the loss of .*lr1e.30 became NaN"):
        train(recipe(hot), model=model, runs=tmp_path)


def test_the_command_line(recipe, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "r.yaml", recipe([TOPK, {**TOPK, "k": 9}]))
    arguments = ["train", "r.yaml", "sae.1.k=12", "training.tokens=300"]
    assert main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "2 SAEs over one forward of tiny" in told
    assert "k12: topk, 48 latents, k = 12" in told
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [sae["name"] for sae in result["saes"]] == ["k6", "k12"]
    assert result["saes"][1]["path"] == "checkpoints/sweep/k12"
    assert result["saes"][1]["metrics"]["l0"] <= 12
    assert main([*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "checkpoints/sweep" in out
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [
        ["k6", "topk", "48"],
        ["k12", "topk", "48"],
    ]


def test_dry_run_tells_of_every_kind(recipe) -> None:
    from saekit.training.dry_run import describe
    from saekit.training.trainee import new_sae

    made = recipe(KINDS)
    told = describe(made)
    widths = dict.fromkeys(made.sites, 256)
    for member, one in zip(made.members, told["saes"], strict=True):
        sae = new_sae(member, widths, "tiny", {})
        assert one["parameters"] == sum(p.numel() for p in sae.parameters()), member.name
        assert (one["d_in"], one.get("d_out", sae.d_in)) == (sae.d_in, sae.d_out)
    by_name = {one["name"]: one for one in told["saes"]}
    assert by_name["topk"]["flops_per_token"] == 10 * 256 * 48
    assert by_name["transcoder"]["flops_per_token"] == 10 * 256 * 48 + 4 * 256**2
    assert told["ring_bytes"] == 450 * 3 * 256 * 4
    assert f"from {SITE} to {MLP} with a skip" in told["text"]
    assert f"at {OTHER} + {SITE}" in told["text"]


def test_dry_run_tells_how_processes_share_a_run(recipe) -> None:
    from saekit.recipe import ParallelSection
    from saekit.training.dry_run import describe

    assert "processes" not in describe(recipe(KINDS))["text"]
    shared = recipe(KINDS).model_copy(update={"parallel": ParallelSection(data=4, latents=2)})
    told = describe(shared)
    each = told["training_bytes"] / 2 / 2**20
    assert f"in 4 × 2 processes, each with 1/2 of the latents: {each:,.0f} MiB, some" in told["text"]
    any_number = shared.model_copy(update={"parallel": ParallelSection(latents=2)})
    assert "in any number of × 2 processes" in describe(any_number)["text"]
