from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saekit.catalog.explain.prompts import (
    LONGEST_EXPLANATION,
    fingerprint,
    read_explanation,
    read_judgement,
    read_simulation,
    spelled,
    to_judge,
    to_simulate,
    with_activations,
)

HOSTILE = st.text(st.sampled_from("01,[] \n\t.-9<>/thinkaé\"'*:\u2028\r") | st.characters(), max_size=80)


@given(HOSTILE, st.integers(1, 5))
def test_readers_give_what_was_asked_for_or_nothing(text, n) -> None:
    numbers = read_simulation(text, n)
    if numbers is not None:
        assert len(numbers) == n
        for at, value in numbers:
            assert 0 <= value <= 10
            assert text[at:].startswith(f"{value:.20g}"[:1]) or text[at] == "0"
    verdicts = read_judgement(text, n)
    if verdicts is not None:
        assert len(verdicts) == n
        assert all(text[at] == ("1" if verdict else "0") for at, verdict in verdicts)
    said = read_explanation(text)
    if said is not None:
        assert 0 < len(said) <= LONGEST_EXPLANATION
        assert said.isprintable()
        assert said == said.strip()


@given(
    st.lists(st.tuples(st.text(max_size=6), st.integers(0, 10)), min_size=1, max_size=12), st.text(max_size=9)
)
def test_what_a_judge_fills_in_is_read_back(lines, thought) -> None:
    """Whatever the tokens are: line ends, tabs, numbers, brackets."""
    tokens, numbers = [t for t, _ in lines], [n for _, n in lines]
    asked = to_simulate("x", tokens).split("\n\n", 1)[1]
    assert asked.count("\n") == len(tokens) - 1
    filled = "\n".join(
        f"{line.removesuffix('unknown')}{n}" for line, n in zip(asked.split("\n"), numbers, strict=True)
    )
    text = f"<think>{thought}\t7\n</think>{filled}"
    found = read_simulation(text, len(tokens))
    assert found is not None
    assert [value for _, value in found] == numbers
    assert all(text[at:].startswith(str(n)) for (at, _), n in zip(found, numbers, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("1, 0, 1", [True, False, True]),
        ("Texts 1 and 3 match.\n[1,0,1]", [True, False, True]),
        ("<think>[0, 0, 0]</think> [1, 0, 1]", [True, False, True]),
        ("[0, 0, 0] no, rather [1, 0, 1]", [True, False, True]),
        ("[1, 0]", None),
        ("[1, 0, 1, 0]", None),
        ("[1, 0, 2]", None),
        ("[101]", None),
        ("yes, no, yes", None),
        ("", None),
    ],
)
def test_judgements(text, expected) -> None:
    found = read_judgement(text, 3)
    assert (None if found is None else [verdict for _, verdict in found]) == expected


@pytest.mark.parametrize(
    "text",
    [
        " a\t3",
        " a\t3\n b\t4\n c\t5",
        " a\t3\n b\t11",
        " a\t3\n b\tunknown",
        " a 3\n b 4",
        " a\t3\n b\t-1",
        " a\t٣\n b\t1",
    ],
)
def test_simulations_that_are_not_whole(text) -> None:
    assert read_simulation(text, 2) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names of rivers", "names of rivers"),
        ("  \n\n“names of rivers”.\nBecause …", "“names of rivers”"),
        ('Explanation: "names of rivers"', "names of rivers"),
        ('**Explanation**: the word "of"', 'the word "of"'),
        ("<think>\nhm\n</think>\n\nnames\tof rivers", "names of rivers"),
        ("...\n---", None),
        ("", None),
        ("x" * 900, "x" * LONGEST_EXPLANATION),
    ],
)
def test_explanations(text, expected) -> None:
    assert read_explanation(text) == expected


def test_activations_are_on_one_scale_for_all_excerpts() -> None:
    text = with_activations([([" a", "\n"], [2.0, 0.0]), ([" b\t"], [1.1])])
    assert text == "Excerpt 1:\n a\t10\n\\n\t0\n\nExcerpt 2:\n b\\t\t5"
    assert with_activations([([" a"], [0.0])]) == "Excerpt 1:\n a\t0"


@given(st.text(max_size=20))
def test_a_token_keeps_to_its_line(token) -> None:
    assert not set("\n\r\t") & set(spelled(token))


def test_texts_to_judge_are_numbered_lines() -> None:
    assert to_judge("x", ["a\nb", '"']).split("\n\n")[1] == '1. "a\\nb"\n2. "\\""'


def test_hashes_tell_prompts_apart() -> None:
    assert len({fingerprint("a", 1), fingerprint("a", 2), fingerprint("b", 1)}) == 3
    assert fingerprint("a", 1) == fingerprint("a", 1)
