"""Data whose truth is known: its rates are those it says, and what recovery counts can be counted by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.evaluation.synthetic import ROOT, Superposition, forest, recovery
from saekit.sae import SAE
from saekit.training.trainer import Trainer

N = 100_000

WORLDS = {
    "plain": Superposition(8, 12, rate=0.1),
    "power law": Superposition(8, 12, rate=0.1, rate_exponent=0.7, seed=3),
    "groups": Superposition(8, 12, rate=0.1, rate_exponent=0.4, groups=((0, 3, 5), (7, 8)), strength=0.6),
    "forest": Superposition(8, 14, rate=0.3, parents=forest(2, 2, depth=2), child_rate=0.5),
    "exclusive": Superposition(
        8,
        14,
        rate=0.3,
        parents=forest(2, 2, depth=2),
        child_rate=0.45,
        exclusive=True,
        groups=((0, 1),),
        strength=0.5,
    ),
}


def close(measured: float, exact: float, n: int = N) -> bool:
    """Within five standard deviations of a share of n."""
    return abs(measured - exact) <= 5 * math.sqrt(max(exact * (1 - exact), 1 / n) / n)


# The data


@pytest.mark.parametrize("world", WORLDS)
def test_features_fire_as_often_as_rates_say(world) -> None:
    truth = WORLDS[world]
    fires = truth.sample(N, seed=1)[1] > 0
    for feature in range(truth.features):
        assert close(float(fires[:, feature].double().mean()), float(truth.rates[feature])), feature
    assert float(fires.double().sum(1).mean()) == pytest.approx(truth.l0, rel=0.03)


@pytest.mark.parametrize("world", WORLDS)
def test_pairs_fire_together_as_often_as_pair_rate_says(world) -> None:
    truth = WORLDS[world]
    fires = truth.sample(N, seed=2)[1] > 0
    for i, j in itertools.combinations_with_replacement(range(truth.features), 2):
        measured = float((fires[:, i] & fires[:, j]).double().mean())
        assert close(measured, truth.pair_rate(i, j)), (i, j)
        assert truth.pair_rate(i, j) == pytest.approx(truth.pair_rate(j, i))


def test_strength_is_the_correlation_of_equal_rates() -> None:
    truth = Superposition(8, 6, rate=0.2, groups=((1, 4),), strength=0.35)
    p = 0.2
    assert (truth.pair_rate(1, 4) - p * p) / (p * (1 - p)) == pytest.approx(0.35)
    fires = (truth.sample(N)[1] > 0).double()
    assert float(torch.corrcoef(fires[:, [1, 4]].t())[0, 1]) == pytest.approx(0.35, abs=0.02)
    assert float(torch.corrcoef(fires[:, [1, 2]].t())[0, 1]) == pytest.approx(0.0, abs=0.02)


def test_a_power_law_keeps_the_mean_rate() -> None:
    truth = Superposition(8, 12, rate=0.1, rate_exponent=0.7)
    assert float(truth.rates.mean()) == pytest.approx(0.1)
    assert float(truth.rates[0] / truth.rates[3]) == pytest.approx(4**0.7)


def test_children_fire_only_with_their_parent_and_exclusive_ones_alone() -> None:
    truth = WORLDS["exclusive"]
    fires = truth.sample(20_000)[1] > 0
    assert truth.children == {0: [2, 3], 1: [4, 5], 2: [6, 7], 3: [8, 9], 4: [10, 11], 5: [12, 13]}
    for parent, children in truth.children.items():
        assert not (fires[:, children] & ~fires[:, [parent]]).any()
        assert fires[:, children].sum(1).max() == 1
    both = WORLDS["forest"].sample(20_000)[1] > 0
    assert (both[:, 2] & both[:, 3]).any()  # siblings that are not exclusive


def test_x_is_the_sum_of_the_firing_directions() -> None:
    truth = Superposition(8, 12, rate=0.3, bias=2.0)
    x, f = truth.sample(500)
    by_hand = torch.stack(
        [sum((f[n, i] * truth.directions[i] for i in range(12)), truth.offset) for n in range(500)]
    )
    torch.testing.assert_close(x, by_hand)
    assert float(truth.offset.norm()) == pytest.approx(2.0)
    noisy = Superposition(8, 12, rate=0.3, bias=2.0, noise=0.25)
    x, f = noisy.sample(20_000)
    left = x - f @ noisy.directions - noisy.offset
    torch.testing.assert_close(left.std(0), torch.full((8,), 0.25), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("magnitudes", "least"), [("uniform", 0.8), ("half_normal", 0.8), ("lognormal", 0.0)]
)
def test_magnitudes_have_their_mean_and_stay_away_from_zero(magnitudes, least) -> None:
    truth = Superposition(8, 12, rate=0.5, magnitude=2.0, magnitudes=magnitudes, spread=0.6)
    m = truth.sample(20_000)[1]
    m = m[m > 0]
    assert float(m.mean()) == pytest.approx(2.0, rel=0.02)
    assert float(m.min()) >= least - 1e-6
    assert float(m.std()) > 0.3
    constant = Superposition(8, 12, magnitude=2.0, magnitudes=magnitudes, spread=0.0).sample(1000)[1]
    torch.testing.assert_close(constant[constant > 0].unique(), torch.tensor([2.0]))


def test_directions_are_unit_rows_within_their_bound() -> None:
    truth = Superposition(32, 64, max_cosine=0.25)
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(64))
    cosines = (truth.directions @ truth.directions.t()).fill_diagonal_(0)
    assert 0.2 < float(cosines.abs().max()) <= 0.25 + 1e-6
    free = Superposition(32, 64).directions
    assert float((free @ free.t()).fill_diagonal_(0).abs().max()) > 0.4
    square = Superposition(16, 16, max_cosine=0.0).directions
    torch.testing.assert_close(square @ square.t(), torch.eye(16), atol=1e-6, rtol=0)


def test_the_same_seed_gives_the_same_data_and_samples_are_no_batches() -> None:
    truth, again, other = Superposition(8, 12), Superposition(8, 12), Superposition(8, 12, seed=1)
    assert torch.equal(truth.sample(64, 5)[0], again.sample(64, 5)[0])
    assert not torch.equal(truth.sample(64, 5)[0], truth.sample(64, 6)[0])
    assert not torch.equal(truth.directions, other.directions)
    batches = list(itertools.islice(truth.batches(64, 5), 4))
    assert torch.equal(next(again.batches(64, 5, start=3)), batches[3])
    everything = [*batches, truth.sample(64, 5)[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(everything, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 1}, "d_in: expected a whole number of at least 2, got 1"),
        ({"features": True}, "features: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
        ({"rate": 1.5}, "rate: expected a number from 0 to 1"),
        ({"rate": float("nan")}, "rate: expected a number"),
        ({"rate": 0.0}, "rate: 0 means that nothing ever fires"),
        ({"rate": 0.5, "rate_exponent": 2.0}, "asks for a firing rate of 3.83"),
        ({"noise": float("inf")}, "noise: expected a finite number"),
        ({"magnitudes": "gamma"}, "'gamma' is not one of uniform, half_normal, lognormal"),
        ({"spread": 1.0}, "spread: 1.0 would give uniform magnitudes of 0"),
        ({"max_cosine": 0.1}, "below 0.213, the least possible for 12 directions in 8 dimensions"),
        ({"groups": ((0, 1), (1, 2))}, "a feature is in two groups"),
        ({"groups": ((0, 12),)}, "groups: 12 is not a feature without a parent"),
        ({"parents": (ROOT,)}, "parents: expected one for each of 12 features, got 1"),
        ({"parents": (ROOT,) * 11 + (11,)}, "feature 11 has parent 11; expected -1 (none) or a smaller index"),
        ({"parents": (ROOT,) * 11 + (0,), "groups": ((1, 11),)}, "groups: 11 is not a feature without a parent"),
        (
            {"parents": (ROOT,) + (0,) * 11, "exclusive": True},
            "11 exclusive children cannot fire with probability 0.2 each; expected at most 0.0909",
        ),
    ],
)  # fmt: skip
def test_impossible_data_is_refused(change, message) -> None:
    with pytest.raises(InvalidInput) as error:
        Superposition(**{"d_in": 8, "features": 12} | change)
    assert message in str(error.value)


def test_a_bound_out_of_reach_and_wrong_draws_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no 64 directions in 32 dimensions within 0.127"):
        _ = Superposition(32, 64, max_cosine=0.127).directions
    for draw in (
        lambda t: t.sample(0),
        lambda t: t.batches(0),
        lambda t: t.sample(4, -1),
        lambda t: t.batches(4, 0, -1),
    ):
        with pytest.raises(InvalidInput, match="expected a whole number"):
            draw(Superposition(8, 12))


# Recovery


def perfect(truth: Superposition) -> SAE:
    """The SAE whose latents are the features of orthogonal, noiseless data."""
    sae = SAE.new("standard", d_in=truth.d_in, d_sae=truth.features)
    with torch.no_grad():
        sae.W_dec.copy_(truth.directions)
        sae.W_enc.copy_(truth.directions.t())
        sae.b_dec.copy_(truth.offset)
        sae.b_enc.fill_(-1e-3)  # rounding is no firing
    return sae


def test_the_truth_recovers_itself() -> None:
    truth = Superposition(16, 16, max_cosine=0.0, rate=0.1, bias=1.0)
    figures = recovery(perfect(truth), truth)
    assert set(figures) == {
        "mmcs", "recovered", "unique", "latents_mmcs", "latents_true", "live", "precision", "recall", "f1",
    }  # fmt: skip
    for name, value in figures.items():
        assert value == pytest.approx(1.0, abs=1e-5), name


def test_order_and_length_of_rows_do_not_matter_but_their_sign_does() -> None:
    truth = Superposition(16, 32)
    rows = truth.directions.flip(0) * torch.linspace(0.1, 9, 32)[:, None]
    figures = recovery(rows, truth)
    assert set(figures) == {"mmcs", "recovered", "unique", "latents_mmcs", "latents_true", "live"}
    assert all(value == pytest.approx(1.0, abs=1e-5) for value in figures.values())
    assert recovery(-rows, truth)["recovered"] == 0


@pytest.mark.parametrize(("D", "S"), [(16, 64), (32, 512)])
def test_random_rows_are_as_near_as_chance(D, S) -> None:
    # The cosine of random directions, (c + 1) / 2, is Beta((D − 1)/2, (D − 1)/2): E max of S of them by quadrature.
    from scipy.stats import beta

    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    below = torch.from_numpy(beta((D - 1) / 2, (D - 1) / 2).cdf((grid.numpy() + 1) / 2)) ** S
    expected = float(1 - torch.trapezoid(below, grid))
    figures = recovery(torch.randn(S, D, generator=torch.Generator().manual_seed(0)), Superposition(D, 1000))
    assert figures["mmcs"] == pytest.approx(expected, abs=0.015)
    assert figures["recovered"] < 0.05


def test_what_is_counted_can_be_counted_by_hand() -> None:
    truth = Superposition(3, 3, max_cosine=0.0)
    a, b, c = truth.directions
    near = torch.nn.functional.normalize(a + 0.3 * b, dim=0)  # cosine 0.958 with a
    figures = recovery(torch.stack([a, near, torch.zeros(3), (a + b + c)]), truth)
    assert figures["mmcs"] == pytest.approx((1 + 3**-0.5 + 3**-0.5) / 3, abs=1e-5)
    assert figures["recovered"] == figures["unique"] == pytest.approx(1 / 3)
    assert figures["live"] == 0.75
    assert figures["latents_true"] == pytest.approx(2 / 3)
    assert figures["latents_mmcs"] == pytest.approx((1 + 1.09**-0.5 + 3**-0.5) / 3, abs=1e-5)


def test_unique_is_a_maximum_matching() -> None:
    # One row serves both a and b. The other serves a alone: b has to get the first one, whoever comes first.
    close_pair = Superposition(2, 2, seed=0)
    close_pair.__dict__["directions"] = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.2], [1.0, -0.2]]), dim=1
    )
    middle, above = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5])
    assert recovery(torch.stack([middle, above]), close_pair)["unique"] == 1
    assert recovery(torch.stack([above, middle]), close_pair)["unique"] == 1
    one = recovery(middle[None], close_pair)
    assert (one["recovered"], one["unique"]) == (1, 0.5)


def test_detection_is_precision_and_recall_of_the_nearest_latent() -> None:
    truth = Superposition(6, 9, rate=0.2, seed=2)
    sae = SAE.new("standard", d_in=6, d_sae=20, seed=4)
    figures = recovery(sae, truth, samples=400, seed=7)
    x, f = truth.sample(400, 7)
    said, rows = sae.encode(x) > 0, sae.directions()
    scores = []
    for i in range(9):
        j = max(range(20), key=lambda j: float(torch.cosine_similarity(truth.directions[i], rows[j], dim=0)))
        tp = sum(bool(said[n, j]) and float(f[n, i]) > 0 for n in range(400))
        p, r = tp / int(said[:, j].sum()), tp / int((f[:, i] > 0).sum())
        scores.append((p, r, 2 * p * r / (p + r)))
    for name, values in zip(("precision", "recall", "f1"), zip(*scores, strict=True), strict=True):
        assert figures[name] == pytest.approx(sum(values) / 9)


def test_features_that_never_fire_do_not_count_and_silent_latents_score_zero() -> None:
    truth = Superposition(16, 16, max_cosine=0.0, rate=0.05, rate_exponent=1.5)
    fired = int((truth.sample(100)[1] > 0).any(0).sum())
    assert fired < 16
    sae = perfect(truth)
    assert recovery(sae, truth, samples=100)["f1"] == pytest.approx(1.0)
    assert recovery(sae, truth, samples=100)["live"] == fired / 16
    with torch.no_grad():
        sae.b_enc[0] = -100.0
    silent = recovery(sae, truth, samples=100)
    assert silent["f1"] == silent["precision"] == silent["recall"] == pytest.approx(1 - 1 / fired)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"expected directions \[S, 8\], got \(12, 9\)"):
        recovery(torch.ones(12, 9), Superposition(8, 12))


# What SAEs learn of it

# 64 features in 32 dimensions, two firing at once, 150,000 samples. With no noise and few features per sample, the
# sparsest dictionary is the true one, so an SAE that trains as it should finds nearly all of it. Measured over seeds
# 0-2: standard, topk and batchtopk all of it. Matryoshka SAEs find less: what their first prefix cannot hold as single
# features it holds as sums. Fresh directions are at 0.43, none of them above 0.9.
EXPECTED = {
    "standard": ({"l1_coefficient": 4.0}, None, 0.95, 0.98),
    "topk": ({}, 2, 0.95, 0.98),
    "batchtopk": ({}, 2, 0.95, 0.98),
    "matryoshka": ({}, 2, 0.7, 0.9),
}


@pytest.fixture(scope="module")
def learnt_from():
    truth, batch_size = Superposition(32, 64, max_cosine=0.3, rate=0.03), 256
    return truth, list(itertools.islice(truth.batches(batch_size), 600)), batch_size


@pytest.mark.parametrize("architecture", EXPECTED)
def test_trained_saes_recover_the_truth(architecture, learnt_from) -> None:
    truth, batches, batch_size = learnt_from
    training, k, recovered, mmcs = EXPECTED[architecture]
    steps = len(batches)
    sae = SAE.new(architecture, d_in=32, d_sae=96, k=k)
    fresh = recovery(sae, truth)
    assert fresh["recovered"] == 0
    assert fresh["mmcs"] < 0.55
    trainer = Trainer(
        sae,
        lr=1e-2,
        tokens=steps * batch_size,
        batch_size=batch_size,
        dead_after=steps * batch_size // 10,
        **training,
    )
    for x in batches:
        trainer.step(x)
    figures = recovery(trainer.sae, truth)
    assert figures["recovered"] >= recovered
    assert figures["unique"] >= recovered
    assert figures["mmcs"] >= mmcs
    assert figures["f1"] >= 0.7  # topk keeps two latents whether one feature fires or four: measured 0.78
