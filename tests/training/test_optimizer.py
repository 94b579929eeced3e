"""The optimizer against its steps written out plainly with torch's own Adam, compiled and plain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from saekit.sae import native
from saekit.training.optimizer import Optimizer

S, D, E = 37, 24, 18
BETAS, EPS = (0.8, 0.99), 1e-4  # an ε that is felt
UNITS = {"W_enc": 3.0, "W_dec": 0.25, "b_enc": 1.0, "b_dec": 0.25, "W_skip": 7.0, "threshold": 10.0}
RATES = [1e-2, 3e-2, 1e-3, 2e-2]


@pytest.fixture(params=["compiled", "plain", "float64"], autouse=True)
def way(request, monkeypatch):
    """What does the work; float64 is never compiled."""
    if request.param == "plain":
        monkeypatch.setenv("SAEKIT_NATIVE", "0")
    else:
        monkeypatch.delenv("SAEKIT_NATIVE", raising=False)
    if request.param == "compiled" and native.library() is None:
        pytest.skip("no C++ compiler: plain torch is all there is")
    return request.param


@pytest.fixture
def dtype(way):
    return torch.float64 if way == "float64" else torch.float32


def parameters(dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (S, D),
        "W_dec": (S, E),
        "b_enc": (S,),
        "b_dec": (E,),
        "W_skip": (E, D),
        "threshold": (S,),
    }
    values = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    values["W_enc"] = values["W_enc"].t()
    return {name: nn.Parameter(value) for name, value in values.items()}


def give_gradients(given, step, size=1.0):
    """Of any size and, for W_dec, largely along its rows."""
    draw = torch.Generator().manual_seed(100 + step)
    for name, p in given.items():
        noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
        p.grad = torch.empty_like(p).copy_(size * (noise + 2 * p if name == "W_dec" else noise))


def make(dtype, seed=0):
    given = parameters(dtype, seed)
    return given, Optimizer(given, betas=BETAS, eps=EPS)


class Plainly:
    """The docstring's arrows, one after another."""

    def __init__(self, given) -> None:
        self.given = given
        groups = [{"params": [p], "name": name} for name, p in given.items()]
        self.adam = torch.optim.Adam(groups, betas=BETAS, eps=EPS, foreach=False, fused=False)

    @torch.no_grad()
    def step(self, rate, clip, row_norm) -> None:
        W_dec = self.given["W_dec"]
        if row_norm is not None:
            along = normalize(W_dec, dim=1)
            W_dec.grad -= (W_dec.grad * along).sum(1, keepdim=True) * along
        if clip is not None:
            for name, p in self.given.items():
                p.grad *= UNITS[name]
            nn.utils.clip_grad_norm_(self.given.values(), clip)
            for name, p in self.given.items():
                p.grad /= UNITS[name]
        for group in self.adam.param_groups:
            group["lr"], group["eps"] = rate * UNITS[group["name"]], EPS / UNITS[group["name"]]
        self.adam.step()
        if row_norm is not None:
            W_dec.copy_(normalize(W_dec, dim=1) * row_norm)


def assert_same(given, wanted):
    for name in wanted:
        torch.testing.assert_close(
            given[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("row_norm", [None, 1.0, 0.3])
@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_it_is_adam_clipped_and_with_rows_of_one_length(clip, row_norm, dtype) -> None:
    given, optimizer = make(dtype)
    wanted = parameters(dtype)
    plainly = Plainly(wanted)
    for step, rate in enumerate(RATES):
        give_gradients(given, step, size=10.0**step)
        give_gradients(wanted, step, size=10.0**step)
        if step == 0:  # the same gradients, not nearly
            assert all(torch.equal(given[name].grad, wanted[name].grad) for name in given)
        optimizer.step(rate, UNITS, clip=clip, row_norm=row_norm)
        plainly.step(rate, clip, row_norm)
        assert_same(given, wanted)
        assert all(p.grad is None for p in given.values()), "gradients are used up"
    if row_norm is not None:
        torch.testing.assert_close(given["W_dec"].norm(dim=1), torch.full((S,), row_norm, dtype=dtype))
    for group in plainly.adam.param_groups:
        theirs, ours = plainly.adam.state[group["params"][0]], optimizer.state[group["name"]]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            rounding = 1e-6 * float(theirs[key].abs().max())  # what cancels along a row was larger
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=rounding)


def test_what_has_no_gradient_stays(dtype) -> None:
    given, optimizer = make(dtype)
    give_gradients(given, 0)
    given["W_skip"].grad = given["b_dec"].grad = None
    before = {name: p.detach().clone() for name, p in given.items()}
    optimizer.step(1e-2, UNITS, clip=0.1, row_norm=1.0)
    moved = {name for name, p in given.items() if not torch.equal(p, before[name])}
    assert moved == set(given) - {"W_skip", "b_dec"}


def test_gradients_of_zero_move_nothing_and_divide_by_nothing(dtype) -> None:
    given, optimizer = make(dtype)
    before = {name: p.detach().clone() for name, p in given.items()}
    give_gradients(given, 0, size=0.0)
    optimizer.step(1e-2, UNITS, clip=0.1, row_norm=None)
    assert all(torch.equal(p, before[name]) for name, p in given.items())


def test_only_what_is_across_its_row_moves_a_decoder_row(dtype) -> None:
    given, optimizer = make(dtype)
    with torch.no_grad():
        given["W_dec"].copy_(normalize(given["W_dec"], dim=1))
    before = given["W_dec"].detach().clone()
    for p in given.values():
        p.grad = torch.zeros_like(p)
    given["b_enc"].grad += 1.0
    given["W_dec"].grad = 5 * before
    optimizer.step(1e-6, UNITS, clip=None, row_norm=1.0)
    torch.testing.assert_close(given["W_dec"].detach(), before, rtol=0, atol=1e-6)


def test_any_layout_of_gradients_is_taken(dtype) -> None:
    (one, first), (other, second) = make(dtype), make(dtype)
    give_gradients(one, 0)
    give_gradients(other, 0)
    other["W_enc"].grad = other["W_enc"].grad.contiguous()  # [D, S] by rows of d_sae
    other["W_dec"].grad = other["W_dec"].grad.t().contiguous().t()
    assert other["W_enc"].grad.stride() != one["W_enc"].grad.stride()
    first.step(1e-2, UNITS, clip=0.1, row_norm=1.0)
    second.step(1e-2, UNITS, clip=0.1, row_norm=1.0)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_parameters_and_state_keep_their_place_in_memory(dtype) -> None:
    given, optimizer = make(dtype)
    places = {name: (p.data_ptr(), p.stride()) for name, p in given.items()}
    for step in range(2):
        give_gradients(given, step)
        optimizer.step(1e-2, UNITS, clip=0.1, row_norm=1.0)
    assert places == {name: (p.data_ptr(), p.stride()) for name, p in given.items()}
    assert given["W_enc"].stride() == (1, D)
    for name, p in given.items():
        assert optimizer.state[name]["exp_avg"].stride() == p.stride()


def test_some_latents_are_forgotten_and_no_other(dtype) -> None:
    given, optimizer = make(dtype)
    give_gradients(given, 0)
    optimizer.step(1e-2, UNITS, clip=None, row_norm=1.0)
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    latents = torch.tensor([3, 20, 36])
    others = torch.ones(S, dtype=torch.bool).index_fill(0, latents, False)
    optimizer.forget(latents)
    for name in ("W_enc", "W_dec", "b_enc", "threshold"):
        for key in ("exp_avg", "exp_avg_sq"):
            now, then = (
                t.t() if name == "W_enc" else t for t in (optimizer.state[name][key], before[f"{name}.{key}"])
            )
            assert not now[latents].any()
            assert then[latents].any()
            assert torch.equal(now[others], then[others])
    for name in ("b_dec.exp_avg", "W_skip.exp_avg", "W_skip.exp_avg_sq", "W_enc.step"):
        assert torch.equal(optimizer.tensors()[name], before[name]), name


def test_restored_state_goes_on_with_the_same_bits(dtype) -> None:
    (whole, first), (resumed, second) = make(dtype), make(dtype, seed=1)
    for step in range(5):
        if step == 2:
            saved = {name: tensor.clone().contiguous() for name, tensor in first.tensors().items()}
            assert len(saved) == 3 * len(whole)
            second.restore(saved)
            with torch.no_grad():
                for name, p in resumed.items():
                    p.copy_(whole[name])
        for given, optimizer in ((whole, first), (resumed, second)):
            give_gradients(given, step)
            optimizer.step(RATES[step % 4], UNITS, clip=0.1, row_norm=1.0)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("way", ["compiled"], indirect=True)
def test_the_same_bits_with_any_number_of_threads(n) -> None:
    found, before = [], torch.get_num_threads()
    for threads in (1, n):
        draw = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(600, 256, generator=draw))
        assert p.numel() > n * 2**15, "too little to be shared out"
        optimizer = Optimizer({"W_dec": p}, betas=BETAS, eps=EPS)
        torch.set_num_threads(threads)
        for _ in range(2):
            p.grad = torch.randn(600, 256, generator=draw)
            optimizer.step(1e-2, UNITS, clip=0.1, row_norm=1.0)
        torch.set_num_threads(before)
        found.append(p.detach())
    assert torch.equal(*found)


def test_the_first_step_is_as_long_as_the_rate_says(dtype) -> None:
    """Adam's first step is rate · unit, whatever the gradient, where ε is nothing beside it."""
    given, optimizer = make(dtype)
    before = given["b_enc"].detach().clone()
    give_gradients(given, 0, size=1e4)
    optimizer.step(1e-2, UNITS, clip=None, row_norm=None)
    lengths = (given["b_enc"].detach() - before).abs()
    assert math.isclose(float(lengths.min()), 1e-2, rel_tol=1e-3)
    assert math.isclose(float(lengths.max()), 1e-2, rel_tol=1e-3)
