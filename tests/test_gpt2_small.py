"""The GPT-2 small path at its true shapes: 768 wide, 24,576 latents, centred activations, feature 7650.

GPT-2's weights and the published SAE are on the hub. A random model of GPT-2's shape (fewer blocks) with the embedded
tokenizer, and a random SAE in the published layout, go through the very same code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import saekit
from saekit import embedded
from saekit.cli import main
from saekit.sae import SAE, SAEConfig
from saekit.sites import capture
from saekit.tokens import tokenize

SITE = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("gpt2-shaped")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8192, n_positions=1024, n_embd=768, n_layer=3, n_head=12, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.folder("model") / name, path / "model" / name)
    metadata = {"hook_name": SITE, "model_name": str(path / "model")}
    sae = SAE(SAEConfig("standard", 768, 24_576, center_input=True, metadata=metadata))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(24_576, 768, generator=draw) / 28)
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.fill_(-1)
    sae.save(path / "sae")
    return path


@pytest.fixture(scope="module")
def gpt2(folder):
    return saekit.load_model(folder / "model", dtype="float32")


def test_centring_the_input_is_centring_the_writing_weights(folder, gpt2) -> None:
    """TransformerLens's centre_writing_weights makes every residual x − mean(x); the SAE was trained on that."""
    sae = SAE.load(folder / "sae")
    sae.check_fits(gpt2)
    x = capture(gpt2, [SITE], gpt2.to_tokens("Mike pulls out his"))[SITE]
    plain = SAE(SAEConfig("standard", 768, 24_576))
    plain.load_state_dict(sae.state_dict())
    with torch.no_grad():
        centred = x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(sae.encode(x), plain.encode(centred))
        # The model computes the same from the centred residual: its norms take the mean off anyway.
        logits = gpt2(gpt2.to_tokens("Mike pulls out his"))
        with saekit.sites.editing(gpt2, {SITE: lambda y: y - y.mean(-1, keepdim=True)}):
            torch.testing.assert_close(
                gpt2(gpt2.to_tokens("Mike pulls out his")), logits, atol=1e-4, rtol=1e-4
            )


def test_the_jedi_command_at_true_shapes(folder, capsys) -> None:
    call = [
        "steer",
        str(folder / "sae"),
        "7650",
        "--prompt",
        "Mike pulls out his",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    assert main([*call, "--strength", "40"]) == 0
    moved = json.loads(capsys.readouterr().out)
    assert moved["edit"] == f"add 40 feature 7650 at {SITE}"
    assert moved["kl"] > 0
    assert main([*call, "--strength", "0"]) == 0
    still = json.loads(capsys.readouterr().out)
    assert still["plain"] == still["steered"] == moved["plain"]
    assert main([*call, "--kind", "clamp", "--strength", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0
    assert main([*call[:2], "24576", *call[3:]]) == 1
    assert "0 to 24575" in capsys.readouterr().err


def test_evaluating_and_cataloguing_a_centred_sae(folder, gpt2, tmp_path) -> None:
    whole = SAE.load(folder / "sae")
    # Every 24th latent: all of them cost 24² times as much when each is laid beside each, and show no more.
    sae = SAE(replace(whole.config, d_sae=1024))
    rows = {
        name: p[..., ::24] if name == "W_enc" else p if name == "b_dec" else p[::24]
        for name, p in whole.state_dict().items()
    }
    sae.load_state_dict(rows)
    tokens = tokenize(
        ["Mike pulls out his phone. " * 8, "The king sees a ship near the river. " * 8], gpt2, 32
    )
    figures = saekit.evaluate(gpt2, sae, tokens)
    assert figures["tokens"] > 50
    catalog = saekit.Catalog.build(gpt2, sae, tokens, tmp_path / "c", contexts=2)
    assert catalog.sae.config.center_input
    assert len(catalog) == 1024


def test_the_published_vector_file_is_refused_at_another_width(model) -> None:
    from conftest import SHARED

    path = SHARED / "vectors" / "gpt2_small_res_jb_jedi_vector.json"
    if not path.exists():
        pytest.skip("../shared/vectors is missing")
    found = json.loads(path.read_text())
    vector = torch.tensor(
        found if isinstance(found, list) else next(v for v in found.values() if isinstance(v, list))
    )
    assert vector.shape == (768,)
    assert float(vector.norm()) == pytest.approx(1.809, abs=1e-3)
    direction = saekit.Direction(vector, "blocks.0.hook_resid_pre", "published Jedi vector")
    with pytest.raises(ValueError, match="width 768 cannot act"), saekit.steer(model, direction.add(15.0)):
        pass
