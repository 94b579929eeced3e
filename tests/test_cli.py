"""The command line as people and scripts meet it: output, JSON, exit codes, one line per mistake."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import SITE, sentences
from filelock import FileLock

from saekit.cli import main
from saekit.console import CatalogProgress


def corpus_in(folder):
    path = folder / "text.json"
    path.write_text(json.dumps(sentences(60)))
    return path


def recipe_in(folder, corpus):
    path = folder / "r.yaml"
    path.write_text(
        f"name: small\nmodel: tiny\nsite: {SITE}\ndata: {{text: {corpus}, context_size: 32, held_out: 0.2}}\n"
        "sae: {architecture: topk, d_sae: 64, k: 4}\ntraining: {tokens: 2000, batch_size: 200, ring: 400, evaluate_tokens: 300}\n"
    )
    return path


@pytest.fixture
def corpus(tmp_path):
    return corpus_in(tmp_path)


@pytest.fixture
def recipe(tmp_path, corpus):
    return recipe_in(tmp_path, corpus)


def output(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_the_whole_way_by_hand(recipe, corpus, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    planned = json.loads(output(capsys, "train", recipe, "--dry-run", "--json"))
    assert (planned["steps"], planned["d_in"], planned["checked"][0]) == (10, 256, f"text {corpus}")
    assert "10 steps" in output(capsys, "train", recipe, "--dry-run")
    assert "5 steps" in output(
        capsys, "train", recipe, "--dry-run", "training.tokens=1000"
    )  # after an option too
    for wrong in ("training.tokens", "--nonsense=1"):
        with pytest.raises(SystemExit) as refused:
            main(["train", str(recipe), "--dry-run", wrong])
        assert refused.value.code == 2
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()

    trained = json.loads(output(capsys, "train", recipe, "sae.k=8", "--json"))
    assert trained["path"] == "checkpoints/small"
    assert (
        "nothing to do" in (main(["train", str(recipe), "sae.k=8", "--resume"]), capsys.readouterr().err)[1]
    )

    sae = "checkpoints/small/final"
    assert json.loads(output(capsys, "eval", sae, "--text", corpus, "--tokens", 200, "--json"))["l0"] <= 8
    assert "explained_variance" in output(capsys, "eval", sae, "--text", corpus, "--tokens", 200)

    built = json.loads(output(capsys, "catalog", "build", sae, "--text", corpus, "--out", "cat", "--json"))
    assert built["features"] == 64
    hits = json.loads(output(capsys, "catalog", "search", "cat", "king", "--json"))
    feature = hits[0]["feature"]
    assert str(feature) in output(capsys, "catalog", "search", "cat", "king")
    record = json.loads(output(capsys, "catalog", "show", "cat", feature, "--json"))
    assert record["contexts"][0]["tokens"]
    assert f"feature {feature}" in output(capsys, "catalog", "show", "cat", feature)

    steered = json.loads(
        output(
            capsys,
            "steer",
            "cat",
            feature,
            "--prompt",
            "The king",
            "--unit",
            "norm",
            "--strength",
            1,
            "--json",
        )
    )
    assert steered["kl"] > 0
    assert steered["plain"].startswith("The king")
    assert "KL" in output(
        capsys, "steer", "cat", feature, "--prompt", "The king", "--kind", "ablate", "--positions", "1,2"
    )
    curve = [
        "sweep",
        "cat",
        feature,
        "--prompt",
        "The king",
        "--strengths",
        "0,4",
        "--samples",
        2,
        "--controls",
        1,
        "--max-new-tokens",
        8,
    ]
    rows = json.loads(output(capsys, *curve, "--keywords", "king,River", "--json"))
    assert [row["strength"] for row in rows] == [0, 4]
    assert rows[0]["kl"] == pytest.approx(rows[0]["control_kl"], abs=1e-6) == pytest.approx(0, abs=1e-6)
    assert rows[1]["keywords"] is not None
    assert "random" in output(capsys, *curve, "--figure", "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    page = output(capsys, "catalog", "page", "cat", "site").strip()
    assert (tmp_path / page).is_file()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained SAE and its catalog, `checkpoints/small/final` and `cat`; made once for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "by-hand"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        if not folder.exists():
            making = tmp_path_factory.mktemp("by-hand-making")
            patch.chdir(making)
            corpus = corpus_in(making)
            assert main(["train", str(recipe_in(making, corpus)), "report=false"]) == 0
            build = ["catalog", "build", "checkpoints/small/final", "--text", str(corpus), "--out", "cat"]
            assert main(build) == 0
            making.rename(folder)
    return folder


@pytest.fixture
def built(made, tmp_path, monkeypatch):
    """A copy of it, with its text, in the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def test_a_catalog_is_asked_by_hand(built, tmp_path, capsys) -> None:
    hits = json.loads(output(capsys, "catalog", "search", "cat", "--sort", "density", "--limit", 3, "--json"))
    densities = [hit["density"] for hit in hits]
    assert densities == sorted(densities, reverse=True)
    feature = hits[0]["feature"]
    assert "of its firings" in output(capsys, "catalog", "show", "cat", feature, "--bands")
    fired = json.loads(output(capsys, "catalog", "firing", "cat", "The king sees a river", "--json"))
    assert len(fired["tokens"]) == len(fired["features"]) > 4
    assert "king" in output(capsys, "catalog", "firing", "cat", "The king sees a river")
    near = json.loads(output(capsys, "catalog", "near", "cat", feature, "--by", "firing", "--json"))
    assert all(0 < one["similarity"] <= 1 for one in near)
    exact = json.loads(
        output(capsys, "catalog", "raising", "cat", " king", "--exact", "--limit", 4, "--json")
    )
    effects = [one["effect"] for one in exact]
    assert effects == sorted(effects, reverse=True)
    same = json.loads(output(capsys, "catalog", "diff", "cat", "cat", "--json"))
    assert same["share"] == 1
    assert "nothing wrong" in output(capsys, "catalog", "check", "cat")
    (tmp_path / "cat" / "tokens.parquet").write_bytes(b"")
    assert main(["catalog", "check", "cat"]) == 1
    assert "tokens.parquet" in capsys.readouterr().out


def test_parts_are_merged_to_what_one_build_makes(built, tmp_path, capsys) -> None:
    for i in (1, 2):
        output(
            capsys, "catalog", "build", "checkpoints/small/final", "--text", "text.json", "--out", f"part-{i}", "--part", f"{i}/2"
        )  # fmt: skip
    merged = json.loads(output(capsys, "catalog", "merge", "part-1", "part-2", "--out", "merged", "--json"))
    assert merged["features"] == 64
    for file in (tmp_path / "cat").iterdir():
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes(), file.name


def test_features_are_explained_by_hand(built, tmp_path, capsys) -> None:
    told = output(
        capsys, "catalog", "explain", "cat", "--top", 2, "--prompts-out", "asked.jsonl", "--model", "judge"
    )
    assert "prompts" in told
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    answers = "".join(json.dumps({"id": i, "text": "words about kings"}) + "\n" for i in ids)
    (tmp_path / "answered.jsonl").write_text(answers)
    done = json.loads(
        output(capsys, "catalog", "explain", "cat", "--top", 2, "--answers-in", "answered.jsonl", "--model", "judge", "--json")
    )  # fmt: skip
    assert {row["text"] for row in done["explanations"]} == {"words about kings"}
    feature = done["explanations"][0]["feature"]
    output(capsys, "catalog", "note", "cat", feature, "royal things", "--author", "me")
    record = json.loads(output(capsys, "catalog", "show", "cat", feature, "--json"))
    assert record["explanation"] == "royal things"
    assert main(["catalog", "explain", "cat", "--base-url", "http://127.0.0.1:9", "--model", "judge"]) == 1
    assert "--yes" in capsys.readouterr().err.splitlines()[-1]


def test_a_catalog_goes_to_neuronpedias_layout(built, tmp_path, capsys) -> None:
    arguments = ["catalog", "export", "cat", "out", "--model-id", "tiny", "--source-set", "res-own", "--json"]
    assert json.loads(output(capsys, *arguments))["path"]
    assert list((tmp_path / "out").rglob("features/batch-0.jsonl.gz"))


def test_reading_by_hand(built, capsys) -> None:
    read = json.loads(output(capsys, "read", "cat", 3, "--text", "The king sees a river", "--json"))
    assert len(read["tokens"]) > 4
    assert "king" in output(capsys, "read", "checkpoints/small/final", 3, "--text", "The king sees a river")
    assert main(["read", "cat", "--text", "x"]) == 1
    assert "expected the number of a feature, or --direction FILE" in capsys.readouterr().err
    lens = output(capsys, "lens", "tiny", "--text", "The king sees a", "--token", " river", "--layers", "0,6")
    assert "river" in lens


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["steer", "tiny", "5"],
        ["steer", "tiny", "5", "--prompt", "x", "--kind", "push"],
        ["steer", "tiny", "five", "--prompt", "x"],
        ["steer", "tiny", "5", "--prompt", "x", "--positions", "some"],
        ["sweep", "tiny", "5", "--prompt", "x", "--strengths", "a,b"],
        ["catalog"],
        ["catalog", "search", "tiny", "x", "--limit", "0"],
        ["catalog", "build", "tiny", "--text", "x", "--out", "y", "--part", "one"],
        ["catalog", "explain", "tiny"],
        ["steer", "tiny", "5", "--prompt", "x", "--kind", "swap"],
        ["eval", "tiny", "--tokens", "-3"],
    ],
)
def test_a_wrong_call_exits_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: saekit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "recipe: nowhere.yaml does not exist"),
        (["eval", "nowhere"], "SAE: nowhere does not exist"),
        (["eval", "tiny", "--text", "nowhere.txt"], "text: nowhere.txt does not exist"),
        (["eval", "tiny", "--text", "nowhere"], "text: nowhere does not exist"),  # not a text of one word
        (["eval", "tiny", "--model", "./nowhere"], "model folder: nowhere does not exist"),
        (["catalog", "show", "tiny", "999999"], "feature 999999: this catalog has features 0 …"),
        (["catalog", "show", "tiny", "-1"], "feature -1"),
        (["catalog", "show", "nowhere", "1"], "catalog: nowhere does not exist"),
        (["catalog", "search", "tiny", "!!"], "no word to look for"),
        (["steer", "tiny", "1", "--prompt", ""], "prompt: expected a text"),
        (["catalog", "explain", "tiny", "--prompts-out", "x"], "--model says who answers"),
        (["catalog", "merge", "nowhere", "--out", "x"], "nowhere"),
        (
            ["catalog", "page", "tiny", "x", "--prompts", "nowhere.txt"],
            "saekit: prompts: nowhere.txt does not exist",
        ),
        (["steer", "tiny", "1", "--prompt", "x", "--strength", "nan"], "strength: expected a finite number"),
        (
            ["steer", "tiny", "1", "--prompt", "x", "--kind", "clamp", "--unit", "norm"],
            "clamp takes raw or max",
        ),
        (["steer", "tiny", "1", "--prompt", "word " * 300], "do not fit the context of 256"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_1(arguments, message, capsys) -> None:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("saekit: ")
    assert len(err.strip().splitlines()) == 1


def test_a_build_that_was_stopped_says_how_to_go_on(corpus, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["catalog", "build", "tiny", "--text", str(corpus), "--out", "cat"]
    with monkeypatch.context() as patched:
        patched.setattr(CatalogProgress, "__call__", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main(call) == 1
    assert capsys.readouterr().err.endswith(
        "saekit: catalog cat: stopped; the same command goes on where it was (--restart begins anew)\n"
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cat.building"]
    assert main(call) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cat"]


def test_without_a_command_there_is_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "the whole story on the embedded model" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["eval", "nowhere", "--debug"])


def test_python_m_saekit_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saekit", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "train", "eval", "catalog", "steer", "sweep", "serve"):
        assert command in done.stdout


def test_terminal_escapes_in_tokens_show_literally() -> None:
    from saekit.display.colours import coloured
    from saekit.lens.tokens import visible

    assert visible("a\x1b[31mred\u202e") == "a\\x1b[31mred\\u202e"
    assert "\x1b" not in coloured([("\x1b[2J", 1.0), (" ok", 0.0)]).plain
