"""`saekit eval`: figures and intervals on screen, a flat object for scripts, a folder whole or not at all."""

from __future__ import annotations

import json

import pytest
from conftest import SITE, sentences

import saekit
from saekit.cli import main
from saekit.errors import InvalidInput
from saekit.evaluation.measure import assess
from saekit.evaluation.report import distinct_names, write_report
from saekit.sae import SAE


@pytest.fixture(scope="module")
def passes():
    return {}


@pytest.fixture(autouse=True)
def quick(model, passes, monkeypatch):
    """One model for all calls, and one pass per SAE: what a pass gives is tested in test_measure."""
    monkeypatch.setattr(saekit, "load_model", lambda _: model, raising=False)

    def once(*arguments, **keywords):
        k = arguments[1].k
        passes[k] = passes.get(k) or assess(*arguments, **keywords)
        return passes[k]

    monkeypatch.setattr("saekit.evaluation.measure.assess", once)


@pytest.fixture
def saes(tmp_path):
    folders = []
    for k in (4, 16):
        sae = SAE.new("topk", d_in=256, d_sae=64, k=k, site=SITE, model="tiny")
        folders.append(sae.save(tmp_path / "run" / f"k{k}" / "final"))
    return folders


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.json"
    path.write_text(json.dumps(sentences(4)))
    return path


@pytest.fixture
def probes(tmp_path):
    path = tmp_path / "moods.json"
    moods = {"gay": [f"A merry day, {i}." for i in range(8)], "sad": [f"A grey day, {i}." for i in range(8)]}
    path.write_text(json.dumps(moods))
    return path


def output(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_one_sae(saes, text, probes, tmp_path, capsys) -> None:
    folder = tmp_path / "report"
    call = ["eval", saes[0], "--text", text, "--tokens", 100, "--probe", probes, "--out", folder]
    shown = output(capsys, *call)
    for word in ("explained_variance", "95 %", "…", "k = 16", "all activations", "sad", str(folder)):
        assert word in shown
    assert "_low" not in shown
    figures = json.loads(output(capsys, *call, "--json"))  # its own folder may be replaced
    assert figures == json.loads((folder / "metrics.json").read_text())
    assert all(isinstance(value, (int, float)) for value in figures.values())
    assert figures["l0"] <= 4
    assert {"explained_variance_low", "probe/moods/k1_accuracy"} <= set(figures)
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "density.png", "probes.json"}
    (concept,) = json.loads((folder / "probes.json").read_text())[str(saes[0].parent)]["moods"]
    assert concept["concept"] == "sad"


def test_several_saes(saes, text, tmp_path, capsys) -> None:
    folder = tmp_path / "report"
    call = ["eval", *saes, "--text", text, "--tokens", 100, "--out", folder]
    rows = [line for line in output(capsys, *call).splitlines() if line.startswith(("k4 ", "k16 "))]
    assert len(rows) == 2
    found = json.loads(output(capsys, *call, "--json"))
    assert list(found) == ["k4", "k16"]
    assert found["k4"]["l0"] < found["k16"]["l0"]
    assert found["k4"]["tokens"] == found["k16"]["tokens"]
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "density.png", "pareto.png"}


def test_the_output_folder_is_checked_first_and_left_alone(saes, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for place, message in (
        ("mine", "holds thesis.tex, which an evaluation would replace"),
        ("file", "is a file"),
    ):
        (tmp_path / "file").write_text("x")
        assert main(["eval", str(saes[0]), "--out", str(tmp_path / place)]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(InvalidInput, match="holds thesis.tex"):
        write_report(tmp_path / "mine", {}, {})
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"

    def no_space(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("saekit.evaluation.report.density_figure", no_space)
    assert main(["eval", str(saes[0]), "--tokens", "100", "--out", str(tmp_path / "report")]) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("report")]


def test_names_are_short_and_distinct() -> None:
    assert distinct_names(["runs/a/final", "runs/b/final"]) == ["a", "b"]
    assert distinct_names(["runs/a/x/final", "runs/b/x/final"]) == ["a/x", "b/x"]
    assert distinct_names(["tiny", "/tmp/a/final"]) == ["tiny", "/tmp/a"]
    assert distinct_names(["final"]) == ["final"]
    assert distinct_names(["a", "a/b"]) == ["a", "a/b"]
    with pytest.raises(InvalidInput, match="a is given twice"):
        distinct_names(["x/a", "x/a/final"])


def test_wrong_files_are_one_line(saes, tmp_path, capsys) -> None:
    assert main(["eval", str(saes[0]), "--probe", str(tmp_path / "nowhere.csv")]) == 1
    assert "labelled texts" in capsys.readouterr().err
