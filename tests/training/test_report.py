"""The report: true curves, features that nobody picked, one file that asks for nothing, and no run that it can spoil."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import SITE, sentences
from sketches import sketched

from saekit.evaluation import assess
from saekit.lm import special_ids
from saekit.recipe import parse_recipe
from saekit.sae import SAE
from saekit.sites import read
from saekit.tokens import tokenize
from saekit.training.report import HTML, PNG, panels, write_report
from saekit.training.report.features import CONTEXTS, FEATURES, Example, Excerpt, drawn, examples
from saekit.training.report.page import page
from saekit.training.report.rows import POINTS, History, curve
from saekit.training.report.words import measured, opening
from saekit.training.report.words import sentences as told
from saekit.training.run import train
from saekit.training.tracking import SAMPLES, read_rows

OTHER = "blocks.1.hook_resid_pre"
TOPK = {"architecture": "topk", "d_sae": 64, "k": 6}
HELD_OUT = 3  # documents
DRAWN = True  # pictures are what this is about
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somebody") / "private"
    folder.mkdir()
    (folder / "text.json").write_text(json.dumps(sentences(40)))
    (folder / "held.json").write_text(json.dumps(sentences(HELD_OUT, seed=9)))
    return folder


@pytest.fixture(scope="module")
def recipe(texts):
    def make(sae=TOPK, **changes):
        return parse_recipe(
            {
                "name": "told", "model": "tiny", "dtype": "float32", "site": SITE, "sae": sae,
                "data": {"text": str(texts / "text.json"), "context_size": 32, "held_out_text": str(texts / "held.json")},
                "training": {"tokens": 800, "batch_size": 100, "ring": 400, "contexts": 4, "log_every": 2,
                             "evaluate_every": 3, "evaluate_tokens": 300},
            } | changes
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run(recipe, model, tmp_path_factory):
    return train(recipe(), model=model, runs=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def held_out(texts, model):
    return tokenize(texts / "held.json", model, 32)


class Parsed(HTMLParser):
    """Tags, ids, and what a browser would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.urls: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "data", "action", "srcset"):
                self.urls.append(value)

    def handle_data(self, data):
        self.text += data


def row(tokens: int, **values: float) -> dict[str, float]:
    return {"step": tokens // 10, SAMPLES: tokens, **values}


def test_a_long_run_is_thinned_to_means_and_no_spike_goes_unseen() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    values[777] = 50.0
    found = curve([row(10 * i, a=float(v)) for i, v in enumerate(values)], "a")
    assert len(found.mean) <= POINTS
    assert max(found.high) == 50.0
    assert np.average(found.mean, weights=[5] * len(found.mean)) == pytest.approx(values.mean())
    assert all(low <= mean <= high for low, mean, high in zip(found.low, found.mean, found.high, strict=True))
    assert found.tokens[-1] == 9990
    short = curve([row(10, a=1.0), row(20), row(30, a=3.0)], "a")
    assert (short.tokens, short.mean, short.low, short.high) == ([10, 30], [1, 3], [1, 3], [1, 3])


def test_losses_of_one_unit_are_told_and_those_that_were_never_there_are_not(run) -> None:
    history = History.of(read_rows(run.path))
    assert list(history.losses) == ["loss"]  # AuxK had no dead latent to work on
    assert history.tokens == 800
    assert history.held_out["tokens"] == [300, 600, 800]
    penalised = [row(10, **{"losses/overall_loss": 3.0, "losses/mse_loss": 9.0, "losses/l1_loss": 1.0, "metrics/l0": 4.0,
                            "metrics/explained_variance": 0.5, "sparsity/dead_features": 0})]  # fmt: skip
    assert list(History.of(penalised).losses) == ["loss", "of it the L1 penalty"]


def test_features_are_drawn_by_their_numbers_alone() -> None:
    density = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    first = drawn(density, 500)
    assert sorted(first) == list(range(500)) != first
    assert drawn(1 / density, 500) == first  # how often it fires is not asked, but for never
    density[first[3]] = 0
    assert drawn(density, 10) == [i for i in first[:11] if i != first[3]]
    assert drawn(torch.zeros(5), 10) == []


@pytest.mark.parametrize("sites", [SITE, (OTHER, SITE)])
def test_each_feature_is_shown_where_it_fires_most(model, held_out, sites) -> None:
    """By brute force over all held-out tokens, of an SAE and of a crosscoder."""
    crossed = not isinstance(sites, str)
    sae = SAE.new("topk", d_in=512 if crossed else 256, d_sae=64, k=6, site=sites, widths=[256, 256] if crossed else None,
                  model="tiny")  # fmt: skip
    evaluation = assess(model, sae, held_out, faithfulness=False)
    shown = examples(model, sae, held_out, evaluation)
    assert [e.index for e in shown] == sorted(drawn(evaluation.density, FEATURES))
    ids = torch.stack(list(held_out))
    f = sae.encode(read(model, sae.sites, ids).float()).detach()  # [N, T, S]
    f[torch.isin(ids, torch.tensor(special_ids(model)))] = 0
    for example in shown:
        assert example.strongest == pytest.approx(float(f[..., example.index].max()), rel=1e-4)
        assert example.density == float(evaluation.density[example.index])
        peaks = [excerpt.activations[excerpt.peak] for excerpt in example.excerpts]
        assert peaks == sorted(peaks, reverse=True)
        assert 1 <= len(peaks) <= CONTEXTS
        for excerpt in example.excerpts:
            assert max(excerpt.activations) == excerpt.activations[excerpt.peak]
            assert "<|endoftext|>" not in excerpt.tokens
            assert any(
                "".join(excerpt.tokens) in text for text in sentences(HELD_OUT, seed=9)
            )  # one document's words
        assert bool(example.raised) == bool(example.lowered) == (not crossed)


def test_the_same_recipe_gives_the_same_report(run, recipe, model, tmp_path) -> None:
    again = train(recipe(), model=model, runs=tmp_path)
    for name in (HTML, PNG):
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes(), name


def test_the_page_is_one_file_that_asks_for_nothing_and_tells_the_figures(run, texts) -> None:
    text = (run.path / HTML).read_text("utf-8")
    found = Parsed(text)
    assert not {"script", "link", "iframe", "object", "base", "form", "img"} & set(found.tags)
    assert all(url.startswith("#") for url in found.urls)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "content=\"default-src 'none';" in text
    assert len(found.ids) == len(set(found.ids)) > 20  # of four pictures in one document
    for colour in panels.COLOURS.values():
        assert colour not in text.partition("</style>")[2]  # the page's style has the say
    for part in texts.parts[1:]:
        assert part not in found.text  # no folder of ours
    assert found.tags.count("article") == FEATURES
    assert found.tags.count("svg") == 4
    for name, key in (("explained variance", "explained_variance"), ("CE recovered", "ce_recovered")):
        assert re.search(rf"{name}\s*{run.metrics[key]:.4f}", found.text)
    assert "text.json, in contexts of 32 tokens" in found.text
    assert (run.path / PNG).read_bytes().startswith(SIGNATURE)


def test_each_sae_of_a_sweep_has_its_report(recipe, model, tmp_path) -> None:
    kinds = [{"architecture": "standard", "d_sae": 48}, {**TOPK, "site": [OTHER, SITE], "name": "crossed"}]
    training = {
        "tokens": 400,
        "batch_size": 100,
        "ring": 400,
        "contexts": 4,
        "log_every": 1,
        "evaluate_tokens": 100,
    }
    sweep = train(recipe(kinds, training=training), model=model, runs=tmp_path)
    pages = {name: Parsed((sweep[name].path / HTML).read_text("utf-8")).text for name in sweep.names}
    assert not (sweep.path / HTML).exists()
    assert "of it the L1 penalty" in pages["standard"]
    assert "told · standard" in pages["standard"]
    assert (
        f"A TopK crosscoder of 64 latents, 6 of them for a token, which reads and writes {OTHER} and {SITE}"
        in pages["crossed"]
    )
    for name in sweep.names:
        assert f"{sweep[name].metrics['explained_variance']:.4f}" in pages[name]


def test_what_fails_in_a_report_is_told_and_spoils_nothing(recipe, model, tmp_path, monkeypatch) -> None:
    lines = []

    class Told:
        def line(self, text: str) -> None:
            lines.append(text)

        def progress(self, *_) -> None: ...

    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("saekit.training.report.replace_text", broken)
    with sketched():
        run = train(recipe(), model=model, runs=tmp_path, reporter=Told())
    assert lines[-1] == f"no report in {run.path} (no space left); all else of the run is there"
    left = {path.name for path in run.path.iterdir()}
    assert {"final", "step-8"} < left
    assert not [name for name in left if name == HTML or ".tmp" in name]
    train(recipe(), model=model, runs=tmp_path, resume=True, reporter=Told())
    assert lines[-1].endswith("nothing to do")


def test_report_false_leaves_none(recipe, model, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("saekit.training.trainee.write_report", lambda *_: asked.append(_))
    run = train(recipe(report=False), model=model, runs=tmp_path)
    assert not asked
    assert {path.name for path in run.path.iterdir()} == {"recipe.yaml", "metrics.jsonl", "final", "step-8"}


def test_hostile_tokens_are_shown_and_nothing_more(run, recipe, model, held_out, tmp_path) -> None:
    bad = [
        "<script>alert(1)</script>",
        '"onload="x',
        "$x^2$",
        "\x1b[31m",
        "\u202eevil",
        "\n",
        "漢字",
        "</svg><style>",
    ]
    example = Example(3, 0.01, [Excerpt(bad, [float(i) for i in range(len(bad))], 7)], bad, bad)
    made, history = recipe(), History.of(read_rows(run.path))
    evaluation = assess(model, run.sae, held_out)
    found = Parsed(page(made, made.members[0], run.sae, history, evaluation, [example]))
    assert "script" not in found.tags
    assert found.tags.count("style") == 1 + 4  # the page's and what matplotlib puts into a picture
    assert "<script>alert(1)</script>" in found.text
    assert "\\x1b[31m\\u202eevil↵漢字" in found.text
    panels.save_picture(tmp_path / "a.png", "run", made.members[0], history, evaluation, [example])
    assert (tmp_path / "a.png").read_bytes().startswith(SIGNATURE)


def test_an_sae_of_which_nothing_fires_has_a_report_too(run, recipe, model, held_out, tmp_path) -> None:
    sae = SAE.new("standard", d_in=256, d_sae=32, site=SITE, model="tiny")
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    (tmp_path / "metrics.jsonl").write_bytes((run.path / "metrics.jsonl").read_bytes())
    made = recipe({"architecture": "standard", "d_sae": 32})
    made_of = assess(model, sae, held_out)
    write_report(tmp_path, made, made.members[0], model, sae, held_out, made_of)
    assert "No latent fired on held-out text." in (tmp_path / HTML).read_text("utf-8")


def test_words_say_what_the_recipe_says(recipe, run) -> None:
    made = recipe(
        {
            "architecture": "jumprelu",
            "d_sae": 64,
            "training": {"target_l0": 20, "dead_latents": "resample", "lr": 1e-3},
        }
    )
    words = told(made, made.members[0], 800)
    assert words["Text"] == (
        "text.json, in contexts of 32 tokens, documents shuffled; held out is held.json."
    )
    assert words["Length"] == "800 tokens in 8 steps of 100."
    assert (
        words["Learning rate"]
        == "0.001, after a rise over the first 1 % of the run; linear decay over its last 20 %."
    )
    assert words["Sparsity"] == "The penalty is steered until L0 is 20."
    assert words["Dead latents"].endswith("started anew at 20 %, 40 % and 60 % of the run.")
    assert opening(recipe(), recipe().members[0], run.sae) == (
        f"A TopK SAE of 64 latents, 6 of them for a token, which reads {SITE} of tiny (width 256)."
    )
    through = recipe({**TOPK, "target_site": "blocks.3.hook_mlp_out", "skip": True})
    assert opening(through, through.members[0], run.sae) == (
        f"A TopK skip transcoder of 64 latents, 6 of them for a token, which reads {SITE} and writes "
        "blocks.3.hook_mlp_out of tiny (width 256)."
    )
    (l0, tokens) = measured({"l0": 3.14159, "l0_low": 3.0, "l0_high": 3.5, "tokens": 12345})
    assert (l0.value, l0.interval, tokens.value, tokens.interval) == ("3.14", "3.00 … 3.50", "12,345", "")
