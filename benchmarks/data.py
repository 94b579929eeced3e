"""One array of activations that every library trains on, batch by batch in the same order.

N activations held, D = d_in, B batch size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.activations import Activations
from saekit.tokens import Tokens, tokenize

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

MAX_BYTES = 2 * 2**30  # of activations held; longer runs go round again
CONTEXT_SIZE = 128
HELD_OUT = 0.05  # share of documents


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

    def first(self, share: float) -> Batches:
        """A shorter run over the same batches."""
        return Batches(self.held, self.batch_size, max(1, round(self.steps * share)))


def corpora(model: TransformerBridge, evaluate_tokens: int) -> tuple[Tokens, Tensor]:
    """(endless shuffled training contexts, held-out ids [N, T]) of the embedded token shards."""
    train = tokenize("tiny", model, CONTEXT_SIZE, split="train", held_out=HELD_OUT, shuffle=0, epochs=None)
    held_out = train.with_(split="held_out", shuffle=None, epochs=1)
    return train, torch.stack(list(itertools.islice(held_out, -(-evaluate_tokens // CONTEXT_SIZE))))


@torch.no_grad()
def materialise(
    model: TransformerBridge, site: str, tokens: Tokens, *, batch_size: int, steps: int
) -> Batches:
    """Run the model once and keep what its site gives, shuffled as `saekit.Activations` shuffles."""
    stream = Activations(model, site, tokens, batch_size)
    row_bytes = stream.width * torch.finfo(model.cfg.dtype).bits // 8
    held_steps = min(steps, MAX_BYTES // (batch_size * row_bytes))
    held = torch.empty(held_steps * batch_size, stream.width, dtype=model.cfg.dtype)
    for step, x in zip(range(held_steps), stream, strict=False):
        held[step * batch_size : (step + 1) * batch_size] = x
    return Batches(held, batch_size, steps)
