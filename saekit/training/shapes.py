"""What a dry run knows of a language model without its weights: the shape, from the best source that is at hand.

    a model that is here      its own config
    one in the hub's cache    its config.json there; no network is asked
    a few well-known ones     the table below, as published

From a shape follow the widths of its sites, the size of its weights and the FLOP of a forward that stops at a block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.files import read_json
from saekit.sites import RESIDUAL

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# What transformers calls the architectures whose MLP is known to have two matrices, or three.
PLAIN = ("gpt2", "gpt_neox", "gptj")
GATED = ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "olmo2")
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GPT2_KEYS = ("n_embd", "n_layer", "n_head", "vocab_size")
LIKE_RESIDUAL = ("ln1.hook_out", "ln2.hook_out", "mlp.hook_in", "mlp.hook_out")  # of width d_model, too


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer."""

    width: int  # d_model
    blocks: int
    heads: int  # heads · d_head
    kv_heads: int  # key-value heads · d_head
    mlp: int  # d_mlp
    vocabulary: int
    gated: bool = False  # whether the MLP has a third matrix
    source: str = "as published"

    @property
    def block_parameters(self) -> int:
        """Of a block's matrices; norms and biases are left out."""
        attention = 2 * self.width * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.width * self.mlp

    @property
    def parameters(self) -> int:
        """Of all blocks and the embedding: no more than is held in memory, where an unembedding of its own adds to it."""
        return self.blocks * self.block_parameters + self.vocabulary * self.width

    def width_at(self, site: str) -> int | None:
        """D at a site, None where the shape alone does not tell."""
        found = IN_BLOCK.fullmatch(site)
        if found is None or int(found[1]) >= self.blocks:
            return None
        name = found[2]
        if name in RESIDUAL or name in LIKE_RESIDUAL:
            return self.width
        return {"mlp.hook_pre": self.mlp, "mlp.hook_post": self.mlp, "attn.hook_z": self.heads}.get(name)

    def forward_flops(self, sites: Sequence[str], context: int) -> int:
        """Per token, of a forward that stops at the last of the sites: 2 per weight, and 4 · context · heads for
        attention's scores and sums. A block that is entered counts whole, so it is an upper bound."""
        blocks = max(self._blocks_for(site) for site in sites)
        return blocks * (2 * self.block_parameters + 4 * context * self.heads)

    def _blocks_for(self, site: str) -> int:
        found = IN_BLOCK.fullmatch(site)
        if found is None:
            return self.blocks
        return int(found[1]) + (found[2] != "hook_resid_pre")


PYTHIA_70M = Shape(512, 6, 512, 512, 2048, 50_304)  # Biderman 2023, table 1
KNOWN = {
    "gpt2": Shape(768, 12, 768, 768, 3072, 50_257),  # Radford 2019
    "EleutherAI/pythia-70m": PYTHIA_70M,
    "EleutherAI/pythia-70m-deduped": PYTHIA_70M,
    "google/gemma-2-2b": Shape(2304, 26, 2048, 1024, 9216, 256_000, gated=True),  # Gemma Team 2024, table 1
    "meta-llama/Llama-3.1-8B": Shape(4096, 32, 4096, 1024, 14_336, 128_256, gated=True),  # Grattafiori 2024
}


def known_shape(name: str) -> Shape | None:
    """The shape of a model on the hub, from its cached config or the table; None where neither has it."""
    return _cached(name) or KNOWN.get(name)


def shape_of(model: TransformerBridge) -> Shape:
    """The shape of a model that is loaded."""
    cfg = model.cfg
    return Shape(
        width=cfg.d_model,
        blocks=cfg.n_layers,
        heads=cfg.n_heads * cfg.d_head,
        kv_heads=(cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head,
        mlp=cfg.d_mlp or 4 * cfg.d_model,
        vocabulary=cfg.d_vocab,
        gated=bool(cfg.gated_mlp),
        source="its config",
    )


def _cached(name: str) -> Shape | None:
    """From config.json in the hub's cache, read as a file: no library that might ask a network is in between."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name the hub could have
        return None
    if not isinstance(path, str):
        return None
    config = read_json(Path(path))
    keys = GPT2_KEYS if config.get("model_type") in ("gpt2", "gptj") else KEYS
    sizes: list[Any] = [config.get(key) for key in keys]
    if config.get("model_type") not in PLAIN + GATED or None in sizes:
        return None
    width, blocks, heads, vocabulary = sizes
    head = config.get("head_dim") or width // heads
    return Shape(
        width=width,
        blocks=blocks,
        heads=heads * head,
        kv_heads=(config.get("num_key_value_heads") or heads) * head,
        mlp=config.get("intermediate_size") or config.get("n_inner") or 4 * width,
        vocabulary=vocabulary,
        gated=config["model_type"] in GATED,
        source="its config in the hub's cache",
    )
