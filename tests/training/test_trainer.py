from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import InvalidInput
from saekit.sae import SAE
from saekit.sae.architectures import ARCHITECTURES
from saekit.training.frame import scaling, whitening
from saekit.training.schedules import learning_rate, warmed
from saekit.training.trainer import Trainer, geometric_median, origin

D, S, B = 16, 64, 256


@functools.cache  # the tests take the same batches again and again
def superposition(n: int, seed: int = 0, active: int = 3, scale: float = 1.0) -> torch.Tensor:
    """Sparse combinations of S known directions in D dimensions."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(
        torch.randn(S, D, generator=torch.Generator().manual_seed(99)), dim=1
    )
    chosen = torch.rand(n, S, generator=draw).topk(active, dim=1).indices
    weights = torch.rand(n, active, generator=draw) + 0.5
    return scale * torch.einsum("nk,nkd->nd", weights, truth[chosen])


def new(architecture, seed=0, **options):
    k = {"k": 4} if ARCHITECTURES[architecture].takes_k else {}
    return SAE.new(architecture, d_in=D, d_sae=S, seed=seed, **(k | options))


def target(x):
    """What a transcoder is to predict: a fixed nonlinear map of x."""
    return (x @ torch.randn(D, 12, generator=torch.Generator().manual_seed(5))).relu()


def batch(sae, n, seed, scale=1.0):
    """The arguments of a step."""
    x = superposition(n, seed, scale=scale)
    return (x, target(x)) if sae.is_transcoder else (x,)


def run(architecture, steps=150, scale=1.0, dtype=torch.float32, options=(), **training):
    sae = new(architecture, **dict(options))
    training = {
        "lr": 3e-3, "tokens": steps * B, "batch_size": B, "l1_coefficient": 0.5, "l0_coefficient": 0.05
    } | training  # fmt: skip
    trainer = Trainer(sae, **training)
    outs = [trainer.step(*(t.to(dtype) for t in batch(sae, B, seed, scale))) for seed in range(steps)]
    return trainer, outs


def explained(sae, n=2000):
    """The explained variance of fresh raw activations, as `encode` and `decode` are used."""
    x, *rest = batch(sae, n, 12345)
    y = rest[0] if rest else x
    with torch.no_grad():
        return float(1 - (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_learns(architecture) -> None:
    trainer, outs = run(architecture)
    assert outs[-1].explained_variance > 0.6
    assert outs[-1].explained_variance > outs[0].explained_variance + 0.15
    assert explained(trainer.sae) == pytest.approx(float(outs[-1].explained_variance), abs=0.06)
    assert trainer.tokens_seen == 150 * B
    if trainer.sae.k:
        assert outs[-1].l0 <= 4
    if trainer.sae.kind.decoder == "unit":
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1) * trainer.scale, torch.ones(S))


WAYS = {
    "whitened": ("topk", {}, {"normalize": "whiten"}),
    "unscaled": ("topk", {}, {"normalize": "none"}),
    "gated, whitened": ("gated", {}, {"normalize": "whiten"}),
    "jumprelu, tanh": ("jumprelu", {}, {"l0_penalty": "tanh"}),
    "standard with unit rows": ("standard", {}, {"decoder": "unit"}),
    "topk with free rows": ("topk", {}, {"decoder": "free"}),
    "transcoder": ("topk", {"d_out": 12}, {}),
    "skip transcoder": ("standard", {"d_out": 12, "skip": True}, {}),
    "gated transcoder, whitened": ("gated", {"d_out": 12, "skip": True}, {"normalize": "whiten"}),
    "crosscoder": ("batchtopk", {"site": ["a", "b"], "widths": [12, 4]}, {}),
    "crosscoder, L1": ("standard", {"site": ["a", "b"], "widths": [12, 4]}, {"l1_coefficient": 0.2}),
    "crosscoder, whitened": ("jumprelu", {"site": ["a", "b"]}, {"normalize": "whiten"}),
    "resampled": ("standard", {}, {"dead_latents": "resample", "dead_after": 3 * B}),
    "controlled": ("gated", {}, {"target_l0": 20}),
    "k falling": ("topk", {}, {"k_start": 16, "k_warmup": 0.5}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_training_learns_and_leaves_an_sae_for_raw_activations(way) -> None:
    architecture, options, training = way
    trainer, outs = run(architecture, 120, scale=20.0, options=options.items(), **training)
    sae = trainer.sae
    x, *rest = batch(sae, 4000, 777, 20.0)
    y = rest[0] if rest else x
    with torch.no_grad():
        left = float((y - sae(x)).square().sum() / (y - y.mean(0)).square().sum())
    assert left < 0.5
    assert outs[-1].explained_variance > outs[0].explained_variance + 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scale_of_the_data_does_not_matter(architecture) -> None:
    # Weights stay in raw units; the trajectory is that of normalised data whatever the units are.
    (one, outs), (other, scaled) = (
        run(architecture, 40, scale=scale, precision="float32") for scale in (1.0, 64.0)
    )
    for a, b in zip(outs, scaled, strict=True):
        torch.testing.assert_close(a.explained_variance, b.explained_variance, atol=2e-4, rtol=0)
    torch.testing.assert_close(other.scale * 64, one.scale, rtol=1e-5, atol=0)
    x = superposition(20, 1234)
    torch.testing.assert_close(other.sae(64 * x) / 64, one.sae(x), atol=2e-2, rtol=2e-2)


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
        sparsity_warmup=0,
        precision="float32",
    )
    for _ in range(3):
        trainer.step(x)
    s = math.sqrt(D) / x.norm(dim=1).mean().item()
    plain = SAE.new("standard", d_in=D, d_sae=S)
    with torch.no_grad():
        plain.b_dec.copy_(origin(s * x))
        p = plain.preactivations(s * x)
        plain.b_enc.sub_(p.topk(math.ceil(0.05 * B), dim=0).values[-1])
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=6.25e-10)
    for _ in range(3):
        f = plain.encode(s * x)
        loss = (s * x - plain.decode(f)).square().sum(1).mean() + 2.0 * (f @ plain.W_dec.norm(dim=1)).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        adam.step()
    torch.testing.assert_close(raw.W_enc, s * plain.W_enc, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.W_dec, plain.W_dec / s, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.b_dec, plain.b_dec / s, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(raw.b_enc, plain.b_enc, rtol=1e-3, atol=1e-5)


WORK = {
    "compiled": ("1", "float32"),
    "plain": ("0", "float32"),
    "rounded": ("1", "bfloat16"),
    "plain, rounded": ("0", "bfloat16"),
}  # SAEKIT_NATIVE, precision: how the same work is done


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_same_seed_same_bits(architecture, work, monkeypatch) -> None:
    native, precision = work
    monkeypatch.setenv("SAEKIT_NATIVE", native)
    one, two = (run(architecture, 10, precision=precision)[0] for _ in range(2))
    for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_however_the_work_is_done_the_end_is_the_same(architecture, monkeypatch) -> None:
    """What is left unexplained, of compiled kernels and plain torch, of whole operands and rounded ones."""
    left = {}
    for name in ("compiled", "plain", "rounded"):
        native, precision = WORK[name]
        monkeypatch.setenv("SAEKIT_NATIVE", native)
        left[name] = 1 - explained(run(architecture, 50, precision=precision)[0].sae)
    assert left["plain"] == pytest.approx(left["compiled"], rel=0.002)
    assert left["rounded"] == pytest.approx(left["compiled"], rel=0.02)
    assert left["rounded"] != left["compiled"], "nothing was rounded"


@pytest.mark.parametrize(
    "way", [*WAYS.values(), *((name, {}, {}) for name in ARCHITECTURES)], ids=[*WAYS, *ARCHITECTURES]
)
def test_restored_state_goes_on_with_the_same_bits(way) -> None:
    architecture, options, training = way
    whole, _ = run(architecture, 30, options=options.items(), **({"dead_after": 4 * B} | training))
    half = Trainer(new(architecture, **options), **whole.config.model_dump())
    for seed in range(13):
        half.step(*batch(half.sae, B, seed))
    saved = {name: tensor.clone().contiguous() for name, tensor in half.tensors().items()}
    resumed = Trainer(new(architecture, seed=5, **options), **whole.config.model_dump())
    resumed.restore(saved, json.loads(json.dumps(half.counters())))
    x, *_ = batch(half.sae, 20, 99)
    assert torch.equal(resumed.sae(x), half.sae(x))
    for seed in range(13, 30):
        resumed.step(*batch(half.sae, B, seed))
    for (name, a), b in zip(whole.tensors().items(), resumed.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(whole.sae.state_dict().items(), resumed.sae.state_dict().values(), strict=True):
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
        (lambda t: t.step(torch.ones(4, D), torch.ones(4, D)), "only a transcoder takes a target"),
    ],
)
def test_wrong_batches_are_told(call, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(Trainer(SAE.new("standard", d_in=D, d_sae=S)))


def test_what_does_not_go_together_is_told() -> None:
    transcoder = Trainer(new("topk", d_out=12))
    with pytest.raises(InvalidInput, match=r"needs a target \[4, 12\], got none"):
        transcoder.step(torch.ones(4, D))
    with pytest.raises(InvalidInput, match=r"needs a target \[4, 12\], got \(4, 16\)"):
        transcoder.step(torch.ones(4, D), torch.ones(4, D))
    with pytest.raises(InvalidInput, match="told its L0 by k"):
        Trainer(new("topk"), target_l0=4)
    with pytest.raises(InvalidInput, match="whiten needs a first batch of at least 32 rows"):
        Trainer(new("topk"), normalize="whiten").step(superposition(31))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_the_controller_reaches_the_wanted_l0(architecture) -> None:
    for wanted in (6, 20):
        _, outs = run(architecture, 300, target_l0=wanted, sparsity_warmup=0.2)
        last = torch.stack([out.l0 for out in outs[-20:]]).mean()
        assert float(last) == pytest.approx(wanted, rel=0.2)


def test_batchtopk_in_use_keeps_about_k() -> None:
    for architecture in ("batchtopk", "matryoshka"):
        sae = run(architecture)[0].sae
        assert float((sae.encode(superposition(4000, 4321)) > 0).sum(1).float().mean()) == pytest.approx(
            4, rel=0.1
        )


def test_k_comes_down() -> None:
    _, outs = run("topk", 40, k_start=16, k_warmup=0.5)
    l0 = [float(out.l0) for out in outs]
    assert l0[0] == pytest.approx(16, abs=0.5)
    assert l0[10] == pytest.approx(10, abs=0.5)
    assert l0[-1] == pytest.approx(4, abs=0.5)


def test_resampling_gives_dead_latents_a_new_life() -> None:
    trainer = Trainer(
        new("standard"), tokens=100 * B, batch_size=B, lr=3e-3, dead_latents="resample", dead_after=3 * B,
        resample_at=(0.1, 0.5), l1_coefficient=0.5,
    )  # fmt: skip
    sae = trainer.sae
    for seed in range(9):
        trainer.step(superposition(B, seed))
        with torch.no_grad():
            sae.b_enc[:7] = -100.0
    moments = trainer._optimizer.state["W_enc"]["exp_avg"]
    assert trainer.dead[:7].all()
    others = sae.W_dec[7:].detach().clone()
    trainer.step(superposition(B, 9))
    assert not trainer.dead[:7].any()
    assert not sae.b_enc[:7].any()
    assert not moments[:, :7].any()
    assert moments[:, 7:].any(), "the memory of the living is theirs"
    torch.testing.assert_close(sae.W_dec[:7].norm(dim=1), sae.W_dec[7:].norm(dim=1).mean().expand(7))
    assert (sae.W_dec[7:] - others).abs().max() < 1e-2
    cosine = torch.cosine_similarity(sae.W_enc[:, :7].t(), sae.W_dec[:7])
    torch.testing.assert_close(cosine, torch.ones(7))
    fired = (sae.encode(superposition(4000, 55)) > 0).any(0)
    assert fired[:7].all()


def test_whitening_makes_the_covariance_the_identity() -> None:
    x = superposition(4000, 3) @ torch.randn(D, D, generator=torch.Generator().manual_seed(1)) + 7
    maps = whitening(x)
    white = maps(x)
    torch.testing.assert_close(white.mean(0), torch.zeros(D), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.t() @ white / len(x), torch.eye(D), atol=0.06, rtol=0)
    torch.testing.assert_close(white @ maps.inverse + maps.mean, x, atol=1e-2, rtol=1e-3)


def test_each_site_of_a_crosscoder_gets_its_own_scale() -> None:
    x = torch.cat([superposition(500, 1)[:, :12], 1000 * superposition(500, 2)[:, 12:]], 1)
    left, right = scaling(x, (12, 4))(x).split([12, 4], 1)
    assert float(left.norm(dim=1).mean()) == pytest.approx(math.sqrt(12), rel=1e-5)
    assert float(right.norm(dim=1).mean()) == pytest.approx(2.0, rel=1e-5)


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


def test_geometric_median_resists_an_outlier() -> None:
    x = torch.randn(101, 3, generator=torch.Generator().manual_seed(0))
    x[0] = 1e6
    assert geometric_median(x).norm() < 1
    assert x.mean(0).norm() > 1000


def test_the_origin_keeps_offsets_and_lets_go_of_what_latents_add() -> None:
    x = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 100  # an offset; the other coordinate is 0 or more
    start = origin(x)
    assert float(start[0]) == pytest.approx(100.5, abs=0.1)
    assert 0 < start[1] < 0.5 * 0.8
    assert torch.equal(origin(torch.zeros(5, 2)), torch.zeros(2))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_fresh_latents_fire_on_a_twentieth_of_the_first_rows(architecture) -> None:
    _, outs = run(architecture, 1)
    assert float(outs[0].l0) == pytest.approx(0.05 * S, rel=0.1)


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


def test_an_l1_penalty_has_its_full_weight_from_the_first_step() -> None:
    def first(architecture: str, **more: object) -> float:
        sae = SAE.new(architecture, d_in=8, d_sae=16)
        return float(Trainer(sae, tokens=1000, batch_size=10, **more).coefficient)

    assert first("standard", l1_coefficient=3.0) == first("gated", l1_coefficient=3.0) == 3.0
    assert first("standard", l1_coefficient=3.0, sparsity_warmup=0.1) == pytest.approx(0.3)
    assert first("jumprelu", l0_coefficient=3.0) == pytest.approx(3.0 / 5)
