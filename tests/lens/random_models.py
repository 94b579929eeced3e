"""A small Gemma-style model with random weights: RMSNorm whose weight is an offset from 1, GeGLU, grouped queries, soft caps."""

from __future__ import annotations

from pathlib import Path

import torch

from saekit.embedded import folder


def gemma_folder(place: Path) -> Path:
    """A Hugging Face folder of a Gemma 2 of 3 blocks and width 48, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=8192,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        max_position_embeddings=128,
        sliding_window=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=5.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder("model")).save_pretrained(place)
    return place


def load(which: str, tmp_path_factory):
    """`tiny-float32`, `stories260k-bfloat16`, `gemma-float32`, …"""
    import pytest
    from conftest import SHARED

    import saekit

    name, dtype = which.split("-")
    if name == "gemma":
        return saekit.load_model(gemma_folder(tmp_path_factory.mktemp("gemma")), dtype=dtype, device="cpu")
    if name == "stories260k":
        if not (SHARED / "models" / "stories260k").is_dir():
            pytest.skip(
                "../shared/models/stories260k is missing: the Llama-style model is not part of the repository"
            )
        return saekit.load_model(SHARED / "models" / "stories260k", dtype=dtype, device="cpu")
    return saekit.load_model(name, dtype=dtype, device="cpu")


EVERY = [f"{name}-{dtype}" for name in ("tiny", "stories260k", "gemma") for dtype in ("float32", "bfloat16")]
