"""What a dry run knows of a model that is not here, laid beside models that are, and beside what others know."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from saekit.sites import site_width
from saekit.training.shapes import KNOWN, known_shape, shape_of

SITES = (
    "hook_resid_pre hook_resid_mid hook_resid_post hook_mlp_out hook_attn_out ln1.hook_out ln2.hook_out mlp.hook_in \
mlp.hook_out mlp.hook_pre mlp.hook_post attn.hook_z".split()
)


@pytest.fixture(params=["model", "llama"])
def any_model(request):
    return request.getfixturevalue(request.param)


def test_the_shape_tells_the_widths_of_sites(any_model) -> None:
    shape = shape_of(any_model)
    for name in SITES:
        assert shape.width_at(f"blocks.3.{name}") == site_width(any_model, f"blocks.3.{name}"), name
    assert shape.width_at(f"blocks.{shape.blocks}.hook_resid_pre") is None
    assert shape.width_at("blocks.3.attn.hook_pattern") is None


def test_a_forward_is_counted_up_to_the_block_it_stops_in(model) -> None:
    shape = shape_of(model)
    block = 2 * shape.block_parameters + 4 * 128 * shape.heads
    assert shape.forward_flops(["blocks.0.hook_resid_pre"], 128) == 0
    assert shape.forward_flops(["blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"], 128) == 2 * block
    assert shape.forward_flops(["blocks.2.mlp.hook_in"], 128) == 3 * block
    assert shape.forward_flops(["ln_final.hook_normalized"], 128) == 6 * block


@pytest.mark.parametrize(
    ("name", "published", "vectors"),
    [  # parameters without embeddings, and what of them are norms and biases, in a block and at the end
        ("gpt2", 124_439_808 - (50_257 + 1024) * 768, (13 * 768, 2 * 768)),
        ("EleutherAI/pythia-70m", 18_915_328, (13 * 512, 2 * 512)),  # Biderman 2023, table 1
        ("google/gemma-2-2b", 2_024_517_888, (4 * 2304, 2304)),  # Gemma Team 2024, table 2
        ("meta-llama/Llama-3.1-8B", 8_030_261_248 - 2 * 128_256 * 4096, (2 * 4096, 4096)),
    ],
)
def test_the_table_adds_up_to_the_published_sizes(name, published, vectors) -> None:
    shape = KNOWN[name]
    in_block, at_end = vectors
    assert shape.blocks * (shape.block_parameters + in_block) + at_end == published
    assert known_shape(name) == shape


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "meta-llama/Llama-3.1-8B"])
def test_the_table_agrees_with_transformer_lens(name) -> None:
    from transformer_lens.loading_from_pretrained import convert_hf_model_config

    theirs, ours = convert_hf_model_config(name), KNOWN[name]
    assert (theirs["d_model"], theirs["n_layers"], theirs["d_mlp"]) == (ours.width, ours.blocks, ours.mlp)
    assert (theirs["d_vocab"], theirs["gated_mlp"]) == (ours.vocabulary, ours.gated)
    assert theirs["n_heads"] * theirs["d_head"] == ours.heads
    assert theirs["n_key_value_heads"] * theirs["d_head"] == ours.kv_heads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts a config into a hub's cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(name: str, config) -> None:
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        for part, text in {"snapshots/1/config.json": config.to_json_string(False), "refs/main": "1"}.items():
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            (folder / part).write_text(text)

    return put


def test_a_cached_config_comes_first(cache) -> None:
    """The defaults of GPT2Config are GPT-2 small's."""
    from transformers import GPT2Config, LlamaConfig, MixtralConfig

    assert known_shape("some/gpt2") is None
    cache("some/gpt2", GPT2Config())
    gpt2 = known_shape("some/gpt2")
    assert gpt2
    assert replace(gpt2, source=KNOWN["gpt2"].source) == KNOWN["gpt2"]
    assert "cache" in gpt2.source
    cache("gpt2", GPT2Config(n_layer=3, n_inner=99))
    assert (known_shape("gpt2").blocks, known_shape("gpt2").mlp) == (3, 99)
    small = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96}
    cache("llama", LlamaConfig(**small))
    llama = known_shape("llama")
    assert (llama.width, llama.heads, llama.kv_heads, llama.mlp, llama.gated) == (64, 64, 16, 96, True)
    cache("moe", MixtralConfig())
    assert known_shape("moe") is None, "of a mixture of experts the shape does not say enough"
    assert known_shape("no/such/name") is None


def test_forward_flops_are_those_that_torch_counts(any_model) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from saekit.sites import capture

    ids = torch.randint(0, 500, (2, 64))
    with FlopCounterMode(display=False) as counter:
        capture(any_model, ["blocks.3.hook_resid_post"], ids)
    counted = counter.get_total_flops() / ids.numel()
    assert shape_of(any_model).forward_flops(["blocks.3.hook_resid_post"], 64) == pytest.approx(
        counted, rel=0.03
    )
