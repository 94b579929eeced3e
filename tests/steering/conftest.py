"""Models of three families for steering: GPT-2-style, Llama-style, and a Gemma-style one with random weights."""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import SHARED

import saekit
from saekit import embedded

if TYPE_CHECKING:
    from pathlib import Path

STORIES = SHARED / "models" / "stories260k"


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma-2-style model (RMSNorm before and after, GeGLU, soft caps, sliding windows), random, saved as a folder."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.folder("model") / name, folder)
    return folder


@pytest.fixture(scope="session")
def family(gemma_folder):
    """Loads a model of a family, each once."""

    @functools.cache
    def load(name: str, dtype: str):
        if name == "stories260k" and not STORIES.is_dir():
            pytest.skip("../shared/models/stories260k is missing")
        place = {"tiny": "tiny", "stories260k": STORIES, "gemma": gemma_folder}[name]
        return saekit.load_model(place, dtype=dtype, device="cpu")

    return load


@pytest.fixture(
    scope="module",
    params=[
        f"{name}-{dtype}" for name in ("tiny", "stories260k", "gemma") for dtype in ("float32", "bfloat16")
    ],
)
def lm(request, family):
    """Each family in fp32 and bf16."""
    return family(*request.param.split("-"))
