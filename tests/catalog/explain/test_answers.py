from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.catalog.explain.answers import Answer, Journal, Place, Prompt, clean, number, places
from saekit.errors import InvalidInput

PROMPT = Prompt("m", "say", "this", 10)


def test_ids_tell_prompts_apart() -> None:
    others = [
        Prompt("n", "say", "this", 10), Prompt("m", "sag", "this", 10), Prompt("m", "say", "that", 10),
        Prompt("m", "say", "this", 11), Prompt("m", "say", "this", 10, chances=True),
    ]  # fmt: skip
    assert len({p.id for p in [PROMPT, *others]}) == 6
    assert Prompt("m", "say", "this", 10).id == PROMPT.id


def test_a_journal_gives_back_what_was_kept(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    answer = Answer("7\n", (Place(0, 1, {7: 0.75, 8: 0.25}),))
    journal.keep(PROMPT, answer)
    other = Prompt("m", "say", "that", 10)
    journal.keep(other, Answer("", error="refused"))  # to be asked again
    again = Journal(path)
    assert again.get(PROMPT) == answer
    assert again.get(other) is None
    assert len(again) == 1


def test_a_torn_line_is_passed_over_and_the_next_one_stays_whole(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path).keep(PROMPT, Answer("first"))
    whole = path.read_bytes()
    for torn in (
        whole[:-1],
        whole[:-5],
        b"",
        b"{}\n[1]\nnull\n",
        b'{"id": 1, "text": "x", "places": [[0]]}',
        b"\xff\n",
    ):
        path.write_bytes(torn)
        journal = Journal(path)
        other = Prompt("m", "say", "that", 10)
        journal.keep(other, Answer("second"))
        again = Journal(path)
        assert again.get(other) == Answer("second")
        assert (again.get(PROMPT) is None) == (torn != whole[:-1])


def test_a_journal_that_cannot_be_written_says_so(tmp_path) -> None:
    with pytest.raises(InvalidInput, match="cannot be written"):
        Journal(tmp_path / "no" / "a.jsonl").keep(PROMPT, Answer("x"))
    with pytest.raises(InvalidInput, match="cannot be read"):
        Journal(tmp_path)


def test_numbers_are_zero_to_ten() -> None:
    assert [number(t) for t in ("0", " 7", "10\n", "11", "-1", "٣", "1.0", "", "01")] == [0, 7, 10] + [
        None
    ] * 6


def test_the_chances_of_numbers() -> None:
    answer = Answer(" a\t7", (Place(0, 2, {}), Place(2, 4, {7: 0.5, 3: 0.25})))
    assert answer.chances(3, 10) == pytest.approx([0, 0, 0, 1 / 3, 0, 0, 0, 2 / 3, 0, 0, 0])
    assert answer.chances(9, 10) is None  # beyond what it said
    assert answer.chances(0, 10) is None  # no number there
    assert Answer("7").chances(0, 10) is None
    assert Answer("1", (Place(0, 1, {1: 0.6, 0: 0.2, 7: 0.2}),)).chances(0, 1) == pytest.approx([0.25, 0.75])


def test_ten_in_two_tokens() -> None:
    """1 was 0.8 likely, and after it 0 was 0.25 likely: so 10 was 0.2 likely, and 1 alone 0.6."""
    for after in ("\n", "0"):
        answer = Answer(f"1{after}", (Place(0, 1, {1: 0.8, 2: 0.2}), Place(1, 2, {0: 0.25})))
        found = answer.chances(0, 10)
        assert found is not None
        assert (found[1], found[2], found[10]) == pytest.approx((0.6, 0.2, 0.2))


@given(
    st.text(max_size=10),
    st.lists(
        st.tuples(
            st.integers(0, 12), st.integers(0, 12), st.dictionaries(st.integers(0, 10), st.floats(0, 1))
        )
    ),
)
def test_chances_are_chances(text, pieces) -> None:
    answer = Answer(text, places(text, pieces))
    for at in range(12):
        for most in (1, 10):
            found = answer.chances(at, most)
            assert found is None or (
                len(found) == most + 1 and sum(found) == pytest.approx(1) and min(found) >= -1e-9
            )


def test_half_a_surrogate_pair_is_stored_all_the_same(tmp_path) -> None:
    text = clean(json.loads('"a\\ud800b"'))
    assert text == "a?b"
    Journal(tmp_path / "a.jsonl").keep(PROMPT, Answer(text))
