from __future__ import annotations

import json

import numpy as np
import pytest

from saekit.catalog.draws import explains
from saekit.catalog.explain.excerpts import Excerpts, check_feature, folder_of
from saekit.catalog.explain.rules import held_out_windows
from saekit.catalog.explain.scorers import held_out_pairs
from saekit.errors import FileMissing, InvalidInput, UnknownFeature


@pytest.fixture(scope="module")
def excerpts(original) -> Excerpts:
    return Excerpts(original)


def truth(seen, windows, i: int) -> np.ndarray:
    """The activations of a window, from the dense ones: every row of this world is in the corpus, in its order."""
    row, position = divmod(int(windows.start[i]), seen.ids.shape[1])
    return seen.f[row, position : position + int(windows.length[i]), int(windows.feature[i])]


@pytest.fixture(scope="module")
def whole(seen, tmp_path_factory):
    """A world all of whose rows are sampled, so that corpus rows are rows of the text."""
    from catalog.explain.worlds import written

    return Excerpts(written(tmp_path_factory.mktemp("whole") / "catalog", seen, sample_rows=60))


def test_activations_are_the_true_ones(whole, seen) -> None:
    held = held_out_windows(whole, 0, 8, 10)
    for windows in (whole.contexts(0, 8), held):
        assert len(windows.feature) > 50
        for i, length in enumerate(windows.length.tolist()):
            np.testing.assert_array_equal(windows.activations[i, :length], truth(seen, windows, i))
            assert not windows.activations[i, length:].any()
    drawn = held.take(held.band < 0)
    assert (drawn.activations > 0).any()  # a random window is not a silent one


def test_explaining_and_held_out_documents_are_disjoint(excerpts) -> None:
    contexts = excerpts.contexts(0, 8)
    explaining = set(contexts.document[explains(contexts.document)].tolist())
    held = held_out_windows(excerpts, 0, 8, 20)
    tried = set(held.document.tolist())
    for feature in range(8):
        for windows in held_out_pairs(excerpts, feature, 20):
            tried |= set(windows.document.tolist())
    assert len(tried) > 20
    assert len(explaining) > 20
    assert not tried & explaining
    assert not any(explains(np.array(sorted(tried))))


def test_windows_lie_in_one_document_and_apart(excerpts, seen) -> None:
    T = seen.ids.shape[1]
    held = held_out_windows(excerpts, 0, 8, 20)
    taken: set[tuple[int, int]] = set()
    for feature, document, start, length in zip(
        held.feature.tolist(), held.document.tolist(), held.start.tolist(), held.length.tolist(), strict=True
    ):
        places = range(start, start + length)
        assert {int(excerpts.documents[at]) for at in places} == {document}
        assert not any(excerpts.ids[at] == 0 for at in places)
        assert start // T == (start + length - 1) // T
        assert not taken & {(feature, at) for at in places}
        taken |= {(feature, at) for at in places}


def test_top_and_random_windows_are_one_to_one(excerpts) -> None:
    held = held_out_windows(excerpts, 0, 8, 5)
    for feature in range(8):
        bands = held.band[held.feature == feature]
        assert (bands == 0).sum() == (bands == -1).sum() == (0 if feature == 3 else 5)
    np.testing.assert_array_equal(held.feature, np.sort(held.feature))


def test_silent_windows_are_silent(whole, seen) -> None:
    for feature in (0, 2, 5):
        firing, silent = held_out_pairs(whole, feature, 10)
        n = len(firing.feature)
        assert 8 <= n == len(silent.feature) <= 10
        assert len(set(firing.document.tolist())) == n
        assert len(set(firing.band.tolist())) >= 2  # not the strongest alone, where the range has more
        for i in range(n):
            assert truth(seen, firing, i).max() > 0
            assert truth(seen, silent, i).max() == 0


def test_draws_do_not_depend_on_the_block(excerpts) -> None:
    together = held_out_windows(excerpts, 0, 8, 6)
    for feature in range(8):
        alone, here = held_out_windows(excerpts, feature, feature + 1, 6), together.feature == feature
        np.testing.assert_array_equal(alone.start, together.start[here])
        np.testing.assert_array_equal(alone.activations, together.activations[here])


def test_the_next_token_is_of_the_same_document(whole, seen) -> None:
    held = held_out_windows(whole, 0, 1, 10)
    ids, after = whole.ids_of(held), whole.ids_of(held, 1)
    T = seen.ids.shape[1]
    for i, (start, length) in enumerate(zip(held.start.tolist(), held.length.tolist(), strict=True)):
        for k in range(ids.shape[1]):
            row, position = divmod(start + k, T)
            if k >= length:
                assert ids[i, k] == after[i, k] == -1
                continue
            assert ids[i, k] == seen.ids[row, position]
            ends = position + 1 == T or seen.documents[row, position + 1] != seen.documents[row, position]
            assert after[i, k] == (-1 if ends else seen.ids[row, position + 1])


def test_a_wrong_folder_or_feature_is_named(folder, tmp_path) -> None:
    with pytest.raises(FileMissing, match=r"catalog\.json does not exist"):
        folder_of(tmp_path / "none")
    for wrong in (8, -1, True, "1", 1.0):
        with pytest.raises(UnknownFeature, match="has features 0 … 7"):
            check_feature(wrong, 8)
    info = json.loads((folder / "catalog.json").read_text())
    del info["sample"]
    (folder / "catalog.json").write_text(json.dumps(info))
    with pytest.raises(InvalidInput, match="field 'sample' is missing"):
        Excerpts(folder)
    (folder / "catalog.json").write_text(json.dumps(info | {"schema": 1}))
    with pytest.raises(InvalidInput, match="schema 1; explanations are made from schema 2"):
        Excerpts(folder)
