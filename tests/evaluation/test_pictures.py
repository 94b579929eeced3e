"""Pictures: the front nobody beats, names where they can be read, histograms that count every latent."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from saekit.errors import FileMissing, InvalidInput
from saekit.evaluation.density import density_figure
from saekit.evaluation.front import pareto, pareto_front, pareto_of_sweep


def made(l0, explained, recovered=None, spread=0.004):
    figures = {"l0": l0, "l0_low": 0.97 * l0, "l0_high": 1.03 * l0, "explained_variance": explained}
    figures |= {"explained_variance_low": explained - spread, "explained_variance_high": explained + spread}
    return figures if recovered is None else figures | {"ce_recovered": recovered}


EIGHT = {
    "topk-k16": made(16, 0.900, 0.970),
    "topk-k32": made(32, 0.940, 0.983),
    "topk-k64": made(64, 0.970, 0.991),
    "batchtopk-k16": made(16.3, 0.905, 0.972),
    "batchtopk-k32": made(31.5, 0.945, 0.984),
    "matryoshka-k32": made(33, 0.938, 0.9835),
    "jumprelu-l0-32": made(34.2, 0.947, 0.985),
    "standard-$5": made(72, 0.93, 0.98),
}


def test_the_front_by_brute_force() -> None:
    draw = torch.Generator().manual_seed(0)
    values = (10 * torch.rand(40, 2, generator=draw)).round().tolist()  # with ties
    points = {f"p{i}": {"l0": x, "explained_variance": y} for i, (x, y) in enumerate(values)}
    expected = {
        name
        for name, p in points.items()
        if not any(
            q["l0"] <= p["l0"]
            and q["explained_variance"] >= p["explained_variance"]
            and (q["l0"] < p["l0"] or q["explained_variance"] > p["explained_variance"])
            for q in points.values()
        )
    }
    front = pareto_front(points)
    assert set(front) == expected
    assert [points[name]["l0"] for name in front] == sorted(points[name]["l0"] for name in front)


def test_eight_names_can_be_read() -> None:
    figure = pareto(EIGHT)
    assert [axes.get_ylabel() for axes in figure.axes] == ["explained variance", "CE recovered"]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert {text.get_text().replace("\\$", "$") for text in axes.texts} == set(EIGHT)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        frame = axes.get_window_extent()
        for box in boxes:
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        dots = axes.transData.transform(
            [(p["l0"], p["explained_variance" if "var" in axes.get_ylabel() else "ce_recovered"]) for p in EIGHT.values()]
        )  # fmt: skip
        assert not [1 for box in boxes for dot in dots if box.contains(*dot)]


def test_without_faithfulness_there_is_one_panel_and_without_figures_none() -> None:
    assert len(pareto({"a": made(10, 0.8), "b": {"l0": 20, "explained_variance": 0.7}}).axes) == 1
    for nothing in ({}, {"a": {"tokens": 3.0}}):
        with pytest.raises(InvalidInput, match="pareto: expected figures of evaluated SAEs"):
            pareto(nothing)


def test_a_dead_sae_has_no_place_on_a_log_axis() -> None:
    figure = pareto({"dead": made(0, 0.0), "alive": made(10, 0.8)})
    assert [text.get_text() for text in figure.axes[0].texts] == ["alive"]
    pareto({"dead": made(0, 0.0)})  # an empty panel, no exception


def test_a_sweep_is_drawn_from_its_folder(tmp_path) -> None:
    for name, figures in EIGHT.items():
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final" / "metrics.json").write_text(json.dumps(figures))
    path = pareto_of_sweep(tmp_path)
    assert path == tmp_path / "pareto.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {*EIGHT, "pareto.png"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileMissing, match="no \\*/final/metrics.json"):
        pareto_of_sweep(tmp_path / "empty")


def test_every_latent_that_fired_is_in_the_histogram() -> None:
    draw = torch.Generator().manual_seed(0)
    density = (10 ** (torch.randn(500, generator=draw).double() - 2.5)).clamp(max=1)
    density[:37] = 0
    one = torch.tensor([1.0, 1 / 8192, 0]).double()
    figure = density_figure({"many": density, "one": one, "none": torch.zeros(5).double(), "more": density})
    counts = [sum(bar.get_height() for bar in axes.patches) for axes in figure.axes]
    assert counts == [463, 2, 0, 463]
    assert figure.axes[0].texts[0].get_text() == "37 of 500 never fired"
    figure.savefig(__import__("io").BytesIO())
