"""Token-by-token reading: values are those of the activations, and what is shown is harmless."""

from __future__ import annotations

import html
import io
import json
from html.parser import HTMLParser

import pytest
import torch
from conftest import SITE
from lens.random_models import EVERY, load
from rich.console import Console

from saekit.errors import InvalidInput, UnknownName
from saekit.lens.reading import Reading, Track, read
from saekit.sae import SAE
from saekit.sites import capture
from saekit.steering.directions import Direction
from saekit.steering.edits import Edit, Steerable

SITE_2 = "blocks.2.hook_resid_pre"
TEXT = "The old king walked to the river, and the dog followed him."


@pytest.fixture(scope="module", params=EVERY)
def lm(request, tmp_path_factory):
    return load(request.param, tmp_path_factory)


@torch.no_grad()
def test_values_are_projections_and_activations(lm) -> None:
    D = lm.cfg.d_model
    sae = SAE.new("topk", d_in=D, d_sae=2 * D, k=8, site="blocks.1.hook_resid_mid")
    ids = lm.to_tokens(TEXT)
    seen = capture(lm, [SITE_2, sae.site], ids)
    f = sae.encode(seen[sae.site])[0]
    latent = int(f[3].argmax())
    direction = Direction(torch.randn(D, generator=torch.Generator().manual_seed(0)) * 7, SITE_2, "some")
    reading = read(lm, TEXT, [direction, Direction.from_sae(sae, latent)])
    projected, active = reading.tracks
    x = seen[SITE_2][0].float()
    torch.testing.assert_close(
        torch.tensor(projected.values), x @ direction.vector / direction.norm, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(torch.tensor(active.values), f[:, latent].float(), rtol=1e-4, atol=1e-5)
    assert (projected.kind, active.kind) == ("projection", "activation")
    assert active.zero == 0
    assert active.scale == pytest.approx(float(f[1:, latent].max()), rel=1e-4)
    assert "".join(reading.tokens[1:]).strip() == TEXT
    assert reading.special == (True,) + (False,) * (ids.shape[1] - 1)
    ordinary = torch.tensor(projected.values)[1:]
    assert projected.zero == pytest.approx(float(ordinary.median()))
    assert max(abs(projected.level(t)) for t in range(1, len(ordinary) + 1)) == pytest.approx(1)


@torch.no_grad()
def test_a_crosscoder_and_a_transcoder_are_read_where_they_read(model) -> None:
    sites = [SITE_2, SITE]
    x = torch.cat([capture(model, [s], model.to_tokens(TEXT))[s][0] for s in sites], -1)
    crosscoder = SAE.new("standard", d_in=512, d_sae=64, site=sites)
    reading = read(model, TEXT, Direction.from_sae(crosscoder, 5, SITE))
    torch.testing.assert_close(
        torch.tensor(reading.tracks[0].values), crosscoder.encode(x)[:, 5], rtol=1e-4, atol=1e-5
    )
    transcoder = SAE.new(
        "standard", d_in=256, d_out=256, d_sae=64, site=SITE_2, target_site="blocks.2.hook_mlp_out"
    )
    reading = read(model, TEXT, Direction.from_sae(transcoder, 5))
    torch.testing.assert_close(
        torch.tensor(reading.tracks[0].values), transcoder.encode(x[:, :256])[:, 5], rtol=1e-4, atol=1e-5
    )
    assert reading.tracks[0].site == SITE_2


def test_a_feature_whose_maximum_is_known_has_one_scale_in_every_text(model, sae) -> None:
    """As a catalog's features: colours of two texts compare."""

    class Known(Steerable):
        def edit(self, kind, strength=0.0, unit="raw") -> Edit:
            return Edit(
                kind,
                SITE,
                sae.direction(3057),
                strength,
                unit,
                "known",
                latent=3057,
                sae=sae,
                max_activation=20.0,
            )

    track = read(model, TEXT, Known()).tracks[0]
    assert track.scale == 20
    assert track.level(3) == pytest.approx(track.values[3] / 20)
    assert track.values[3] > 0
    assert "full colour ±20" in track.title


def test_reading_leaves_no_hook(model, sae, no_leaked_hooks) -> None:
    read(model, TEXT, Direction.from_sae(sae, 1))


HOSTILE = 'a <script>alert(1)</script> & "b" \x1b[31mred\x1b[0m \u202egnol $x^2$\nnext'


class Only(HTMLParser):
    """Which tags and attributes there are, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_html_is_escaped(model) -> None:
    reading = read(model, HOSTILE, Direction(torch.ones(256), SITE_2, "<img src=x onerror=alert(1)>"))
    shown = Only()
    shown.feed(reading._repr_html_())
    assert shown.tags == {"div", "style", "b"}
    assert shown.attributes == {"class", "style", "title"}
    assert "<script>alert(1)</script>" in shown.text
    assert "<img src=x" in shown.text
    assert "\x1b" not in reading._repr_html_()
    assert "\u202e" not in reading._repr_html_()
    assert "↵\n" in html.unescape(reading._repr_html_())


def test_a_token_that_is_a_tag_is_escaped() -> None:
    track = Track('"><script>', "s", "activation", (1.0,), 0.0, 1.0)
    shown = Only()
    shown.feed(Reading(("<img src=x>&lt;",), (False,), (track,))._repr_html_())
    assert shown.tags == {"div", "style", "b"}
    assert shown.text.endswith("<img src=x>&lt;")


def test_a_terminal_gets_colours_and_no_control_characters(model, monkeypatch) -> None:
    reading = read(model, HOSTILE, Direction(torch.ones(256), SITE_2, "\x1b]0;title\x07"))
    plain = str(reading)  # pytest is no terminal
    assert "\x1b" not in plain
    assert "\u202e" not in plain
    assert "\\x1b" in plain
    lines = plain.splitlines()
    assert len(lines) == 2 + len(reading.tokens)
    assert float(lines[-1].split()[-1]) == pytest.approx(reading.tracks[0].values[-1], rel=1e-3)

    shown = io.StringIO()
    Console(file=shown, force_terminal=True, color_system="truecolor", width=200).print(reading)
    strongest = max(range(1, len(reading.tokens)), key=lambda t: abs(reading.tracks[0].level(t)))
    level = reading.tracks[0].level(strongest)
    assert f"48;2;{'76;139;209' if level > 0 else '232;144;60'}m" in shown.getvalue()
    assert "\x1b[31m" not in shown.getvalue()
    assert "\x1b]" not in shown.getvalue()

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[30;48;2;" in str(reading)
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(reading) == plain


def test_a_figure_of_hostile_tokens_can_be_drawn(model, sae, tmp_path) -> None:
    reading = read(
        model, HOSTILE, [Direction(torch.ones(256), SITE_2, "$\\frac{"), Direction.from_sae(sae, 3)]
    )
    figure = reading.figure()
    figure.savefig(tmp_path / "f.png")
    axes = figure.axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[0] == 0  # BOS
    assert heights[1:] == pytest.approx([v - reading.tracks[0].zero for v in reading.tracks[0].values[1:]])


def test_as_json(model, sae) -> None:
    made = json.loads(json.dumps(read(model, TEXT, Direction.from_sae(sae, 3)).to_dict()))
    assert len(made["tokens"]) == len(made["tracks"][0]["values"])
    assert made["tracks"][0]["label"] == "feature 3"


def test_what_cannot_be_read(model, sae) -> None:
    direction = Direction(torch.ones(256), SITE_2)
    for what, text, message in [
        (direction, "", "a prompt is empty"),
        (direction, "word " * 400, "tokens, but tiny reads 256"),
        ([], TEXT, "got none"),
        (["feature"], TEXT, "expected a direction or a feature, got str"),
        (Direction(torch.ones(64), SITE_2, "d"), TEXT, "d has width 64, but tiny has 256"),
        (Direction(torch.ones(256), SITE_2, "d", model="m", model_hash="0"), TEXT, "tiny has other weights"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            read(model, text, what)
    with pytest.raises(UnknownName, match="Did you mean"):
        read(model, TEXT, Direction(torch.ones(256), "blocks.2.resid_pre"))


def test_a_text_of_special_tokens_alone(model) -> None:
    reading = read(model, "<|endoftext|>", Direction(torch.ones(256), SITE_2))
    assert all(reading.special)
    assert reading.tracks[0].scale == 0
    assert "<b" not in reading._repr_html_()
