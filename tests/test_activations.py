from __future__ import annotations

import contextlib
import itertools
import weakref

import pytest
import torch
from conftest import SITE, sentences
from torch.utils._python_dispatch import TorchDispatchMode

from saekit import activations
from saekit.activations import Activations, Share, StreamPosition
from saekit.errors import InvalidInput, UnknownName
from saekit.sites import capture
from saekit.tokens import tokenize

TEXTS = sentences(60)


def rows(batches) -> torch.Tensor:
    return torch.cat(list(batches))


def in_order(x: torch.Tensor) -> torch.Tensor:
    return x[x.double().sum(1).argsort()]


def test_one_pass_gives_each_ordinary_position_once(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    expected = torch.cat([capture(model, [SITE], b.ids)[SITE][b.ids != 0] for b in tokens.batches(4)])
    stream = Activations(model, SITE, tokens, 128, ring=500, contexts=4)
    batches = list(stream)
    assert {len(b) for b in batches[:-1]} == {128}
    got = rows(batches)
    assert got.shape == expected.shape
    torch.testing.assert_close(in_order(got), in_order(expected))
    assert not torch.equal(got, expected)  # shuffled
    assert got.dtype == model.cfg.dtype


def test_special_positions_can_be_kept(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    n, t = tokens.shape
    assert len(rows(Activations(model, SITE, tokens, 64, include_special=True))) == n * t


def test_same_seed_same_stream_other_seed_other_order(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    one, two, other = (rows(Activations(model, SITE, tokens, 64, ring=700, seed=s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
def test_a_position_resumes_with_the_same_bits(model, at) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    stream = Activations(model, SITE, tokens, 100, ring=450, contexts=3)
    whole, positions = [], []
    for batch in itertools.islice(stream, 20):
        whole.append(batch)
        positions.append(stream.position)
    again = Activations(
        model, SITE, tokens, 100, ring=450, contexts=3, start=StreamPosition(*positions[at - 1])
    )
    for expected, got in zip(whole[at:], again, strict=False):
        assert torch.equal(expected, got)


SITES = ["blocks.4.hook_mlp_out", SITE, "blocks.1.hook_resid_pre"]


@pytest.mark.parametrize("riders", [[], SITES[:1], SITES[2:], SITES])
def test_a_sites_bits_do_not_depend_on_which_others_ride_along(model, riders) -> None:
    tokens = tokenize(TEXTS[:20], model, 32)
    alone = list(Activations(model, SITE, tokens, 100, ring=250, contexts=3))
    batches = list(Activations(model, [*riders, SITE], tokens, 100, ring=250, contexts=3))
    assert len(batches) == len(alone)
    for one, among in zip(alone, batches, strict=True):
        assert set(among) == {*riders, SITE}
        assert torch.equal(one, among[SITE])


def test_rows_of_several_sites_belong_together(model) -> None:
    """Row i of every site is the same position: what follows from one site gives the other."""
    mid, mlp, post = (f"blocks.3.hook_{name}" for name in ("resid_mid", "mlp_out", "resid_post"))
    for batch in Activations(model, [post, mid, mlp], tokenize(TEXTS[:20], model, 32), 64, ring=300):
        torch.testing.assert_close(batch[mid] + batch[mlp], batch[post])


def test_one_forward_serves_all_sites_and_stops_at_the_last(model) -> None:
    seen = []
    ids = torch.randint(1, 200, (6, 16))
    hooks = [
        (f"blocks.{block}.hook_in", lambda x, hook, block=block: seen.append(block)) for block in range(6)
    ]
    stream = Activations(model, [SITE, "blocks.1.hook_resid_pre"], ids, 10, ring=50, contexts=6)
    with model.hooks(fwd_hooks=hooks):
        assert sum(len(batch[SITE]) for batch in stream) == 96
    assert seen == [0, 1, 2, 3]  # the site is what block 3 reads


def test_a_position_of_several_sites_is_that_of_one(model) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    several, one = (Activations(model, sites, tokens, 100, ring=450, contexts=3) for sites in (SITES, SITE))
    for _ in zip(range(7), several.batches(), one.batches(), strict=False):
        assert several.position == one.position
    again = Activations(model, SITES[1:], tokens, 100, ring=450, contexts=3, start=several.position)
    torch.testing.assert_close(next(iter(again))[SITE], next(iter(one)), rtol=0, atol=0)


def test_wrong_calls(model) -> None:
    tokens = tokenize(TEXTS, model, 32)
    with pytest.raises(InvalidInput, match="ring: 10 rows cannot hold a batch_size of 64"):
        Activations(model, SITE, tokens, 64, ring=10)
    with pytest.raises(UnknownName, match="Did you mean"):
        Activations(model, "blocks.3.hook_resid", tokens)
    with pytest.raises(UnknownName, match="Did you mean"):
        Activations(model, [SITE, "blocks.3.hook_resid"], tokens)
    with pytest.raises(InvalidInput, match=r"share: expected \(r, n\).*got \(2, 2\)"):
        Activations(model, SITE, tokens, share=(2, 2))
    with pytest.raises(InvalidInput, match="ring: half of 100 rows cannot hold a batch_size of 64"):
        Activations(model, SITE, tokens, 64, ring=100, overlap=True)
    with pytest.raises(InvalidInput, match="site: expected a name .* got none"):
        Activations(model, [], tokens)


def test_plain_ids_stream_too(model) -> None:
    ids = torch.randint(1, 200, (6, 16))
    assert len(rows(Activations(model, SITE, ids, 10, ring=50))) == 96


EARLY = "blocks.1.hook_resid_pre"  # quick to reach


def whole(shares: tuple[Share, ...], site: str = EARLY) -> torch.Tensor:
    """A batch put together from what each process gave."""
    numbers = torch.cat([share.numbers for share in shares])
    assert numbers.sort().values.tolist() == list(range(shares[0].size))
    rows = torch.cat([share.rows[site] for share in shares])
    return torch.empty_like(rows).index_copy_(0, numbers, rows)


@pytest.mark.parametrize(("n", "ring", "epochs"), [(1, 300, 1), (2, 300, None), (3, 300, 1), (4, 120, None)])
def test_shares_put_together_are_the_stream_of_one_process(model, n, ring, epochs) -> None:
    """Also where a fill is fewer forwards than there are processes, and where a batch spans fills."""
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=epochs)
    arguments = {"batch_size": 100, "ring": ring, "contexts": 3}
    one = Activations(model, EARLY, tokens, **arguments)
    several = [Activations(model, EARLY, tokens, **arguments, share=(r, n)) for r in range(n)]
    streams = zip(one, *(stream.shares() for stream in several), strict=True)
    batches = 0
    for expected, *shares in itertools.islice(streams, 30):
        assert torch.equal(whole(tuple(shares)), expected)
        assert {stream.position for stream in several} == {one.position}
        assert all(share.numbers.tolist() == sorted(share.numbers) for share in shares)
        batches += 1
    assert batches > 15
    # Another number of processes goes on from there.
    onward = [
        Activations(model, EARLY, tokens, **arguments, share=(r, 2), start=one.position) for r in (0, 1)
    ]
    for expected, *shares in itertools.islice(zip(one, *(s.shares() for s in onward), strict=False), 3):
        assert torch.equal(whole(tuple(shares)), expected)


def test_a_share_forwards_and_holds_an_nth(model, monkeypatch) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0)
    seen: list[torch.Tensor] = []
    real = activations.capture
    monkeypatch.setattr(activations, "capture", lambda m, s, ids: (seen.append(ids), real(m, s, ids))[1])
    forwards, rows = [], []
    for share in ((0, 1), (0, 3), (1, 3), (2, 3)):
        seen.clear()
        stream = Activations(model, EARLY, tokens, 100, ring=600, contexts=2, share=share)
        rows.append(sum(len(batch) for batch in stream))
        forwards.append([ids.tolist() for ids in seen])
    assert rows[0] == sum(rows[1:])
    assert sorted(forwards[0]) == sorted(forwards[1] + forwards[2] + forwards[3])
    assert max(map(len, forwards[1:])) - min(map(len, forwards[1:])) <= 1


@pytest.mark.parametrize("n", [1, 2])
def test_overlap_is_the_stream_of_half_the_ring(model, n) -> None:
    """Forwards are spread over the batches before; which rows come, and in which order, does not change."""
    tokens = tokenize(TEXTS, model, 32, shuffle=0)
    for r in range(n):
        arguments = {"batch_size": 100, "contexts": 3, "share": (r, n)}
        beside = Activations(model, EARLY, tokens, ring=600, overlap=True, **arguments)
        inline = Activations(model, EARLY, tokens, ring=300, overlap=False, **arguments)
        for one, other in zip(beside, inline, strict=True):
            assert torch.equal(one, other)
            assert beside.position == inline.position


def test_overlap_spreads_the_forwards_over_the_batches(model, monkeypatch) -> None:
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    calls = []
    real = activations.capture
    monkeypatch.setattr(activations, "capture", lambda *given: (calls.append(0), real(*given))[1])
    batches = Activations(model, EARLY, tokens, 50, ring=1200, contexts=1, overlap=True).batches()
    counts = [len(calls) for _ in zip(range(40), batches, strict=False)]
    per_batch = [after - before for before, after in itertools.pairwise(counts)]
    assert counts[0] > 15  # a half
    assert max(per_batch) <= 3  # then one or two for each batch of 50 rows, 30 of a context of 32
    assert min(per_batch) >= 1


def test_overlap_orders_reads_and_writes_of_a_ring(model, monkeypatch) -> None:
    """What a GPU needs: no read of rows without a wait since they were written, no write without one since the read."""
    log: list[tuple[str, int]] = []

    def logged(name: str, place):
        return lambda *given: log.append((name, place(given)))

    def logging(owner: type, name: str, place=lambda given: 0) -> None:
        real = getattr(owner, name)
        note = logged(name, place)
        monkeypatch.setattr(owner, name, lambda *given: (note(*given), real(*given))[1])

    logging(activations._Beside, "wait")
    logging(activations._Beside, "follow")
    logging(activations._Ring, "take", lambda given: given[0]._rows[EARLY].data_ptr())
    logging(Activations, "_read", lambda given: given[2][EARLY].data_ptr())
    tokens = tokenize(TEXTS, model, 32, shuffle=0)
    assert len(list(Activations(model, EARLY, tokens, 100, ring=600, contexts=3, overlap=True))) > 10
    last = {}
    for number, (name, ring) in enumerate(log):
        if name == "take":
            assert last["wait", 0] > last["_read", ring]
        if name == "_read" and ("take", ring) in last:
            assert last["follow", 0] > last["take", ring]
        last[name, ring] = number
    assert len({ring for name, ring in log if name == "take"}) == 2
    assert log[-1][0] == "wait"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_stream_beside_gives_the_same_bits() -> None:
    import saekit

    model = saekit.load_model("tiny", device="cuda")
    tokens = tokenize(TEXTS, model, 32, shuffle=0)
    beside = Activations(model, EARLY, tokens, 100, ring=600, contexts=3)
    inline = Activations(model, EARLY, tokens, 100, ring=300, contexts=3, overlap=False)
    for one, other in zip(beside, inline, strict=True):
        assert torch.equal(one, other)


class Live(TorchDispatchMode):
    """Bytes of the tensors that torch's operations made while this is open: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(model, ring: int, **more) -> int:
    """Bytes that a stream held at most, over several fills."""
    tokens = tokenize(TEXTS, model, 32, shuffle=0, epochs=None)
    with (
        Live() as live,
        contextlib.closing(
            Activations(
                model, [EARLY, "blocks.1.hook_resid_post"], tokens, 64, ring=ring, contexts=2, **more
            ).batches()
        ) as batches,
    ):
        for _ in itertools.islice(batches, 5 * ring // 64):
            pass
    return live.most


@pytest.mark.parametrize(
    ("more", "part"),
    [({}, 1), ({"overlap": True}, 1), ({"share": (0, 2)}, 1 / 2), ({"share": (3, 4)}, 1 / 4)],
)
def test_memory_is_the_rings_as_configured(model, more, part) -> None:
    """What more a larger ring takes is its rows, and their token ids."""
    row = 2 * model.cfg.d_model * 4
    small, large = peak(model, 256, **more), peak(model, 1024, **more)
    ids = 64  # bytes for a row: its id and its documents, its place in the forward, mask and order
    assert part * 768 * row <= large - small <= 768 * (part * row + ids)
