from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import InvalidInput
from saekit.sae import SAE
from saekit.training.schedules import learning_rate, warmed
from saekit.training.trainer import Trainer, geometric_median, remove_parallel

D, S, B = 16, 64, 256


def superposition(n: int, seed: int = 0, active: int = 3, scale: float = 1.0) -> torch.Tensor:
    """Sparse combinations of S known directions in D dimensions."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(
        torch.randn(S, D, generator=torch.Generator().manual_seed(99)), dim=1
    )
    chosen = torch.rand(n, S, generator=draw).topk(active, dim=1).indices
    weights = torch.rand(n, active, generator=draw) + 0.5
    return scale * torch.einsum("nk,nkd->nd", weights, truth[chosen])


def run(architecture, steps=150, scale=1.0, dtype=torch.float32, **training):
    options = {"k": 4} if architecture == "topk" else {}
    sae = SAE.new(architecture, d_in=D, d_sae=S, seed=0, **options)
    training = {"lr": 3e-3, "tokens": steps * B, "batch_size": B, "l1_coefficient": 0.5} | training
    trainer = Trainer(sae, **training)
    outs = [trainer.step(superposition(B, seed, scale=scale).to(dtype)) for seed in range(steps)]
    return trainer, outs


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_training_learns(architecture) -> None:
    trainer, outs = run(architecture)
    assert outs[-1].explained_variance > 0.7
    assert outs[-1].explained_variance > outs[0].explained_variance + 0.2
    assert trainer.tokens_seen == 150 * B
    if architecture == "topk":
        assert outs[-1].l0 <= 4
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1) * trainer.scale, torch.ones(S))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_the_scale_of_the_data_does_not_matter(architecture) -> None:
    # Weights stay in raw units; the trajectory is that of normalised data whatever the units are.
    (one, outs), (other, scaled) = run(architecture, 40), run(architecture, 40, scale=64.0)
    for a, b in zip(outs, scaled, strict=True):
        torch.testing.assert_close(a.explained_variance, b.explained_variance, atol=2e-4, rtol=0)
    torch.testing.assert_close(other.scale * 64, one.scale, rtol=1e-5, atol=0)
    x = superposition(20, 1234)
    torch.testing.assert_close(other.sae(64 * x) / 64, one.sae(x), atol=5e-3, rtol=5e-3)


def test_scaled_units_are_those_of_plain_adam_on_normalised_data() -> None:
    """The trick of `trainer`: weights in raw units, optimizer in scaled ones = scaling the data, then folding."""
    x = superposition(B, 7, scale=10.0)
    raw = SAE.new("standard", d_in=D, d_sae=S)
    trainer = Trainer(
        raw,
        lr=1e-2,
        tokens=10 * B,
        batch_size=B,
        l1_coefficient=2.0,
        lr_warmup=0,
        lr_schedule="constant",
        l1_warmup=0,
    )
    for _ in range(3):
        trainer.step(x)
    s = math.sqrt(D) / x.norm(dim=1).mean().item()
    plain = SAE.new("standard", d_in=D, d_sae=S)
    with torch.no_grad():
        plain.b_dec.copy_(geometric_median(s * x))
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=6.25e-10)
    for _ in range(3):
        f = plain.encode(s * x)
        loss = (s * x - plain.decode(f)).square().sum(1).mean() + 2.0 * (f @ plain.W_dec.norm(dim=1)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
    torch.testing.assert_close(raw.W_enc, s * plain.W_enc, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.W_dec, plain.W_dec / s, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.b_dec, plain.b_dec / s, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.b_enc, plain.b_enc, rtol=1e-3, atol=1e-5)


def test_same_seed_same_bits() -> None:
    one, two = run("topk", 20)[0], run("topk", 20)[0]
    for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_restored_state_goes_on_with_the_same_bits(architecture) -> None:
    whole, _ = run(architecture, 30, dead_after=4 * B)
    half = Trainer(
        SAE.new(architecture, d_in=D, d_sae=S, **({"k": 4} if architecture == "topk" else {})),
        **whole.config.model_dump(),
    )
    for seed in range(13):
        half.step(superposition(B, seed))
    saved = {name: tensor.clone().contiguous() for name, tensor in half.tensors().items()}
    resumed = Trainer(
        SAE.new(architecture, d_in=D, d_sae=S, seed=5, **({"k": 4} if architecture == "topk" else {})),
        **whole.config.model_dump(),
    )
    resumed.restore(saved, half.counters())
    for seed in range(13, 30):
        resumed.step(superposition(B, seed))
    for (name, a), b in zip(whole.tensors().items(), resumed.tensors().values(), strict=True):
        assert torch.equal(a, b), name


def test_dead_latents_are_counted_in_tokens() -> None:
    trainer, _ = run("topk", 1, dead_after=3 * B)
    with torch.no_grad():
        trainer.sae.W_enc[:, :5] = 0
        trainer.sae.b_enc[:5] = -1e6
    trainer.tokens_since_fired.zero_()
    dead = [float(trainer.step(superposition(B, i)).dead) for i in range(3)]
    assert dead[:2] == [0.0, 0.0]
    assert dead[2] >= 5 / S


def test_bfloat16_batches_are_taken() -> None:
    assert run("topk", 60, dtype=torch.bfloat16)[1][-1].explained_variance > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.step(torch.zeros(3, D + 1)), rf"expected activations \[B, {D}\], got \(3, 17\)"),
        (lambda t: t.step(torch.zeros(0, D)), r"got \(0, 16\)"),
        (lambda t: t.step(torch.zeros(4, D)), "every activation in the first batch is zero"),
        (lambda t: t.step(torch.full((4, D), float("nan"))), "NaN"),
    ],
)
def test_wrong_batches_are_told(call, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(Trainer(SAE.new("standard", d_in=D, d_sae=S)))


def test_wrong_keywords_are_all_listed() -> None:
    with pytest.raises(InvalidInput, match=r"lr: .*; leaning_rate: "):
        Trainer(SAE.new("standard", d_in=D, d_sae=S), lr=-1, leaning_rate=3)


def test_every_training_field_is_read_somewhere() -> None:
    from pathlib import Path

    import saekit
    from saekit.training.config import TrainingConfig

    code = "".join(p.read_text() for p in Path(saekit.__file__).parent.rglob("*.py") if p.name != "config.py")
    for field in TrainingConfig.model_fields:
        assert f".{field}" in code, f"training.{field} is read by nobody"


def test_remove_parallel_leaves_only_what_is_across() -> None:
    rows, grad = torch.randn(5, 4), torch.randn(5, 4)
    across = grad.clone()
    remove_parallel(rows, across)
    torch.testing.assert_close((across * rows).sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        across, grad - (grad * rows).sum(1, keepdim=True) * rows / rows.square().sum(1, keepdim=True)
    )


def test_geometric_median_resists_an_outlier() -> None:
    x = torch.randn(101, 3, generator=torch.Generator().manual_seed(0))
    x[0] = 1e6
    assert geometric_median(x).norm() < 1
    assert x.mean(0).norm() > 1000


@given(
    st.integers(1, 500), st.sampled_from(["linear", "cosine", "constant"]), st.floats(0, 1), st.floats(0, 1)
)
def test_schedules_stay_in_bounds(steps, shape, warmup, decay) -> None:
    values = [learning_rate(i, steps, shape=shape, warmup=warmup, decay=decay) for i in range(steps)]
    assert all(0 <= v <= 1 for v in values)
    assert all(0 <= warmed(i, steps, warmup) <= 1 for i in range(steps))


def test_the_linear_schedule_is_what_it_says() -> None:
    rate = [learning_rate(i, 100, shape="linear", warmup=0.1, decay=0.2) for i in range(100)]
    assert rate[0] == pytest.approx(0.1)
    assert rate[9:80] == [1.0] * 71
    assert rate[90] == pytest.approx(0.5)
    assert rate[99] == pytest.approx(0.05)
