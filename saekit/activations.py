"""Model + site + ids → an endless or one-pass stream of shuffled activations [B, D].

    contexts ──forward to the site──▶ rows (special tokens dropped) ──▶ ring [R, D] ──permuted──▶ [B, D]

The ring is allocated once, filled in place with one copy per row, then given out in a random order (Gemma
Scope shuffles in buckets the same way, Lieberum 2024, section 3). Memory is the ring's, whatever the corpus.
Everything is replayable: a position is the corpus position at which the ring was last filled and the number
of rows given out since, so a resumed stream goes on with the same bits.

R ring rows, B batch_size, D width of the site, T context_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sites import capture, check_site, site_width
from saekit.tokens import Position, TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class StreamPosition(NamedTuple):
    """Where a stream of activations stands."""

    filled_from: Position = Position()  # corpus position at which the current ring was filled
    fill: int = 0  # number of the current fill: seeds its permutation
    given: int = 0  # rows of the current ring given out


class Activations:
    """One pass (or, over `Tokens` with `epochs=None`, an endless stream) of shuffled activations.

    Iterating gives [batch_size, D] tensors in the model's dtype; the last one of a pass may be shorter.

    model: a `TransformerBridge`. site: a TransformerLens name. tokens: `Tokens`, or ids [N, T].
    batch_size: rows per batch. ring: rows held for shuffling. contexts: contexts per forward.
    seed: of the shuffling. include_special: keep BOS, EOS and pad positions (attention sinks).
    """

    def __init__(
        self,
        model: TransformerBridge,
        site: str,
        tokens: Tokens | Tensor | Iterable[Tensor],
        batch_size: int = 2048,
        *,
        ring: int = 65_536,
        contexts: int = 32,
        seed: int = 0,
        include_special: bool = False,
        start: StreamPosition = StreamPosition(),  # noqa: B008
    ) -> None:
        if batch_size < 1 or ring < batch_size:
            raise InvalidInput(f"ring: {ring} rows cannot hold a batch_size of {batch_size}")
        self.model = model
        self.site = check_site(model, site)
        self.tokens = tokens
        self.batch_size = batch_size
        self.contexts = contexts
        self.seed = seed
        self.position = start
        self._excluded = torch.tensor(() if include_special else special_ids(model), dtype=torch.long)
        self._capacity = ring
        self.width = site_width(model, site)

    def __iter__(self) -> Iterator[Tensor]:
        """Batches from `self.position` on; the position moves with each batch given out."""
        start = self.position
        batches = self._token_batches(start.filled_from)
        ring: Tensor | None = None
        batch: Tensor | None = None  # collects rows where a batch spans two fills
        missing = 0
        fill, given = start.fill, start.given
        filled_from = start.filled_from
        while True:
            ring, rows, filled_to = self._filled(ring, batches, filled_from)
            if rows == 0:
                break
            order = torch.from_numpy(np.random.default_rng([self.seed, fill]).permutation(rows)).to(
                ring.device
            )
            if batch is not None and missing:
                take = min(missing, rows)
                batch[self.batch_size - missing : self.batch_size - missing + take] = ring[order[:take]]
                missing, given = missing - take, take
                if missing == 0:
                    self.position = StreamPosition(filled_from, fill, given)
                    yield batch
                    batch = None
            while rows - given >= self.batch_size:
                picked = order[given : given + self.batch_size]
                given += self.batch_size
                self.position = StreamPosition(filled_from, fill, given)
                yield ring.index_select(0, picked)
            if batch is None and given < rows:
                batch = ring.new_empty(self.batch_size, ring.shape[1])
                batch[: rows - given] = ring[order[given:]]
                missing = self.batch_size - (rows - given)
            filled_from, fill, given = filled_to, fill + 1, 0
        if batch is not None and missing < self.batch_size:
            self.position = StreamPosition(filled_from, fill, 0)
            yield batch[: self.batch_size - missing]

    def _token_batches(self, start: Position) -> Iterator[TokenBatch]:
        if isinstance(self.tokens, Tokens):
            return self.tokens.batches(self.contexts, start)
        return token_batches(self.tokens, self.contexts)

    def _filled(
        self, ring: Tensor | None, batches: Iterator[TokenBatch], filled_to: Position
    ) -> tuple[Tensor, int, Position]:
        """Fill the ring with forwards while another one is sure to fit → (ring, rows, corpus position)."""
        rows = 0
        largest = 0
        while ring is None or rows + largest <= len(ring):
            tokens = next(batches, None)
            if tokens is None:
                break
            acts = capture(self.model, [self.site], tokens.ids)[self.site]
            kept = ~torch.isin(tokens.ids, self._excluded).flatten()
            acts = acts.reshape(-1, acts.shape[-1])
            largest = max(largest, len(kept))
            if ring is None:
                ring = acts.new_empty(max(self._capacity, len(kept)), acts.shape[1])
            n = int(kept.sum())
            torch.index_select(acts, 0, kept.nonzero().squeeze(1).to(acts.device), out=ring[rows : rows + n])
            rows += n
            filled_to = tokens.position
        if ring is None:
            ring = torch.empty(0, self.width)
        return ring, rows, filled_to
