"""What a dry run knows of a model that is not here, laid beside models that are, and beside what others know."""

from __future__ import annotations

import pytest
import torch

from saekit.sites import site_width
from saekit.training.shapes import KNOWN, known_shape, shape_of

SITES = "hook_resid_pre hook_resid_mid hook_resid_post hook_mlp_out hook_attn_out ln1.hook_out ln2.hook_out mlp.hook_in \
mlp.hook_out mlp.hook_pre mlp.hook_post attn.hook_z".split()


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


def test_a_cached_config_comes_first(monkeypatch) -> None:
    """The defaults of GPT2Config are GPT-2 small's."""
    from transformers import AutoConfig, GPT2Config, LlamaConfig, MixtralConfig

    answers = {
        "a": GPT2Config(),
        "b": LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, intermediate_size=96),
        "c": MixtralConfig(),
    }

    def cached(name: str, **arguments: object) -> object:
        assert arguments == {"local_files_only": True, "trust_remote_code": False}
        return answers[name]

    monkeypatch.setattr(AutoConfig, "from_pretrained", cached)
    gpt2, llama = known_shape("a"), known_shape("b")
    assert gpt2 and llama
    same = [f for f in vars(gpt2) if f != "source" and getattr(gpt2, f) == getattr(KNOWN["gpt2"], f)]
    assert len(same) == len(vars(gpt2)) - 1
    assert "cache" in gpt2.source
    assert (llama.width, llama.heads, llama.kv_heads, llama.mlp, llama.gated) == (64, 64, 16, 96, True)
    assert known_shape("c") is None, "of a mixture of experts the shape does not say enough"


def test_forward_flops_are_those_that_torch_counts(any_model) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from saekit.sites import capture

    ids = torch.randint(0, 500, (2, 64))
    with FlopCounterMode(display=False) as counter:
        capture(any_model, ["blocks.3.hook_resid_post"], ids)
    counted = counter.get_total_flops() / ids.numel()
    assert shape_of(any_model).forward_flops(["blocks.3.hook_resid_post"], 64) == pytest.approx(counted, rel=0.03)
