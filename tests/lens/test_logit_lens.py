"""The logit lens: the last layer is the model itself, and every layer is norm and unembedding of its stream."""

from __future__ import annotations

import json

import pytest
import torch
from lens.random_models import EVERY, load

from saekit.errors import InvalidInput
from saekit.lens.logit_lens import Guess, LogitLens, logit_lens
from saekit.lens.tokens import token_id
from saekit.sites import capture

TEXT = "The old king walked to the"


@pytest.fixture(scope="module", params=EVERY)
def lm(request, tmp_path_factory):
    return load(request.param, tmp_path_factory)


def tolerance(lm) -> float:
    return 1e-4 if lm.cfg.dtype == torch.float32 else 2e-2


@torch.no_grad()
def test_the_last_layer_is_the_model(lm) -> None:
    p = lm(lm.to_tokens(TEXT))[0].float().softmax(-1)
    wanted = int(p[-1].topk(4).indices[3])
    lens = logit_lens(lm, TEXT, token=wanted)
    assert lens.layers == tuple(range(lm.cfg.n_layers + 1))
    assert lens.positions == tuple(range(p.shape[0]))
    assert lens.wanted is not None
    for position in lens.positions:
        got = [guess.p for guess in lens.top[-1][position]]
        assert got == pytest.approx(p[position].topk(5).values.tolist(), rel=tolerance(lm))
        assert lens.wanted[-1][position].p == pytest.approx(float(p[position, wanted]), rel=tolerance(lm))
    if lm.cfg.dtype == torch.float32:
        assert lens.wanted[-1][-1].rank == 3
        assert lens.wanted[-1][-1].p == lens.top[-1][-1][3].p


@torch.no_grad()
def test_a_layer_is_the_final_norm_and_head_of_its_stream(lm) -> None:
    """Against the Hugging Face modules, without TransformerLens."""
    inner = lm.original_model
    norm = inner.transformer.ln_f if hasattr(inner, "transformer") else inner.model.norm
    x = capture(lm, ["blocks.1.hook_resid_pre"], lm.to_tokens(TEXT))["blocks.1.hook_resid_pre"][0, 2:4]
    logits = inner.lm_head(norm(x[None]))[0].float()
    if (cap := getattr(inner.config, "final_logit_softcapping", None)) is not None:
        logits = cap * (logits / cap).tanh()
    p = logits.softmax(-1)
    lens = logit_lens(lm, TEXT, layers=[1], positions=[2, 3], k=3)
    for row in range(2):
        got = [guess.p for guess in lens.top[0][row]]
        assert got == pytest.approx(p[row].topk(3).values.tolist(), rel=tolerance(lm))


def test_soft_caps_are_put_on(tmp_path_factory) -> None:
    gemma = load("gemma-float32", tmp_path_factory)
    before = logit_lens(gemma, TEXT, positions=[-1], layers=[3]).top[0][0][0].p
    gemma.cfg.output_logits_soft_cap = None
    assert logit_lens(gemma, TEXT, positions=[-1], layers=[3]).top[0][0][0].p > 1.05 * before


def test_positions_and_layers_are_chosen(model, no_leaked_hooks) -> None:
    every = logit_lens(model, TEXT, token=" river")
    some = logit_lens(model, TEXT, positions=[-1, 2], layers=[6, 0], token=" river", k=2)
    last = every.positions[-1]
    assert (some.positions, some.layers) == ((last, 2), (6, 0))
    assert every.wanted is not None
    assert some.wanted is not None
    for at, layer in enumerate(some.layers):
        for p, position in enumerate(some.positions):
            assert some.wanted[at][p].p == pytest.approx(every.wanted[layer][position].p, rel=1e-3)
            assert some.top[at][p][0].token == every.top[layer][position][0].token
    assert "' river': rank, probability" in str(some)
    assert str(some).count("layer") == 4


def test_json_and_figure(model, tmp_path) -> None:
    lens = logit_lens(model, "It costs $5 or $6\n", token=" river")
    made = json.loads(json.dumps(lens.to_dict()))
    assert len(made["rows"]) == len(lens.layers) * len(lens.positions)
    assert made["rows"][-1]["top"][0] == {"token": lens.top[-1][-1][0].token, "p": lens.top[-1][-1][0].p}
    figure = lens.figure()
    figure.savefig(tmp_path / "f.png")
    assert lens.wanted is not None
    shown = figure.axes[0].images[0].get_array()
    assert float(shown[2, 3]) == pytest.approx(lens.wanted[2][3].p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [7]}, "has layers 0 .* to 6"),
        ({"layers": ["1"]}, "has layers 0 .* to 6"),
        ({"positions": [99]}, "positions 0 to 6"),
        ({"positions": []}, "at least one position"),
        ({"layers": []}, "at least one position"),
        ({"token": " lightsaberish"}, "tokens of this model"),
        ({"token": 8192}, "an id from 0 to 8191"),
        ({"token": ""}, "expected a text"),
        ({"k": 0}, "k: expected"),
    ],
)
def test_lenses_that_cannot_be(model, options, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        logit_lens(model, TEXT, **options)


def test_tokens_are_named_by_their_text(model, llama) -> None:
    for lm in (model, llama):
        vocabulary = lm.tokenizer.get_vocab()
        piece = next(
            p for p in vocabulary if p[:1] in "Ġ▁" and p[1:].isascii() and p[1:].isalpha() and len(p) > 3
        )
        assert token_id(lm, piece.replace("▁", " ").replace("Ġ", " ")) == vocabulary[piece]
        assert token_id(lm, vocabulary[piece]) == vocabulary[piece]


def test_tokens_that_no_font_has_are_drawn_as_escapes(tmp_path) -> None:
    """matplotlib would warn of each and draw a box."""
    lens = LogitLens(
        ("漢", "$x$"), (0, 1), (0,), (((Guess("漢", 0.9),), (Guess("$\\frac{", 0.1),)),), "漢", None
    )
    figure = lens.figure()
    figure.savefig(tmp_path / "f.png")
    assert [t.get_text() for t in figure.axes[0].texts] == ["'\\u6f22'", "'\\$\\\\frac{'"]
