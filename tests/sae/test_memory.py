from __future__ import annotations

import pytest
import torch

from saekit.sae import SAE, choosing, memory
from saekit.training.trainer import Trainer

CPU = torch.device("cpu")
LARGE = (512, 1024)  # two MB of float32


@pytest.fixture(autouse=True)
def nothing_spare():
    memory.clear()
    yield
    memory.clear()


def test_what_is_given_back_is_taken_again_and_by_one_only() -> None:
    one = memory.take(LARGE, torch.float32, CPU)
    where = one.data_ptr()
    memory.give(one)
    assert memory.take(LARGE, torch.bfloat16, CPU).data_ptr() != where
    assert memory.take((1024, 512), torch.float32, CPU).data_ptr() != where
    assert memory.take(LARGE, torch.float32, CPU).data_ptr() == where
    assert memory.take(LARGE, torch.float32, CPU).data_ptr() != where


def test_small_buffers_are_not_kept() -> None:
    small = torch.zeros(3, 4)
    memory.give(small)
    assert memory.take((3, 4), torch.float32, CPU).data_ptr() != small.data_ptr()


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
@pytest.mark.parametrize("dense", [0.0, 2.0])
def test_a_step_keeps_no_more_memory_than_the_one_before(architecture, compiled, dense, monkeypatch) -> None:
    """Dense products and plain torch give back gradients that they never took from here."""
    monkeypatch.setenv("SAEKIT_NATIVE", compiled)
    monkeypatch.setattr(choosing, "DENSE", dense)
    k = {"k": 4} if architecture == "topk" else {}
    trainer = Trainer(SAE.new(architecture, d_in=64, d_sae=8192, **k), batch_size=300, tokens=30_000)
    counts = []
    for seed in range(5):
        trainer.step(torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)))
        counts.append(sum(tensor.nbytes for spare in memory._spare.values() for tensor in spare))
    assert counts[0] > 0
    assert counts[2] == counts[3] == counts[4]


def test_two_trainers_side_by_side_do_not_disturb_each_other() -> None:
    def run(beside: bool) -> SAE:
        memory.clear()
        trainers = [
            Trainer(SAE.new("topk", d_in=64, d_sae=8192, k=4, seed=seed), batch_size=600, tokens=60_000)
            for seed in range(2 if beside else 1)
        ]
        for step in range(3):
            for trainer in trainers:
                trainer.step(torch.randn(600, 64, generator=torch.Generator().manual_seed(step)))
        return trainers[0].sae

    for (name, one), two in zip(run(False).named_parameters(), run(True).parameters(), strict=True):
        assert torch.equal(one, two), name
