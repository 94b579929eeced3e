"""What every contender of `benchmarks.speed` is given, as files: activations, a language model, token ids, an SAE.

D = d_in, N rows, T context_size. All of it is made anew from fixed seeds, in a folder that goes when the run is over.
"""

from __future__ import annotations

import functools
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saekit
from saekit import embedded
from saekit.files import write_tensors
from saekit.lm import quiet_loading
from saekit.sites import capture

CONTEXT_SIZE = 128
MODEL = {"n_layer": 8, "n_embd": 512, "n_head": 8, "n_positions": 256}  # GPT-2's architecture, random weights
SITE = "blocks.6.hook_resid_pre"
CONTEXTS = 4096  # of token ids; who needs more goes round again
SPARSE = 32  # L0 of the SAE whose catalog is built
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Inputs:
    """Paths of the inputs, each made when it is first asked for."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed

    @functools.cache  # noqa: B019 - lives as long as the run
    def activations(self, d_in: int, rows: int) -> Path:
        """x [rows, D], float32, E‖x‖² = D: a sparse sum of 4·D fixed directions, an offset and some noise."""
        draw = torch.Generator().manual_seed(self.seed)
        directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=draw), dim=1)
        offset = torch.randn(d_in, generator=draw)
        x = torch.empty(rows, d_in)
        for part in x.split(4096):
            firing = torch.rand(len(part), 4 * d_in, generator=draw) < 24 / (4 * d_in)
            sizes = torch.empty(firing.shape).exponential_(generator=draw)
            noise = torch.randn(part.shape, generator=draw)
            part.copy_((firing * sizes) @ directions + 0.05 * noise + 0.1 * offset)
        x *= math.sqrt(d_in) / x.norm(dim=1).mean()
        return self._written(f"x-{d_in}-{rows}", {"x": x})

    @functools.cached_property
    def model(self) -> Path:
        """A folder with a GPT-2 of 8 blocks, random weights, and the embedded model's tokenizer."""
        from transformers import GPT2Config, GPT2LMHeadModel

        tiny = embedded.folder("model")
        config = GPT2Config.from_pretrained(tiny)
        config.update({**MODEL, "dtype": "float32"})
        torch.manual_seed(self.seed)
        with quiet_loading():
            GPT2LMHeadModel(config).save_pretrained(self.folder / "model")
        for name in TOKENIZER:
            shutil.copy(tiny / name, self.folder / "model" / name)
        return self.folder / "model"

    @functools.cached_property
    def ids(self) -> Path:
        """ids [N, T] of the embedded text, packed."""
        model = saekit.load_model("tiny")
        tokens = saekit.tokenize("tiny", model, CONTEXT_SIZE, shuffle=self.seed)
        return self._written("ids", {"ids": torch.stack(list(itertools.islice(tokens, CONTEXTS)))})

    @functools.cache  # noqa: B019
    def sae(self, d_sae: int) -> Path:
        """An SAE of the standard architecture on the model's site that fires `SPARSE` times a token."""
        from saekit.files import read_tensors

        model = saekit.load_model(self.model, dtype="float32")
        x = capture(model, [SITE], read_tensors(self.ids)["ids"][:64])[SITE].flatten(0, 1)
        sae = saekit.SAE.new("standard", d_in=x.shape[1], d_sae=d_sae, site=SITE, seed=self.seed)
        with torch.no_grad():
            sae.b_dec.copy_(x.mean(0))
            p = sae.preactivations(x)
            sae.b_enc.sub_(p.topk(max(1, SPARSE * len(x) // d_sae), dim=0).values[-1])
        return sae.save(self.folder / f"sae-{d_sae}")

    @functools.cache  # noqa: B019
    def steering(self, width: int) -> Path:
        """A direction [D] and a prompt's ids [1, 8]."""
        draw = torch.Generator().manual_seed(self.seed)
        direction = torch.randn(width, generator=draw)
        prompt = torch.randint(1, 8192, (1, 8), generator=draw)
        return self._written(f"steering-{width}", {"direction": direction, "prompt": prompt})

    def _written(self, name: str, tensors: dict[str, Tensor | Any]) -> Path:
        path = self.folder / f"{name}.safetensors"
        write_tensors(path, tensors)
        return path
