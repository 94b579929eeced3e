"""Several processes train what one process trains: two gloo ranks on this machine, over tokens and over latents."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from conftest import SITE, sentences
from sketches import sketched

import saekit
from saekit.activations import Share
from saekit.cli import main
from saekit.errors import Interrupted, InvalidInput
from saekit.files import read_tensors
from saekit.recipe import Recipe, parse_recipe
from saekit.sae import SAE, choosing
from saekit.sae.ranks import Elsewhere, Group, Part, Ranks
from saekit.training.parallel import exchanged, ranks_of, refuse_several, shard, whole
from saekit.training.run import train
from saekit.training.tracking import read_rows
from saekit.training.trainee import Trainee
from saekit.training.trainer import Trainer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

D, S, B, STEPS = 16, 64, 96, 10
TRAINING = {"lr": 1e-3, "batch_size": B, "tokens": STEPS * B, "precision": "float32", "dead_after": 3 * B,
            "l1_coefficient": 2.0, "l0_coefficient": 0.5, "sparsity_warmup": 0.3}  # fmt: skip
CASES = {
    "standard": ("standard", {}, {}),
    "topk": ("topk", {"k": 4}, {}),
    "batchtopk": ("batchtopk", {"k": 4}, {}),
    "matryoshka": ("matryoshka", {"k": 4}, {}),
    "jumprelu": ("jumprelu", {}, {}),
    "jumprelu, tanh": ("jumprelu", {}, {"l0_penalty": "tanh"}),
    "gated": ("gated", {}, {}),
    "k above a block": ("topk", {"k": 40}, {}),
    "aux_k above the dead": ("topk", {"k": 2}, {"aux_k": 30}),
    "standard with AuxK": ("standard", {}, {"dead_latents": "auxk", "l1_coefficient": 20.0}),
    "whitened": ("batchtopk", {"k": 4}, {"normalize": "whiten"}),
    "skip transcoder": ("topk", {"k": 4, "d_out": 12, "skip": True}, {}),
    "crosscoder": ("gated", {"site": ["a", "b"], "widths": [12, 4]}, {}),
    "controlled": ("standard", {}, {"target_l0": 8}),
    "on the grid": ("gated", {}, {}),
    "resampled": ("standard", {}, {"dead_latents": "resample", "dead_after": B, "resample_at": (0.5,), "l1_coefficient": 20.0}),
}  # fmt: skip
RUN_STEPS, STOPPED = 8, 5
SPARSE_BELOW = choosing.DENSE
LAYOUTS = {"tokens": (2, 1), "latents": (1, 2)}


def rows(step: int) -> torch.Tensor:
    """Sparse combinations of S directions, the same at each call."""
    draw = torch.Generator().manual_seed(step)
    truth = torch.randn(S, D, generator=torch.Generator().manual_seed(99))
    return (torch.rand(B, S, generator=draw) * (torch.rand(B, S, generator=draw) < 0.06)) @ truth + 0.3


def target(x: torch.Tensor) -> torch.Tensor:
    return (x @ torch.randn(D, 12, generator=torch.Generator().manual_seed(5))).relu()


def part_of(step: int, group: Group) -> Part | None:
    """Uneven parts, and at one step none for the second process."""
    if group.size == 1:
        return None
    of = torch.zeros(B, dtype=torch.long) if step == 4 else (torch.arange(B) % 3 == 1).long()
    return Part((of == group.rank).nonzero().squeeze(1), B)


def trained(case: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Losses [STEPS], other figures, this process's share of the weights, and what they make together."""
    architecture, options, training = CASES[case]
    choosing.DENSE = -1.0 if case == "on the grid" else SPARSE_BELOW
    sae = SAE.new(architecture, d_in=D, d_sae=S, **options)
    trainer = Trainer(shard(sae, ranks), ranks=ranks, **(TRAINING | training))
    outs = []
    for step in range(STEPS):
        x, part = rows(step), part_of(step, ranks.data)
        mine = slice(None) if part is None else part.numbers
        y = target(x)[mine] if sae.is_transcoder else None
        outs.append(trainer.step(x[mine], y, part=part))
    found = {f"out.{name}": torch.stack([getattr(out, name) for out in outs]) for name in outs[0]._fields}
    found |= {f"own.{name}": p.detach().clone() for name, p in trainer.sae.state_dict().items()}
    if (made := whole(trainer.sae, ranks)) is not None:
        found |= {f"whole.{name}": p.detach() for name, p in made.state_dict().items()}
    return found


def raw_recipe(folder: Path, name: str, steps: int, **parallel: int) -> dict[str, object]:
    """A small sweep whose steps do not depend on how many there are to be."""
    return {
        "name": name, "model": "tiny", "dtype": "float32", "device": "cpu", "site": SITE,
        "report": steps == RUN_STEPS and name != "latents",  # of one process, of two that share tokens or latents
        "data": {"text": str(folder / "text.jsonl"), "context_size": 32, "held_out": 0.015},
        "sae": [{"architecture": "topk", "d_sae": 96, "k": 8}, {"architecture": "standard", "d_sae": 64}],
        "training": {"tokens": steps * 128, "batch_size": 128, "lr": 1e-3, "lr_schedule": "constant", "lr_warmup": 0,
                     "sparsity_warmup": 0, "ring": 512, "contexts": 2, "log_every": 2, "evaluate_tokens": 300,
                     "checkpoint_every": 4, "precision": "float32"},
        "parallel": parallel,
    }  # fmt: skip


def recipe(folder: Path, name: str, steps: int = RUN_STEPS, **parallel: int) -> Recipe:
    made = parse_recipe(raw_recipe(folder, name, steps, **parallel))
    assert isinstance(made, Recipe)
    return made


def runs_in_two(rank: int, folder: Path, model: TransformerBridge) -> None:
    """A run over latents that only the second process is asked to stop, and one that was begun by one process."""
    runs, step = folder / "runs", Trainee.step

    def stopping(self, batch, part=None):
        out = step(self, batch, part)
        if rank == 1 and self.trainer.steps_taken == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    Trainee.step = stopping
    with pytest.raises(Interrupted, match=f"stopped at step {STOPPED} of {RUN_STEPS}") as stopped:
        train(recipe(folder, "latents", latents=2), model=model, runs=runs)
    assert isinstance(stopped.value, Elsewhere) == (rank == 1)
    Trainee.step = step
    train(recipe(folder, "back", latents=2), model=model, runs=runs, resume=True)
    with pytest.raises(Interrupted if rank else InvalidInput, match="back exists: resume it"):
        train(recipe(folder, "back", latents=2), model=model, runs=runs)


def exchange_rows(group: Group) -> None:
    """Whoever made them, all have all rows in the batch's order, to the bit; also where one has none."""
    batch = torch.randn(B, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for step in (3, 4):
        part = part_of(step, group)
        assert part is not None
        found = exchanged(Share({"a": batch[part.numbers]}, part.numbers, B), group)
        assert torch.equal(found.rows["a"], batch)
        assert found.numbers.tolist() == list(range(B))


def command_in_two(rank: int, folder: Path, model: TransformerBridge, port: int) -> None:
    """`saekit train` with what torchrun sets; what each says goes to a file. (The page many-gpus.md calls torchrun itself.)"""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    saekit.load_model = lambda *_, **__: model
    with (
        (folder / f"out-{rank}").open("w") as out,
        (folder / f"err-{rank}").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        assert main(["train", str(folder / "tokens.yaml"), "--json"]) == 0


def rank_work(rank: int, folder: Path, model: TransformerBridge, port: int) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    found = {}
    for layout, (data, latents) in LAYOUTS.items():
        with ranks_of(data, latents) as ranks:
            found |= {(layout, case): trained(case, ranks) for case in CASES}
            if latents > 1:
                exchange_rows(ranks.latents)
    torch.save(found, folder / f"{rank}.pt")
    with sketched():
        runs_in_two(rank, folder, model)
        dist.destroy_process_group()
        command_in_two(rank, folder, model, port)


def work(_: int, folder: str) -> None:
    """Both processes: the second is forked when all is loaded, which costs more than what they do."""
    torch.set_num_threads(1)
    os.chdir(folder)
    model = saekit.load_model("tiny", dtype="float32", device="cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    second = os.fork()
    if not second:
        code = 1
        try:
            rank_work(1, Path(folder), model, port)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    rank_work(0, Path(folder), model, port)
    assert os.waitpid(second, 0)[1] == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Where two processes worked, and one before them."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(80)))
    train(recipe(folder, "alone"), model=model, runs=folder / "runs")
    train(recipe(folder, "back", 4), model=model, runs=folder / "runs")
    (folder / "tokens.yaml").write_text(yaml.safe_dump(raw_recipe(folder, "tokens", RUN_STEPS)))
    mp.spawn(work, (str(folder),))
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What each of two processes found, by layout and case."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one():
    found = {case: trained(case, Ranks()) for case in CASES}
    choosing.DENSE = SPARSE_BELOW
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(one, two, layout, case) -> None:
    alone = one[case]
    first, second = (found[layout, case] for found in two)
    torch.testing.assert_close(first["out.loss"], alone["out.loss"], rtol=1e-6, atol=0)
    for name, figure in alone.items():
        if name.startswith("out."):
            torch.testing.assert_close(first[name], figure, rtol=1e-5, atol=1e-6, equal_nan=True)
            assert torch.equal(first[name], second[name]), name
        if name.startswith("whole."):
            torch.testing.assert_close(first[name], figure, rtol=1e-3, atol=1e-4)
    same = ("own.b_dec", "own.W_skip") if layout == "latents" else [n for n in first if n.startswith("own.")]
    for name in same:
        if name in first:
            assert torch.equal(first[name], second[name]), name
    if layout == "latents":
        assert first["own.W_dec"].shape[0] == second["own.W_dec"].shape[0] == S // 2


def test_the_cases_reach_what_they_are_for(one) -> None:
    for case in ("topk", "aux_k above the dead", "standard with AuxK"):
        assert one[case]["out.dead"].amax() > 0, case
        assert one[case]["out.aux"].amax() > 0, case
    dead = one["resampled"]["out.dead"]
    assert dead.diff().amin() < -0.05


def close(run: Path, to: Path) -> None:
    """Rows and SAEs of two runs are the same but for rounding."""
    for member in ("topk", "standard"):
        ours, theirs = read_rows(run / member), read_rows(to / member)
        losses = [
            {row["step"]: row["losses/overall_loss"] for row in rows if "losses/overall_loss" in row}
            for rows in (ours, theirs)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert ours[-1] == pytest.approx(theirs[-1], rel=1e-3, abs=1e-4)
        one, other = (SAE.load(path / member / "final") for path in (run, to))
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_command_over_tokens_is_the_run_of_one(folder) -> None:
    told = json.loads((folder / "out-0").read_text())
    assert (folder / "err-0").read_text().count("step 8/8") == 1
    assert not (folder / "out-1").read_text() + (folder / "err-1").read_text()
    run, alone = folder / told["path"], folder / "runs" / "alone"
    close(run, alone)
    assert [p.relative_to(run) for p in sorted(run.rglob("*"))] == [
        p.relative_to(alone) for p in sorted(alone.rglob("*"))
    ]
    assert [p.name for p in run.glob("step-8/*.safetensors")] == ["state.safetensors"]
    assert (
        len(list(run.glob("*/report.html")))
        == len(list((folder / "runs" / "back").glob("*/report.html")))
        == 2
    )


def test_one_process_goes_on_with_the_shards_of_two(folder, model) -> None:
    path = folder / "runs" / "latents"
    shards = sorted(path.glob(f"step-{STOPPED}/*.safetensors"))
    assert len(shards) == 2
    assert read_tensors(shards[0])["topk/sae.W_enc"].shape == (256, 48)
    train(recipe(folder, "latents"), model=model, runs=folder / "runs", resume=True)
    close(path, folder / "runs" / "alone")
    assert [p.name for p in path.glob("step-8/*.safetensors")] == ["state.safetensors"]


def test_two_processes_go_on_with_what_one_began(folder) -> None:
    close(folder / "runs" / "back", folder / "runs" / "alone")
    assert len(list((folder / "runs" / "back").glob("step-8/shard-*.safetensors"))) == 2


def test_what_cannot_be_shared_is_said(tmp_path, monkeypatch) -> None:
    with (
        pytest.raises(InvalidInput, match=r"data × latents = 1 × 2 takes 2 processes, this run has 1;"),
        ranks_of(None, 2),
    ):
        pass
    with pytest.raises(
        InvalidInput, match="parallel.latents: 5 processes cannot share d_sae = 96, 64 evenly"
    ):
        recipe(tmp_path, "run", latents=5)
    uneven = Ranks(latents=Group(0, 3))
    with pytest.raises(InvalidInput, match="3 processes cannot share d_sae = 64 latents evenly"):
        shard(SAE.new("standard", d_in=4, d_sae=64), uneven)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(
            InvalidInput, match=r"3 × 1 takes 3 .* has 2; start it with torchrun --nproc-per-node 3"
        ),
        ranks_of(3, 1),
    ):
        pass
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Elsewhere), ranks_of(3, 1):  # said once
        pass
    with pytest.raises(
        InvalidInput, match="a language model is trained in one process, torchrun has started 2"
    ):
        refuse_several("a language model is trained")


def test_one_process_needs_no_torch_distributed() -> None:
    code = (
        "import sys, torch; before = {*sys.modules}\n"
        "from saekit.training.parallel import ranks_of\n"
        "with ranks_of(None, 1) as ranks: assert ranks.alone\n"
        "sys.exit(any(name.startswith('torch.distributed.checkpoint') for name in {*sys.modules} - before))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
