"""The pass's state against brute force, and against itself: any partition of the units, in any order, gives the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalog.brute import Options, Seen, brute_tables, made_up
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from saekit.catalog.accumulate import (
    UNIT_ROWS,
    Firings,
    State,
    Unit,
    batch,
    contexts,
    firing,
    rows,
    token_table,
)
from saekit.catalog.accumulate import state as state_file
from saekit.catalog.accumulate.grouping import group, ranges
from saekit.catalog.accumulate.lowest import FREE, Lowest
from saekit.catalog.accumulate.norms import Norms
from saekit.errors import FileMissing, InvalidInput

SMALL = Options(contexts=3, window=8, bands=4, per_band=2, sample_rows=5, tokens=4, evidence=5, neighbours=6)


def units_of(seen: Seen) -> list[Unit]:
    found = []
    for first in range(0, len(seen.ids), UNIT_ROWS):
        some = slice(first, first + UNIT_ROWS)
        special = ~seen.evaluated[some]
        r, t, s = np.nonzero(np.where(special[..., None], 0, seen.f[some]))
        order = np.random.default_rng(first).permutation(len(r))  # firings come in any order
        r, t, s = r[order], t[order], s[order]
        fired = Firings(s, seen.f[some][r, t, s], first + r, t)
        found.append(Unit(seen.ids[some], seen.documents[some], special, seen.norms[some], first, fired))
    return found


def new(folder: Path, seen: Seen, options: Options = SMALL) -> State:
    return State(
        seen.f.shape[2],
        int(seen.ids.max()) + 1,
        contexts=options.contexts,
        window=options.window,
        bands=options.bands,
        per_band=options.per_band,
        sample_rows=options.sample_rows,
        folder=folder,
    )


def seen_by(folder: Path, seen: Seen, units: list[Unit], options: Options = SMALL) -> State:
    state = new(folder, seen, options)
    for unit in units:
        state.add(unit)
    return state


def results(state: State, options: Options = SMALL) -> dict[str, np.ndarray]:
    """Everything a state gives, to be compared to the bit."""
    m = state.moments
    named: dict[str, Any] = {
        "tokens_top": state.tokens_top(options.tokens),
        "evidence": state.evidence_top(options.evidence),
        "contexts": state.contexts(),
        "rows": state.rows(),
        "sample": state.sample(),
        "neighbours": state.firing_neighbours(options.neighbours),
    }
    flat = {f"{name}.{k}": v for name, table in named.items() for k, v in table._asdict().items()}
    moments = {k: np.asarray(v) for k, v in m.arrays().items()}
    figures = [state.tokens, state.alive, state.sinks, state.median_norm(), state.context_size or 0]
    return {**flat, **moments, "mean": m.mean(), "std": m.std(), "figures": np.array(figures)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(params=["made up", "one document", "hostile"])
def seen(request: pytest.FixtureRequest) -> Seen:
    if request.param == "hostile":
        return hostile()
    found = made_up(S=12, rows=44, T=16)
    return (
        replace(found, documents=np.zeros_like(found.documents)) if request.param == "one document" else found
    )


def hostile(seed: int = 1) -> Seen:
    """Equal values, values over ten decades, filled-up rows, special tokens amid rows, latents that fire on few tokens and on all."""
    random = np.random.default_rng(seed)
    R, T, S = 30, 16, 9
    ids = random.integers(0, 7, (R, T))
    documents = np.arange(R * T).reshape(R, T) // 7
    documents[-1, 9:] = -1
    f = np.zeros((R, T, S), np.float32)
    f[..., 0] = 1  # all equal
    f[..., 1] = random.integers(1, 4, (R, T))  # many ties
    f[..., 2] = 10.0 ** random.uniform(-6, 5, (R, T))
    token = np.arange(R * T).reshape(R, T)
    few = (token % 60 == 3) | (token % 90 == 5)  # so few that their sketches hold them all
    f[..., 3] = np.where(few, 10.0 ** random.integers(-4, 5, (R, T)), 0)
    f[..., 4] = np.where(token % 40 == 3, 0.5, 0)
    f[..., 5] = np.arange(R * T).reshape(R, T) + 1  # the maximum rises all the time
    f[..., 6] = f[::-1, ::-1, 5]  # and falls
    f[..., 7] = f[..., 5] * (random.random((R, T)) < 0.3)
    steps = np.arange(R)[:, None] // 3  # full bins fall below the range, and others take their place
    f[..., 8] = 10.0 ** (0.35 * steps + random.uniform(0, 0.02, (R, T)))
    norms = (10.0 ** random.uniform(-1, 3, (R, T))).astype(np.float32)
    return Seen(ids, documents, norms, f * (ids != 0)[..., None], special=(0,))


def table(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def test_against_brute_force(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(SMALL, sketch=16)
    monkeypatch.setattr(firing.Sketches.__init__, "__defaults__", (16,))
    state = seen_by(tmp_path, seen, units_of(seen), options)
    tables, about = brute_tables(seen, options)

    moments = state.moments
    assert moments.count.tolist() == [row["count"] for row in tables["features"]]
    assert moments.max.tolist() == [row["max_activation"] for row in tables["features"]]
    for name, figures in (("mean", moments.mean()), ("std", moments.std())):
        wanted = [row[f"{name}_activation"] for row in tables["features"]]
        np.testing.assert_allclose(figures, wanted, rtol=1e-6, atol=1e-6)
    bins = [(s, moments.histogram[s, b]) for s, b in zip(*np.nonzero(moments.histogram), strict=True)]
    assert bins == table(tables["histograms"], "feature", "count")

    found = state.contexts()
    rows_ = state.rows()
    numbers = np.searchsorted(rows_.rows, found.row)
    got = zip(
        found.feature, found.band, found.rank, found.document, numbers, found.start, found.length, found.peak,
        found.value, strict=True,
    )  # fmt: skip
    names = ("feature", "band", "rank", "document", "row", "start", "length", "peak", "max_activation")
    assert list(got) == table(tables["contexts"], *names)
    assert found.norm.dtype == np.float32
    assert found.norm.tolist() == [np.float32(row["norm"]) for row in tables["contexts"]]
    w = found.which
    got = zip(found.feature[w], found.band[w], found.rank[w], found.offset, found.activation, strict=True)
    assert list(got) == table(tables["activations"], "feature", "band", "rank", "offset", "activation")

    n, T = rows_.ids.shape
    got = zip(np.repeat(np.arange(n), T), rows_.ids.ravel(), rows_.documents.ravel(), strict=True)
    assert list(got) == table(tables["corpus"], "row", "token_id", "document")
    sample = state.sample()
    got = zip(
        sample.feature,
        np.searchsorted(rows_.rows, sample.row),
        sample.position,
        sample.activation,
        strict=True,
    )
    assert list(got) == table(tables["sample"], "feature", "row", "position", "activation")
    assert np.searchsorted(rows_.rows, sample.rows).tolist() == about["sample"]

    for top, name, value in (
        (state.tokens_top(options.tokens), "tokens", "mean_activation"),
        (state.evidence_top(options.evidence), "evidence", "expected"),
    ):
        got = zip(top.feature, top.rank, top.token_id, top.count, strict=True)
        assert list(got) == table(tables[name], "feature", "rank", "token_id", "count")
        # Sums are of v · 2^24, rounded.
        np.testing.assert_allclose(top.value, [row[value] for row in tables[name]], rtol=1e-6, atol=2**-24)

    near = state.firing_neighbours(options.neighbours)
    got = zip(near.feature, near.rank, near.neighbour, near.similarity, strict=True)
    assert list(got) == table(tables["neighbours"], "feature", "rank", "neighbour", "similarity")
    assert (state.tokens, state.median_norm(), state.sinks) == (
        about["tokens"], about["median_norm"], about["sinks"]
    )  # fmt: skip
    assert state.alive == (moments.count > 0).sum()
    assert state.units == set(range(-(-len(seen.ids) // UNIT_ROWS)))


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer so small that all that happens in a long pass happens in a short one."""
    monkeypatch.setattr(state_file, "PENDING", 1)
    monkeypatch.setattr(token_table, "PENDING", 40)
    monkeypatch.setattr(token_table, "FAN", 2)
    monkeypatch.setattr(contexts, "AT_ONCE", 40)
    monkeypatch.setattr(firing, "PENDING", 30)
    monkeypatch.setattr(firing, "AT_ONCE", 600)
    monkeypatch.setattr(rows, "HELD", 200)


@pytest.mark.usefixtures("cramped")
def test_small_buffers_change_nothing(tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    units = units_of(seen)
    cramped = seen_by(tmp_path / "cramped", seen, units)
    got = results(cramped)
    assert any((tmp_path / "cramped").glob("tokens-*"))
    assert any((tmp_path / "cramped").glob("rows-*"))
    monkeypatch.undo()
    same(got, results(seen_by(tmp_path / "whole", seen, units)))


WHOLE: dict[int, dict[str, np.ndarray]] = {}


@pytest.mark.usefixtures("cramped")
@given(data=st.data(), seed=st.integers(0, 3))
@settings(max_examples=25, phases=[Phase.generate])  # an example takes long: no shrinking
def test_any_partition_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("state")
    seen = hostile(seed) if seed % 2 else made_up(S=10, rows=36, T=12, seed=seed)
    units = units_of(seen)
    if seed not in WHOLE:
        WHOLE[seed] = results(seen_by(folder / "whole", seen, units))
    order = data.draw(st.permutations(range(len(units))))
    n = data.draw(st.integers(1, 4))
    owner = data.draw(st.lists(st.integers(0, n - 1), min_size=len(units), max_size=len(units)))
    states = [new(folder / f"state-{i}", seen) for i in range(n)]
    for step, number in enumerate(order):
        i = owner[step]
        states[i].add(units[number])
        if data.draw(st.integers(0, 3)) == 0:
            saved = folder / f"saved-{step}"
            saved.mkdir()
            states[i].save(saved)
            states[i] = State.load(saved, folder / f"loaded-{step}")
        if data.draw(st.integers(0, 3)) == 0:
            results(states[i])  # looking changes nothing
    while len(states) > 1:
        i = data.draw(st.integers(0, len(states) - 2))
        other = states.pop(i + 1)
        states[i].merge(other)
    same(results(states[0]), WHOLE[seed])


def test_saved_state_outlives_the_one_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "PENDING", 100)
    monkeypatch.setattr(token_table, "FAN", 2)
    monkeypatch.setattr(state_file, "PENDING", 1)
    seen = hostile()
    units = units_of(seen)
    state = seen_by(tmp_path / "first", seen, units[:2])
    (tmp_path / "saved").mkdir()
    state.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    for unit in units[2:]:
        state.add(unit)  # merges and drops the runs that the saved state shares
    again = State.load(tmp_path / "saved", tmp_path / "second")
    for unit in units[2:]:
        again.add(unit)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    same(results(state), results(again))


def test_what_a_killed_process_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_table, "PENDING", 100)
    monkeypatch.setattr(state_file, "PENDING", 1)
    seen = hostile()
    units = units_of(seen)
    state = seen_by(tmp_path / "first", seen, units[:2])
    (tmp_path / "saved").mkdir()
    state.save(tmp_path / "saved")
    wanted = results(seen_by(tmp_path / "first", seen, units))  # writes files of the names that come next
    again = State.load(tmp_path / "saved", tmp_path / "first")
    for unit in units[2:]:
        again.add(unit)
    same(results(again), wanted)


def test_a_state_with_nothing_in_it(tmp_path: Path) -> None:
    seen = hostile()
    empty = new(tmp_path / "empty", seen)
    assert (empty.tokens, empty.alive, empty.sinks, empty.median_norm(), empty.units) == (0, 0, 0, 0.0, set())
    assert all(
        len(column) == 0 for column in (*empty.contexts(), *empty.tokens_top(), *empty.firing_neighbours())
    )
    (tmp_path / "saved").mkdir()
    empty.save(tmp_path / "saved")
    again = State.load(tmp_path / "saved", tmp_path / "again")
    whole = seen_by(tmp_path / "whole", seen, units_of(seen))
    again.merge(whole)
    same(results(again), results(whole))


def test_rows_on_which_nothing_fires(tmp_path: Path) -> None:
    seen = hostile()
    silent = replace(seen, f=np.zeros_like(seen.f))
    state = seen_by(tmp_path, silent, units_of(silent))
    assert state.tokens == seen.evaluated.sum()
    assert state.median_norm() > 0
    assert len(state.rows().rows) == SMALL.sample_rows
    assert len(state.sample().feature) == 0


def test_refuses_what_cannot_be_counted(tmp_path: Path) -> None:
    seen = hostile()
    units = units_of(seen)
    state = seen_by(tmp_path / "a", seen, units[:1])
    with pytest.raises(InvalidInput, match=r"unit 0 .* went by already"):
        state.add(units[0])
    fired = units[1].firings
    for bad, says in (
        (units[1]._replace(first_row=3), "from a multiple of 8"),
        (units[1]._replace(ids=units[1].ids + 100), "the vocabulary has 7"),
        (units[1]._replace(norms=units[1].norms * np.nan), "not finite"),
        (units[1]._replace(firings=fired._replace(latents=fired.latents + 50)), "d_sae is 9"),
        (units[1]._replace(firings=fired._replace(values=-fired.values)), "an activation of -"),
        (units[1]._replace(firings=fired._replace(values=fired.values * np.float32(np.nan))), "an activation of nan"),
        (units[1]._replace(firings=fired._replace(values=fired.values * np.float32(1e9))), "below 1,048,576"),
        (units_of(replace(seen, ids=seen.ids[:, :8], documents=seen.documents[:, :8], norms=seen.norms[:, :8],
                          f=seen.f[:, :8]))[1], "of 16 tokens as before"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=says):
            state.add(bad)
    state.add(units[1])  # what was refused left no trace
    same(results(state), results(seen_by(tmp_path / "b", seen, units[:2])))


def test_refuses_parts_that_do_not_go_together(tmp_path: Path) -> None:
    seen = hostile()
    units = units_of(seen)
    state = seen_by(tmp_path / "a", seen, units[:2])
    with pytest.raises(InvalidInput, match="1 units are in both parts, the first is 1"):
        state.merge(seen_by(tmp_path / "b", seen, units[1:]))
    with pytest.raises(InvalidInput, match="window 8 and 9"):
        state.merge(new(tmp_path / "c", seen, replace(SMALL, window=9)))
    short = replace(
        seen, ids=seen.ids[:, :8], documents=seen.documents[:, :8], norms=seen.norms[:, :8], f=seen.f[:, :8]
    )
    with pytest.raises(InvalidInput, match="rows of 16 and 8 tokens"):
        state.merge(seen_by(tmp_path / "d", short, units_of(short)[2:]))


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "PENDING", 100)
    monkeypatch.setattr(state_file, "PENDING", 1)
    seen = hostile()
    state = seen_by(tmp_path / "a", seen, units_of(seen))
    (tmp_path / "saved").mkdir()
    state.save(tmp_path / "saved")
    run = next((tmp_path / "saved").glob("tokens-*"))
    content = run.read_bytes()
    run.unlink()
    with pytest.raises(FileMissing, match=run.name):
        State.load(tmp_path / "saved", tmp_path / "b")
    run.write_bytes(content[:-3])
    with pytest.raises(InvalidInput, match="the state is damaged"):
        State.load(tmp_path / "saved", tmp_path / "c").tokens_top()


def test_sums_do_not_overflow(tmp_path: Path) -> None:
    """A latent as strong as they come on every token: 10^5 squared, many times."""
    seen = made_up(S=2, rows=64, T=64)
    seen = replace(seen, f=np.full_like(seen.f, 1e6))
    state = seen_by(tmp_path, seen, units_of(seen))
    assert state.moments.mean()[0] == 1e6
    assert state.moments.std()[0] == 0


# Parts


@given(keys=st.lists(st.integers(0, 9), max_size=60))
def test_group_sorts(keys: list[int]) -> None:
    array = np.array(keys, np.int64)
    order, starts = group(array, 10)
    np.testing.assert_array_equal(order, np.argsort(array, kind="stable"))
    np.testing.assert_array_equal(np.diff(starts), np.bincount(array, minlength=10))


def test_ranges() -> None:
    assert ranges(np.array([5, 9, 2]), np.array([2, 0, 3])).tolist() == [5, 6, 2, 3, 4]


@given(data=st.data())
@settings(max_examples=60)
def test_lowest_keeps_the_lowest_of_each_document(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    entries = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 5)), max_size=40, unique_by=lambda e: e[:2])
    )  # fmt: skip
    lists = Lowest(4, n)
    at = 0
    while at < len(entries):
        some = entries[at : at + data.draw(st.integers(1, 12))]
        groups, keys, documents = (np.array(column) for column in zip(*some, strict=True))
        entered, slots = lists.offer(groups, keys.astype(np.uint64), documents)
        lists.point(slots, at + entered)
        at += len(some)
    for g in range(4):
        lowest: dict[int, tuple[int, int]] = {}
        for number, (own, key, document) in enumerate(entries):
            if own == g:
                lowest[document] = min(lowest.get(document, (99, 0)), (key, number))
        wanted = sorted(lowest.values())[:n]
        held = lists.records[g] >= 0
        got = sorted(zip(lists.keys[g, held].tolist(), lists.records[g, held].tolist(), strict=True))
        assert got == wanted
        assert lists.worst[g] == (wanted[-1][0] if len(wanted) == n else FREE)


def test_norms_keep_a_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.catalog.accumulate import norms as norms_file

    monkeypatch.setattr(norms_file, "SAMPLE", 50)
    seen = hostile()
    units = units_of(seen)
    whole, parts = Norms(), [Norms() for _ in units]
    whole.add(batch.Batch(units, 9))
    for part, unit in zip(parts, units, strict=True):
        part.add(batch.Batch([unit], 9))
    for part in parts[:-1][::-1]:
        parts[-1].merge(part)
    assert whole.median() == parts[-1].median()
    every = batch.Batch(units, 9)
    places = np.flatnonzero(~every.special.ravel())
    lowest = places[np.argsort(every.draws[places])[:50]]
    assert whole.median() == np.median(every.norms.ravel()[lowest])
    assert whole.above(30.0) == (every.norms.ravel()[places] > 30).sum()


def test_sketches_that_hold_all_give_the_exact_jaccard() -> None:
    random = np.random.default_rng(0)
    fires = random.random((6, 40)) < random.uniform(0.1, 0.6, (6, 1))
    tokens = np.sort(random.integers(0, 2**63, 40).astype(np.uint64))
    sketches = firing.Sketches(6, 64)
    latents, at = np.nonzero(fires)
    sketches._offer(latents, tokens[at])
    found = sketches.neighbours(5, fires.sum(1))
    for i, j, similarity in zip(found.feature, found.neighbour, found.similarity, strict=True):
        assert similarity == (fires[i] & fires[j]).sum() / (fires[i] | fires[j]).sum()
    assert len(found.feature) == sum(
        (fires[i] & fires[j]).any() for i in range(6) for j in range(6) if i != j
    )
