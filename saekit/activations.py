"""Model + sites + ids → an endless or one-pass stream of shuffled activations.

    contexts ──forward to the last site──▶ rows (special tokens dropped) ──▶ a ring [R, D] per site ──permuted──▶ [B, D]

The rings are allocated once, filled in place with one copy per row, then given out in a random order (Gemma
Scope shuffles in buckets the same way, Lieberum 2024, section 3). Memory is the rings', whatever the corpus.
All sites share one forward and one permutation: row i of every site's batch is the same position of the same text,
and a site's rows are the same bits whichever sites ride along. Everything is replayable: a position is the corpus
position at which the rings were last filled and the number of rows given out since, so a resumed stream goes on with
the same bits.

R ring rows, B batch_size, D width of a site, T context_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sites import capture, check_site, site_width
from saekit.tokens import Position, TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Rows = dict[str, Tensor]  # by site, [n, D]


class StreamPosition(NamedTuple):
    """Where a stream of activations stands."""

    filled_from: Position = Position()  # corpus position at which the current ring was filled
    fill: int = 0  # number of the current fill: seeds its permutation
    given: int = 0  # rows of the current ring given out


class Activations:
    """One pass (or, over `Tokens` with `epochs=None`, an endless stream) of shuffled activations.

    One site: iterating gives [batch_size, D] tensors in the model's dtype. A list of sites: `{site: [batch_size, D]}`,
    the rows of all sites belonging together. The last batch of a pass may be shorter.

    model: a `TransformerBridge`. site: a TransformerLens name, or several. tokens: `Tokens`, or ids [N, T].
    batch_size: rows per batch. ring: rows held for shuffling. contexts: contexts per forward.
    seed: of the shuffling. include_special: keep BOS, EOS and pad positions (attention sinks).

    Raises `UnknownName` for a site that is not there, `InvalidInput` for a ring that cannot hold a batch.
    """

    def __init__(
        self,
        model: TransformerBridge,
        site: str | Sequence[str],
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
        if not site:
            raise InvalidInput(
                "site: expected a name such as 'blocks.2.hook_resid_pre', or a list of them; got none"
            )
        self.model = model
        self._one = isinstance(site, str)
        sites = [site] if isinstance(site, str) else site
        self.sites = tuple(dict.fromkeys(check_site(model, name) for name in sites))
        self.tokens = tokens
        self.batch_size = batch_size
        self.contexts = contexts
        self.seed = seed
        self.position = start
        self._excluded = torch.tensor(() if include_special else special_ids(model), dtype=torch.long)
        self._capacity = ring
        self.widths = {name: site_width(model, name) for name in self.sites}

    @property
    def width(self) -> int:
        """D of the site; of several sites, their widths together."""
        return sum(self.widths.values())

    def __iter__(self) -> Iterator[Any]:
        """Batches from `self.position` on: [B, D], or one per site by name where a list of sites was given."""
        if not self._one:
            return self.batches()
        return (batch[self.sites[0]] for batch in self.batches())

    def batches(self) -> Iterator[Rows]:
        """Batches by site from `self.position` on; the position moves with each batch given out."""
        start = self.position
        contexts = self._token_batches(start.filled_from)
        rings: Rows | None = None
        batch: Rows | None = None  # collects rows where a batch spans two fills
        missing = 0
        fill, given = start.fill, start.given
        filled_from = start.filled_from
        while True:
            rings, rows, filled_to = self._filled(rings, contexts, filled_from)
            if rows == 0:
                break
            order = np.random.default_rng([self.seed, fill]).permutation(rows)
            picks = torch.from_numpy(order).to(next(iter(rings.values())).device)
            if batch is not None and missing:
                take = min(missing, rows)
                _copy(rings, picks[:take], batch, self.batch_size - missing)
                missing, given = missing - take, take
                if missing == 0:
                    self.position = StreamPosition(filled_from, fill, given)
                    yield batch
                    batch = None
            while rows - given >= self.batch_size:
                picked = picks[given : given + self.batch_size]
                given += self.batch_size
                self.position = StreamPosition(filled_from, fill, given)
                yield {site: ring.index_select(0, picked) for site, ring in rings.items()}
            if batch is None and given < rows:
                batch = {site: ring.new_empty(self.batch_size, ring.shape[1]) for site, ring in rings.items()}
                _copy(rings, picks[given:], batch, 0)
                missing = self.batch_size - (rows - given)
            filled_from, fill, given = filled_to, fill + 1, 0
        if batch is not None and missing < self.batch_size:
            self.position = StreamPosition(filled_from, fill, 0)
            yield {site: rows_BD[: self.batch_size - missing] for site, rows_BD in batch.items()}

    def _token_batches(self, start: Position) -> Iterator[TokenBatch]:
        if isinstance(self.tokens, Tokens):
            return self.tokens.batches(self.contexts, start)
        return token_batches(self.tokens, self.contexts)

    def _filled(
        self, rings: Rows | None, contexts: Iterator[TokenBatch], filled_to: Position
    ) -> tuple[Rows, int, Position]:
        """Fill the rings with forwards while another one is sure to fit → (rings, rows, corpus position)."""
        rows = 0
        largest = 0
        capacity = 0 if rings is None else len(rings[self.sites[0]])
        while rings is None or rows + largest <= capacity:
            tokens = next(contexts, None)
            if tokens is None:
                break
            acts = capture(self.model, self.sites, tokens.ids)
            kept = ~torch.isin(tokens.ids, self._excluded).flatten()
            largest = max(largest, len(kept))
            if rings is None:
                capacity = max(self._capacity, len(kept))
                rings = {site: acts[site].new_empty(capacity, self.widths[site]) for site in self.sites}
            n = int(kept.sum())
            index = kept.nonzero().squeeze(1)
            for site, ring in rings.items():
                flat = acts[site].reshape(-1, ring.shape[1])
                torch.index_select(flat, 0, index.to(flat.device), out=ring[rows : rows + n])
            rows += n
            filled_to = tokens.position
        if rings is None:
            rings = {site: torch.empty(0, width) for site, width in self.widths.items()}
        return rings, rows, filled_to


def _copy(rings: Rows, picked: Tensor, batch: Rows, at: int) -> None:
    """Put the picked rows of each ring into the batch, from row `at` on."""
    for site, ring in rings.items():
        batch[site][at : at + len(picked)] = ring[picked]
