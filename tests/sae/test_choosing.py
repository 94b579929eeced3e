"""Which pairs are chosen, against the dense pre-activations, tile by tile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saekit.sae import SAE, choosing
from saekit.sae.architectures import Terms
from saekit.sae.pairs import Above, Grid, Pairs
from saekit.training.trainer import Trainer

D, S = 8, 48
DTYPES = {torch.float64: "float64", torch.float32: "float32"}
TILES = [1, 7, 512]
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def tile(request, monkeypatch):
    monkeypatch.setattr(choosing, "TILE", request.param)
    return request.param


def tiled(test):
    return pytest.mark.parametrize("tile", TILES, indirect=True)(test)


def make(dtype=torch.float64, B=30, seed=0, d_sae=S, **options):
    """An SAE with biases, and a batch."""
    sae = SAE.new("standard", d_in=D, d_sae=d_sae, seed=seed, dtype=DTYPES[dtype], **options)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for vector in (sae.b_enc, sae.b_dec):
            vector += torch.randn(len(vector), generator=draw, dtype=torch.float64).mul(0.1).to(dtype)
    return sae, torch.randn(B, D, generator=draw, dtype=torch.float64).to(dtype)


def dense(sae, x):
    with torch.no_grad():
        return sae.preactivations(x)


def assert_chosen(at, p, wanted, q):
    """The pairs are those of the mask wanted [B, S], each once, in order, and p what q [B, S] is there."""
    assert isinstance(at, Pairs)
    assert torch.equal(torch.stack([at.tokens, at.latents]), wanted.nonzero().t())
    assert torch.equal(at.starts.diff(), wanted.sum(1))
    torch.testing.assert_close(p.detach(), q[wanted])


def gradients(p, sae):
    """Of Σ p² in all that p depends on."""
    return torch.autograd.grad(p.square().sum(), [sae.W_enc, sae.b_enc, sae.b_dec])


def kept(p, n):
    """[B, S] the n largest of all of p, of equals the first."""
    order = p.flatten().sort(descending=True, stable=True).indices[:n]
    return torch.zeros(p.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(p)


@tiled
@over_dtypes
@pytest.mark.parametrize("k", [1, 5, S])
def test_top_k(k, dtype, tile) -> None:
    sae, x = make(dtype)
    q = dense(sae, x)
    wanted = torch.zeros_like(q, dtype=torch.bool).scatter(1, q.topk(k).indices, True)
    pairs, p = choosing.top_k(sae, x, k, dtype)
    assert_chosen(pairs, p, wanted, q)
    plain = torch.where(wanted, sae.preactivations(x), 0)
    for one, other in zip(gradients(p, sae), gradients(plain, sae), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@tiled
@over_dtypes
@pytest.mark.parametrize("n", [1, 100, 700, 30 * S])
def test_the_largest_of_a_batch(n, dtype, tile) -> None:
    sae, x = make(dtype)
    q = dense(sae, x)
    pairs, p = choosing.largest(sae, x, n, dtype)
    assert_chosen(pairs, p, kept(q, n), q)
    plain = torch.where(kept(q, n), sae.preactivations(x), 0)
    for one, other in zip(gradients(p, sae), gradients(plain, sae), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@tiled
@over_dtypes
@pytest.mark.parametrize("bounds", [0.0, 0.4, "their own", float("inf")])
def test_above(bounds, dtype, tile, monkeypatch) -> None:
    monkeypatch.setattr(choosing, "DENSE", 1.0)
    sae, x = make(dtype)
    q = dense(sae, x)
    limits = torch.linspace(-0.2, 0.4, S) if bounds == "their own" else torch.full((S,), bounds)
    at = choosing.above(sae, x, limits.to(dtype), dtype)
    assert isinstance(at, Above)
    assert_chosen(at.pairs, at.p, q > limits.to(dtype), q)


def test_no_tokens_have_no_pairs() -> None:
    """A process may have no rows of a batch."""
    sae, x = make()
    at = choosing.above(sae, x[:0], sae.b_enc.detach(), x.dtype)
    assert isinstance(at, Above)
    pairs, p = choosing.top_k(sae, x[:0], 3, x.dtype)
    for chosen, values in ((at.pairs, at.p), (pairs, p)):
        assert (len(values), chosen.starts.tolist()) == (0, [0])
        assert not any(g.any() for g in gradients(values, sae))


@tiled
@over_dtypes
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_the_largest_of_a_batch_even_where_one_token_has_them_all(spread, dtype, tile) -> None:
    sae, x = make(dtype, B=150)
    with torch.no_grad():  # every token's pre-activations move together
        sae.W_enc[0] = 1.0
    x[:, 0] = spread * torch.randn(150, generator=torch.Generator().manual_seed(9)).to(dtype)
    x[-1, 0] = 40 * spread  # not among the first tokens, which say where to cut
    q = dense(sae, x)
    wanted = kept(q, 150)
    if spread == 30:
        assert wanted[-1].all()
    pairs, p = choosing.largest(sae, x, 150, dtype)
    assert_chosen(pairs, p, wanted, q)


@tiled
@pytest.mark.parametrize("n", [1, 40, 200])
def test_the_first_tokens_may_mislead(n, tile) -> None:
    """The bound they tell is far too high, or far too low, for the rest."""
    sae, x = make(B=200)
    for factor in (100.0, 1e-3):
        y = torch.cat([x[:64] * factor, x[64:]])
        q = dense(sae, y)
        assert_chosen(*choosing.largest(sae, y, n, torch.float64), kept(q, n), q)


@tiled
@over_dtypes
def test_of_equals_the_first(dtype, tile) -> None:
    sae, x = make(dtype, B=5)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(0.5)
    pairs, p = choosing.largest(sae, x, 60, dtype)
    assert torch.equal(pairs.tokens * S + pairs.latents, torch.arange(60))
    assert torch.equal(p.detach(), torch.full((60,), 0.5, dtype=dtype))
    pairs, _ = choosing.top_k(sae, x, 4, dtype)
    assert all(len(set(latents.tolist())) == 4 for latents in pairs.latents.view(5, 4))
    if dtype == torch.float32:
        with torch.no_grad():
            sae.b_enc[10:20] = 1.0
        assert torch.equal(choosing.largest(sae, x, 7, dtype)[0].latents, torch.arange(10, 17))


def test_nan_gives_pairs_all_the_same() -> None:
    """A loss that is NaN will tell; the choice must neither hang nor leave the tokens and latents there are."""
    sae, x = make(torch.float32)
    for rows in (slice(3, 4), slice(None)):
        x[rows] = float("nan")
        for choose in (choosing.top_k, choosing.largest):
            pairs, p = choose(sae, x, 6, torch.float32)
            assert len(p) == len(pairs.latents) == len(pairs.tokens) == pairs.starts[-1]
            assert ((pairs.latents >= 0) & (pairs.latents < S)).all()
            gradients(p, sae)
        q = dense(sae, x)
        _, latents, starts = choosing._largest_without_waiting([q].__iter__, torch.zeros(S), 60, 30)
        assert ((latents >= 0) & (latents < S)).all()
        assert (starts[0], starts[-1]) == (0, len(latents))


@pytest.mark.parametrize("n", [1, 50, 300, 30 * S])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_the_way_that_never_waits_chooses_the_same(n, spread) -> None:
    sae, x = make()
    x *= (spread * torch.randn(30, 1, generator=torch.Generator().manual_seed(2))).exp()
    bias = sae.b_enc.detach()
    tiles = lambda: iter([dense(sae, x) - bias])  # noqa: E731
    waiting, not_waiting = (
        choose(tiles, bias, n, 30) for choose in (choosing._largest, choosing._largest_without_waiting)
    )
    for one, other in zip(waiting, not_waiting, strict=True):
        assert torch.equal(one, other)


@tiled
@pytest.mark.parametrize("choose", [choosing.top_k, choosing.largest])
def test_rounded_operands_choose_nearly_the_same(choose, tile) -> None:
    sae, x = make(torch.float32, B=40)
    n = 6 if choose is choosing.top_k else 240
    exact, p = choose(sae, x, n, torch.float32)
    rounded, rounded_p = choose(sae, x, n, torch.bfloat16)
    q, error = dense(sae, x), 2**-7 * (x - sae.b_dec).norm(dim=1, keepdim=True) * sae.W_enc.norm(dim=0)
    assert rounded_p.dtype == torch.float32
    assert (
        (rounded_p - q[rounded.tokens, rounded.latents]).abs() <= error[rounded.tokens, rounded.latents]
    ).all()
    masks = [torch.zeros_like(q, dtype=torch.bool) for _ in range(2)]
    for mask, pairs in zip(masks, (exact, rounded), strict=True):
        mask[pairs.tokens, pairs.latents] = True
    assert (masks[0] & masks[1]).sum() > 0.95 * len(p)
    if choose is choosing.largest:  # what changes places lies within rounding of the last one
        assert ((q - p.min()).abs() <= error.max())[masks[0] ^ masks[1]].all()


@over_dtypes
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_pairs_and_grid_are_one_objective(architecture, dtype, monkeypatch) -> None:
    sae = SAE.new(architecture, d_in=D, d_sae=S, dtype=DTYPES[dtype])
    _, x = make(dtype, B=40)
    found = []
    for share, kind in ((1.0, Above), (0.0, Grid)):
        monkeypatch.setattr(choosing, "DENSE", share)
        at = choosing.above(sae, x, sae.encoder_bias.new_zeros(S), dtype)
        assert isinstance(at, kind)
        got = sae.kind.objective(sae, x, x, Terms(scale=1.3, sparsity=0.2, dtype=dtype))
        names = [name for name, _ in sae.named_parameters()]
        found.append(
            (got, dict(zip(names, torch.autograd.grad(got.loss, list(sae.parameters())), strict=True)))
        )
    (one, ours), (other, theirs) = found
    for field in ("loss", "mse", "variance", "sparsity", "aux", "l0", "fired", "error"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), msg=field)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
        assert ours[name].any()


@tiled
def test_the_largest_dead_ones(tile) -> None:
    sae, x = make()
    some = torch.tensor([3, 40, 7, 8, 21])
    pairs, p = choosing.at_latents(sae, x, some, 3, x.dtype)
    q = dense(sae, x)
    wanted = torch.zeros_like(q, dtype=torch.bool).scatter(1, some[q[:, some].topk(3).indices], True)
    found = torch.zeros_like(wanted)
    found[pairs.tokens, pairs.latents] = True
    assert torch.equal(found, wanted)
    torch.testing.assert_close(p.detach(), q[pairs.tokens, pairs.latents])


class Largest(TorchDispatchMode):
    """The number of elements of the largest float32 tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_no_step_holds_every_pair(architecture, precision, monkeypatch) -> None:
    """On a CPU no float32 tensor is as large as [B, S] in a whole step, AuxK included, even where the first tokens mislead."""
    monkeypatch.setattr(choosing, "TILE", 64)
    B, d_sae = 1024, 512
    sae = SAE.new(architecture, d_in=D, d_sae=d_sae, k=4)
    trainer = Trainer(sae, batch_size=B, precision=precision, dead_after=B, aux_k=8)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    x[:64] *= 3
    trainer.step(x)
    with torch.no_grad():
        sae.b_enc[:20] = -1e3
    trainer.step(x)
    with Largest() as seen:
        out = trainer.step(x)
    assert out.aux > 0, "AuxK took no part"
    assert 0 < seen.elements < B * d_sae / 4
    with Largest() as seen:
        sae.encode(x)
    assert seen.elements == B * d_sae, "the measure sees nothing"


@pytest.mark.parametrize("dead", [[3, 7, 8, 21], []])
def test_latents_that_are_none_change_nothing(dead) -> None:
    """AuxK on a GPU asks for all latents, −1 for the living: the same loss and gradients as for the dead alone."""
    from saekit.sae.architectures.base import Terms, auxk

    def of(latents: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sae = SAE.new("topk", d_in=12, d_sae=32, k=4, seed=1)
        draw = torch.Generator().manual_seed(2)
        x, error = torch.randn(2, 20, 12, generator=draw)
        loss = auxk(sae, x, error, Terms(scale=1.0, dead=torch.tensor(latents, dtype=torch.int64), aux_k=6))
        loss.backward()
        return loss.detach(), [p.grad for p in (sae.W_enc, sae.b_enc, sae.W_dec)]

    padded, grads = of([*dead, *[-1] * (32 - len(dead))])
    if not dead:
        assert padded == 0
        assert not any(bool(g.any()) for g in grads)
        return
    alone, wanted = of(dead)
    torch.testing.assert_close(padded, alone)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w)
