"""Training a small language model: it learns, it resumes exactly, and what it writes is a model like any other."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saekit
from saekit.errors import FileMissing, Interrupted, InvalidInput
from saekit.files import read_json, read_tensors
from saekit.recipe import LanguageModelRecipe, parse_recipe, read_recipe
from saekit.tokens import Position
from saekit.training import language_model as lm
from saekit.training.language_model import train_language_model
from saekit.training.tracking import SAMPLES, read_rows

STEPS = 24
WORDS = ["amber", "boat", "cellar", "drum", "ember", "flute", "grain", "harbour", "inlet", "jar"]


def write_texts(path: Path, n: int, seed: int, sources: list[str] | None = None) -> None:
    draw = random.Random(seed)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for i in range(n):
            text = ". ".join(" ".join(draw.choices(WORDS, k=4)) for _ in range(draw.randint(1, 12)))
            row = {"text": text} | ({"source": sources[i % len(sources)]} if sources else {})
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LanguageModelRecipe]:
    """A recipe over made-up texts in two files; keywords go into its training section."""
    write_texts(tmp_path / "long.jsonl.gz", 60, 0)
    write_texts(tmp_path / "short.jsonl.gz", 8, 1)
    write_texts(tmp_path / "heldout.jsonl.gz", 10, 2, ["short", "long"])

    def build(**training: Any) -> LanguageModelRecipe:
        raw = {
            "name": "toy",
            "language_model": {
                "width": 32,
                "blocks": 2,
                "heads": 2,
                "tokenizer": {"vocab_size": 300, "repeat": {"short": 3}},
            },
            "dtype": "float32",
            "device": "cpu",
            "data": {
                "text": [str(tmp_path / "long.jsonl.gz"), str(tmp_path / "short.jsonl.gz")],
                "repeat": {"short": 2},
                "held_out_text": str(tmp_path / "heldout.jsonl.gz"),
                "context_size": 16,
            },
            "training": {
                "tokens": STEPS * 4 * 16,
                "batch_size": 4,
                "lr": 1e-2,
                "log_every": 3,
                "evaluate_every": 6,
                "checkpoint_every": 5,
                **training,
            },
        }
        recipe = parse_recipe(raw)
        assert isinstance(recipe, LanguageModelRecipe)
        return recipe

    return build


def train(recipe: LanguageModelRecipe, run: Path, *, resume: bool = False) -> Path:
    return train_language_model(recipe, run, resume=resume, report=lambda line: None)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows, without the one figure that depends on the clock."""
    return [
        {key: value for key, value in row.items() if key != "details/tokens_per_second"}
        for row in read_rows(run)
    ]


def assert_same_end(run: Path, other: Path) -> None:
    ours, theirs = (read_tensors(path / f"step-{STEPS}" / "state.safetensors") for path in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert rows_of(run) == rows_of(other)
    for name in ("model.safetensors", "tokenizer.json", "README.md"):
        assert (run / "final" / name).read_bytes() == (other / "final" / name).read_bytes()


def test_it_learns_and_the_result_is_a_model_like_any_other(make: Any, tmp_path: Path) -> None:
    recipe = make(tokens=60 * 64)
    final = train(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    losses = [row["losses/overall_loss"] for row in rows if "losses/overall_loss" in row]
    assert losses[0] > 5  # of ln 300 = 5.7
    assert losses[-1] < losses[0] - 1.5
    assert rows[-1].keys() == {"step", SAMPLES, "held_out/long", "held_out/short"}
    assert rows[-1]["step"] == 60
    assert rows[-1][SAMPLES] == 60 * 64

    model = saekit.load_model(final, dtype="float32", device="cpu")
    assert (model.cfg.d_model, model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_ctx) == (32, 2, 2, 16)
    assert model.to_tokens("amber boat")[0].tolist()[0] == 0
    assert (model.to_tokens("amber boat")[0] == 0).sum() == 1
    assert model.tokenizer("amber boat")["input_ids"][0] == 0
    assert 0 not in model.tokenizer("amber boat", add_special_tokens=False)["input_ids"]
    config = read_json(final / "config.json")
    assert (config["dtype"], config["bos_token_id"], config["eos_token_id"]) == ("bfloat16", 0, 0)
    assert {t.dtype for t in read_tensors(final / "model.safetensors").values()} == {torch.bfloat16}

    card = (final / "README.md").read_text("utf-8")
    assert "width 32, 2 blocks, 2 heads, context 16" in card
    assert "60 steps of 4 × 16 tokens (3,840 tokens" in card
    assert f"short {rows[-1]['held_out/short']:.2f}" in card
    assert "(short × 2)" in card
    assert str(tmp_path) not in card

    resolved = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert resolved == recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_like_one_that_never_stopped(make: Any, tmp_path: Path, dtype: str) -> None:
    recipe = make().model_copy(update={"dtype": dtype})
    train(recipe, tmp_path / "whole")

    def interrupt(line: str) -> None:
        if line.startswith("step 12 "):
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"stopped at step 12 of 24; go on with --resume"):
        train_language_model(recipe, run, resume=False, report=interrupt)
    assert (run / "step-12" / "manifest.json").exists()
    assert not (run / "final").exists()
    lines: list[str] = []
    # the dtype is that of the run so far, whatever this machine would choose now
    train_language_model(recipe.model_copy(update={"dtype": None}), run, resume=True, report=lines.append)
    assert f"resumed from {run / 'step-12'}" in lines
    assert_same_end(run, tmp_path / "whole")


def test_a_run_that_crashed_between_checkpoints_takes_its_steps_again(make: Any, tmp_path: Path) -> None:
    train(make(), tmp_path / "whole")

    def crash(line: str) -> None:
        if line.startswith("step 18 "):
            raise OSError("the terminal went away")

    with pytest.raises(OSError, match="went away"):
        train_language_model(make(), tmp_path / "crashed", resume=False, report=crash)
    assert rows_of(tmp_path / "crashed")[-1]["step"] == 18
    assert (tmp_path / "crashed" / "step-15").exists()
    train(make(), tmp_path / "crashed", resume=True)
    assert_same_end(tmp_path / "crashed", tmp_path / "whole")


def test_a_killed_process_leaves_a_run_to_resume(make: Any, tmp_path: Path) -> None:
    recipe, run = make(), tmp_path / "killed"
    train(recipe, tmp_path / "whole")
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys, time\nfrom pathlib import Path\n"
        "from saekit.recipe import parse_recipe\n"
        "from saekit.training.language_model import train_language_model\n"
        "recipe, run = parse_recipe(json.loads(sys.argv[1])), Path(sys.argv[2])\n"
        "def report(line):  # the kill is waited for\n"
        "    time.sleep(300 if (run / 'step-10').exists() else 0)\n"
        "train_language_model(recipe, run, resume=False, report=report)\n"
    )
    child = subprocess.Popen([sys.executable, script, recipe.model_dump_json(), run])
    try:
        give_up = time.monotonic() + 120
        while not (run / "step-10").exists() and child.poll() is None and time.monotonic() < give_up:
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert (run / "step-10").exists()
    assert not (run / "final").exists()
    train(recipe, run, resume=True)
    assert_same_end(run, tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(make: Any, tmp_path: Path) -> None:
    def sums() -> dict[str, tuple[int, str]]:
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        return {
            str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        }

    final = train(make(), tmp_path / "run")
    before, lines = sums(), []
    assert train_language_model(make(), tmp_path / "run", resume=True, report=lines.append) == final
    assert lines == [f"{tmp_path / 'run'} is finished; nothing to do"]
    assert sums() == before


def test_a_run_goes_on_longer_but_not_otherwise(make: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make(), run)
    with pytest.raises(InvalidInput, match=r"run .* exists: resume it"):
        train(make(), run)
    with pytest.raises(InvalidInput, match=r"another recipe: training\.batch_size, training\.lr changed"):
        train(make(lr=1e-3, batch_size=2), run, resume=True)
    train(make(tokens=30 * 64, log_every=1), run, resume=True)
    assert read_rows(run)[-1]["step"] == 30
    assert sorted(path.name for path in run.glob("step-*")) == ["step-25", "step-30"]


def test_the_learning_rate_rises_stays_and_falls(make: Any, tmp_path: Path) -> None:
    train(make(log_every=1, lr_warmup=0.25, lr_decay=0.5, lr_end=0.1), tmp_path / "run")
    rates = [
        r["details/current_learning_rate"] for r in read_rows(tmp_path / "run") if "losses/overall_loss" in r
    ]
    assert rates[0] == pytest.approx(1e-2 * (0.1 + 0.9 / 6))
    assert rates[5:13] == pytest.approx([1e-2] * 8)
    assert rates[-1] == pytest.approx(1e-2 * (0.1 + 0.9 / 12))
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[13:]))


def test_losses_and_gradients_are_those_of_plain_cross_entropy(make: Any) -> None:
    """The loss is made in slices and again in the backward; 40 × 16 positions are three slices."""
    model = lm.new_model(make(), 300, torch.device("cpu"))
    ids = torch.randint(0, 300, (40, 17), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    losses = lm.token_losses(model, ids)
    plain = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), plain)
    for ours, theirs in zip(
        torch.autograd.grad(losses.mean(), parameters),
        torch.autograd.grad(plain.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_every_position_is_trained(make: Any) -> None:
    model = lm.new_model(make(), 300, torch.device("cpu"))
    lm.token_losses(model, torch.randint(0, 300, (4, 17))).mean().backward()
    gradient: Tensor = model.transformer.wpe.weight.grad
    assert (gradient.abs().sum(1) > 0).all()


def test_the_seed_alone_decides_the_first_weights(make: Any) -> None:
    state = torch.get_rng_state()
    first, again = (lm.new_model(make(), 300, torch.device("cpu")).transformer.wte.weight for _ in range(2))
    other_seed = make().model_copy(update={"seed": 1})
    other = lm.new_model(other_seed, 300, torch.device("cpu")).transformer.wte.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


def test_held_out_loss_does_not_count_predicting_bos(make: Any, tmp_path: Path) -> None:
    final = train(make(), tmp_path / "run")
    model = saekit.load_model(final, dtype="float32", device="cpu").original_model
    tokenizer = lm._tokenizer(make(), {}, tmp_path / "run" / "tokenizer", lambda line: None)
    stream: list[int] = []
    for ids in lm.encode(tokenizer, lm.read_held_out(make())["short"]):
        stream += [0, *ids.tolist()]
    total, count = 0.0, 0
    while stream:  # contexts by hand: 17 ids, a BOS in front of each
        row = stream[:17] if stream[0] == 0 else [0, *stream[:16]]
        stream = stream[17:] if stream[0] == 0 else stream[16:]
        logprobs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
        for at, target in enumerate(row[1:]):
            if target != 0:
                total, count = total - logprobs[at, target].item(), count + 1
    logged = read_rows(tmp_path / "run")[-1]["held_out/short"]
    assert total / count == pytest.approx(logged, abs=0.02)  # the model on disk is rounded to bf16


def test_an_epoch_holds_each_document_as_often_as_asked(make: Any) -> None:
    recipe = make()
    texts = lm.read_texts(recipe)
    tokenizer = lm.train_tokenizer([text for some in texts.values() for text in some], 300, 16)
    corpus = lm._corpus(recipe, tokenizer, texts)
    assert len(corpus) == 60 + 2 * 8
    decoded = sorted(tokenizer.decode(ids) for ids in corpus)
    assert decoded == sorted(texts["long"] + 2 * texts["short"])
    contexts = lm._contexts(recipe, tokenizer, corpus, epochs=None)
    batches = contexts.batches(4)
    seen = 0
    while (batch := next(batches)).position.epoch == 0:
        assert batch.ids.shape == (4, 17)
        assert (batch.ids[:, 0] == 0).all()
        seen += 4
    assert seen * 16 == pytest.approx(sum(1 + len(ids) for ids in corpus), rel=0.1)
    resumed = next(contexts.batches(4, Position(*batch.position)))
    assert torch.equal(resumed.ids, next(batches).ids)


def test_the_tokenizer_gives_every_text_back(make: Any) -> None:
    tokenizer = lm.train_tokenizer(["amber boat amber boat", "amber"], 300, 16)
    again = lm.train_tokenizer(["amber boat amber boat", "amber"], 300, 16)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    for text in ("amber boat", "  Ünïcode — 漢字 🙂\n\n\tend ", ""):
        assert tokenizer.decode(lm.encode(tokenizer, [text])[0]) == text


def test_mistakes_are_told(make: Any, tmp_path: Path) -> None:
    recipe = make()
    typo = recipe.model_copy(update={"data": recipe.data.model_copy(update={"repeat": {"shor": 2}})})
    with pytest.raises(
        InvalidInput, match=r"repeat: 'shor' is no file of data\.text .* Did you mean short\?"
    ):
        train(typo, tmp_path / "run")
    nowhere = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"held_out_text": "gone.jsonl"})}
    )
    with pytest.raises(FileMissing, match=r"gone\.jsonl does not exist"):
        train(nowhere, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing is begun that cannot be trained
    with pytest.raises(InvalidInput, match=r"the loss became .* lower training\.lr \(now 1e\+20\)"):
        train(make(lr=1e20), tmp_path / "hot")
    with pytest.raises(InvalidInput, match="width = 30 is not a multiple of heads = 4"):
        parse_recipe({**recipe.model_dump(), "language_model": {"width": 30, "heads": 4}})


def test_the_shipped_recipe_is_the_card_of_the_tiny_model() -> None:
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "tiny_lm.yaml")
    assert isinstance(recipe, LanguageModelRecipe)
    assert recipe.steps * recipe.tokens_per_step == recipe.training.tokens
