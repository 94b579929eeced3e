from __future__ import annotations

import pytest
import torch

from saekit.sae import SAE, choosing, memory
from saekit.sae.architectures import Terms
from saekit.training.trainer import Trainer

CPU = torch.device("cpu")
LARGE = (512, 1024)  # two MB of float32


@pytest.fixture(autouse=True)
def nothing_spare():
    memory.clear()
    yield
    memory.clear()


def test_what_is_forgotten_is_taken_again_and_by_one_only() -> None:
    one = memory.take(LARGE, torch.float32, CPU)
    where = one.data_ptr()
    assert memory.take(LARGE, torch.float32, CPU).data_ptr() != where, "one looks at it"
    row = one[3:4].t()
    del one
    assert memory.take(LARGE, torch.float32, CPU).data_ptr() != where, "so does a part of it"
    del row
    found = [memory.take(LARGE, torch.float32, CPU) for _ in range(3)]
    assert [tensor.data_ptr() for tensor in found].count(where) == 1


def test_a_buffer_of_as_many_bytes_serves_any_shape_and_dtype() -> None:
    where = memory.take(LARGE, torch.float32, CPU).data_ptr()
    other = memory.take((1024, 1024), torch.bfloat16, CPU)
    assert (other.data_ptr(), other.shape, other.dtype) == (where, (1024, 1024), torch.bfloat16)
    assert other.is_contiguous()
    assert not other._is_view(), "autograd would not add to it in place"
    assert memory.take((512, 512), torch.float32, CPU).data_ptr() != where


def test_an_exception_gives_back_what_it_cuts_off() -> None:
    def fail(tensor):
        raise ValueError(tensor.shape)

    tensor = memory.take(LARGE, torch.float32, CPU)
    where = tensor.data_ptr()
    with pytest.raises(ValueError, match="512"):
        fail(tensor)
    del tensor
    assert memory.take(LARGE, torch.float32, CPU).data_ptr() == where


def spare() -> int:
    return sum(block.nbytes for blocks in memory._spare.values() for block in blocks)


def test_no_more_than_a_few_of_a_size_are_kept_and_none_after_clear() -> None:
    taken = [memory.take(LARGE, torch.float32, CPU) for _ in range(memory.KEPT + 2)]
    nbytes = taken[0].nbytes
    assert spare() == 0
    taken.clear()
    assert spare() == memory.KEPT * nbytes
    taken = [memory.take(LARGE, torch.float32, CPU)]
    memory.clear()
    taken.clear()
    assert spare() == 0, "what was in use when all was let go is let go of later"


def test_small_buffers_are_not_kept() -> None:
    memory.take((3, 4), torch.float32, CPU)
    assert spare() == 0


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu", "gated"])
@pytest.mark.parametrize("dense", [0.0, 2.0])
def test_a_warm_step_makes_no_large_buffer_and_keeps_no_more_than_the_one_before(
    architecture, compiled, dense, monkeypatch
) -> None:
    monkeypatch.setenv("SAEKIT_NATIVE", compiled)
    monkeypatch.setattr(choosing, "DENSE", dense)
    made, new = [], memory._new
    monkeypatch.setattr(memory, "_new", lambda nbytes: made.append(nbytes) or new(nbytes))
    k = {"k": 4} if architecture == "topk" else {}
    trainer = Trainer(SAE.new(architecture, d_in=64, d_sae=8192, **k), batch_size=300, tokens=30_000)
    kept = []
    for seed in range(5):
        made_before = len(made)
        trainer.step(torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)))
        kept.append(spare())
    assert made
    assert len(made) == made_before
    assert kept[2] == kept[3] == kept[4] > 0


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_graph_may_be_walked_twice(architecture, monkeypatch) -> None:
    """Nobody has given back, or written over, what the second time needs."""
    monkeypatch.setattr(choosing, "DENSE", 0.0)
    sae = SAE.new(architecture, d_in=64, d_sae=2048)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    loss = sae.kind.objective(sae, x, x, Terms(scale=1.0, sparsity=0.1)).loss
    leaves = list(sae.parameters())
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


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
