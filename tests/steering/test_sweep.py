from __future__ import annotations

import json
import statistics
from dataclasses import asdict

import pytest
import torch

from saekit.errors import InvalidInput
from saekit.steering.compare import compare
from saekit.steering.directions import Direction
from saekit.steering.judging import perplexity, repetition
from saekit.steering.sweep import Figures, SteeringSweep, SweepRow, control_of, sweep

PROMPT = "Mike pulls out his"
SITE = "blocks.3.hook_resid_pre"


@pytest.fixture(scope="module")
def jedi(model) -> Direction:
    return Direction.from_contrast(model, " Jedi", " phone", site=SITE)


@pytest.fixture(scope="module")
def curve(model, jedi) -> SteeringSweep:
    return sweep(
        model, [PROMPT, "The old ship"], {"third": jedi.add, "other": lambda s: jedi.add(s / 2)}, [0.0, 0.5, 1.5],
        keywords=["Jedi", "Master"], samples=2, controls=2, max_new_tokens=8,
    )  # fmt: skip


def test_rows_are_what_compare_finds_one_by_one(model, jedi, curve) -> None:
    assert [(row.place, row.strength) for row in curve] == [
        (place, s) for place in ("third", "other") for s in (0.0, 0.5, 1.5)
    ]
    sides = [compare(model, p, jedi.add(0.5), max_new_tokens=8) for p in (PROMPT, "The old ship")]
    assert curve[1].steered.kl == pytest.approx(statistics.fmean(s.kl for s in sides), rel=1e-3)
    assert curve[1].text == sides[0].steered
    assert curve.plain_text == sides[0].plain
    assert curve[4].steered.kl < curve[1].steered.kl  # half the strength


def test_strength_zero_is_plain_and_so_is_its_control(curve) -> None:
    zero = curve[0]
    for figures in (zero.steered, zero.control, zero.control_least, zero.control_most):
        assert asdict(figures) == pytest.approx(
            asdict(curve.plain), abs=1e-6
        )  # a batch rounds as its size has it
    assert zero.text == zero.control_text == curve.plain_text
    assert curve.plain.kl == 0


def test_the_controls_are_seeds_of_one_edit(model, jedi, curve) -> None:
    kls = []
    for seed in (0, 1):
        control = control_of(jedi.add(1.5), seed)
        assert control.direction.norm() == pytest.approx(float(jedi.vector.norm()), rel=1e-5)
        sides = [compare(model, p, control, max_new_tokens=8) for p in (PROMPT, "The old ship")]
        kls.append(statistics.fmean(s.kl for s in sides))
    row = curve[2]
    assert (row.control_least.kl, row.control_most.kl) == pytest.approx((min(kls), max(kls)), rel=1e-3)
    assert row.control.kl == pytest.approx(statistics.fmean(kls), rel=1e-3)


def test_figures_of_text_are_those_of_the_text(model, jedi) -> None:
    found = sweep(model, PROMPT, jedi.add, [1.0], max_new_tokens=12, controls=1)
    ids = model.to_tokens(found[0].text)[0]
    start = model.to_tokens(PROMPT).shape[1]
    assert found[0].steered.perplexity == pytest.approx(perplexity(model, ids, start), rel=1e-3)
    assert found[0].steered.repetition == pytest.approx(repetition(ids[start:].tolist()))
    assert found[0].steered.keywords is None is found[0].steered.keyword_p


def test_a_features_text_is_read_again(model, sae) -> None:
    feature = Direction.from_sae(sae, 3)
    found = sweep(model, PROMPT, feature.add, [0.0, 30.0], max_new_tokens=8, controls=1)
    assert found[0].steered.reactivation is not None
    assert found.plain.reactivation is None
    assert "again" not in str(found).splitlines()[0] or found.plain.reactivation is None


def _row(strength, effect, ppl, most, place="a"):
    f = Figures(kl=0.0, perplexity=ppl, repetition=0, distinct=1, keywords=effect)
    c = Figures(kl=0.0, perplexity=ppl, repetition=0, distinct=1, keywords=most)
    return SweepRow(place, strength, "", f, c, c, c, "")


def test_the_knee_is_fluent_and_beyond_the_controls() -> None:
    plain = Figures(kl=0.0, perplexity=10.0, repetition=0, distinct=1, keywords=0.0)
    rows = (
        _row(0, 0.5, 10, 0),
        _row(1, 0.2, 12, 0.1),
        _row(2, 0.6, 20, 0.1),
        _row(3, 0.9, 21, 0.1),
        _row(1.5, 0.05, 12, 0.1, "b"),
    )
    curve = SteeringSweep(rows, plain, "")
    assert curve.knee() is rows[2]
    assert curve.knee("b") is None
    assert "suggested: 2 at a" in str(curve)
    assert "no strength is both" in str(SteeringSweep(rows[4:], plain, ""))


def test_records_json_table_and_picture(curve, tmp_path) -> None:
    records = curve.records()
    assert len(records) == len(curve) == 6
    assert json.loads(curve.to_json())["rows"] == records
    assert records[2]["control_most_kl"] == curve[2].control_most.kl
    table = curve.wandb_table()
    assert table.columns == list(records[0])
    assert len(table.data) == 6
    figure = curve.figure()
    figure.savefig(tmp_path / "sweep.png")
    assert len(figure.axes) == 5  # all but reactivation, which a direction does not have


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": []}, "at least one number"),
        ({"prompts": []}, "expected a prompt"),
        ({"samples": 0}, "expected a prompt, a sample and a control"),
        ({"controls": 0}, "expected a prompt, a sample and a control"),
        ({"keywords": [""]}, "none of them empty"),
    ],
)
def test_wrong_calls(model, jedi, change, message) -> None:
    given = {"prompts": PROMPT, "make": jedi.add, "strengths": [1.0], "max_new_tokens": 2} | change
    with pytest.raises(InvalidInput, match=message):
        sweep(model, **given)


def test_nothing_stays_on_the_model(model, jedi) -> None:
    ids = model.to_tokens(PROMPT)
    with torch.no_grad():
        before = model(ids)
        with pytest.raises(ZeroDivisionError):
            sweep(model, PROMPT, lambda s: jedi.add(1 / s), [0.0])
        assert torch.equal(model(ids), before)
