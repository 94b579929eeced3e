"""One array of activations that every library trains on, batch by batch in the same order.

N activations held, D = d_in, B batch size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import saekit
from saekit.activations import Activations
from saekit.tokens import tokenize

MAX_BYTES = 2 * 2**30  # of activations held; longer runs go round again
CONTEXT_SIZE = 128
HELD_OUT = 0.05  # share of documents
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@dataclass(frozen=True)
class Source:
    """A model, a site of it, text, and an SAE of a size that suits them."""

    model: str
    text: str
    site: str
    d_sae: int
    l0: int  # wanted of every SAE


SOURCES = {
    "tiny": Source("tiny", "tiny", "blocks.3.hook_resid_pre", 1024, 32),
    "stories260k": Source(
        str(SHARED / "models" / "stories260k"),
        str(SHARED / "corpora" / "tinystories.jsonl.gz"),
        "blocks.2.hook_resid_post",
        1024,
        16,
    ),
}


@dataclass(frozen=True)
class Batches:
    """`steps` batches [B, D] of float32, the same ones in every iteration."""

    held: Tensor  # [N, D] in the model's dtype, N a multiple of B
    batch_size: int
    steps: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self[step] for step in range(self.steps))

    def __getitem__(self, step: int) -> Tensor:
        start = step * self.batch_size % len(self.held)
        return self.held[start : start + self.batch_size].float()


class Data:
    """What a benchmark on one source needs: the model, the batches, held-out ids [N, T]."""

    def __init__(self, source: Source, *, batch_size: int, steps: int, evaluate_tokens: int) -> None:
        self.source = source
        self.model = saekit.load_model(source.model)
        text = source.text if source.text == "tiny" else Path(source.text)
        train = tokenize(
            text, self.model, CONTEXT_SIZE, split="train", held_out=HELD_OUT, shuffle=0, epochs=None
        )
        held_out = train.with_(split="held_out", shuffle=None, epochs=1)
        self.held_out = torch.stack(list(itertools.islice(held_out, -(-evaluate_tokens // CONTEXT_SIZE))))
        stream = Activations(self.model, source.site, train, batch_size)
        self.d_in = stream.width
        row_bytes = stream.width * torch.finfo(self.model.cfg.dtype).bits // 8
        held_steps = min(steps, MAX_BYTES // (batch_size * row_bytes))
        held = torch.empty(held_steps * batch_size, stream.width, dtype=self.model.cfg.dtype)
        for step, x in zip(range(held_steps), stream, strict=False):
            held[step * batch_size : (step + 1) * batch_size] = x
        self.batches = Batches(held, batch_size, steps)
