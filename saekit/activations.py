"""Model + sites + ids → an endless or one-pass stream of shuffled activations.

    contexts ──forward to the last site──▶ rows (special tokens dropped) ──▶ a ring [R, D] per site ──permuted──▶ [B, D]
                        └── or the disk: `activation_cache`

The rings are allocated once, filled in place with one copy per row, then given out in a random order (Gemma
Scope shuffles in buckets the same way, Lieberum 2024, section 3). Memory is the rings', whatever the corpus.
All sites share one forward and one permutation: row i of every site's batch is the same position of the same text,
and a site's rows are the same bits whichever sites ride along. Everything is replayable: a position is the corpus
position at which the rings were last filled and the number of rows given out since, so a resumed stream goes on with
the same bits.

Which rows a fill brings is known from the token ids alone. So n processes can share a stream and communicate nothing:
each reads all ids and draws the same permutation, but runs the model for every n-th group of contexts only, holds
those rows and gives out those of each batch. Put together they are the rows of one process, bit for bit.

On a GPU the next fill overlaps with the use of the present one: two rings of half the size, forwards spread over the
batches and run on a stream of their own, ids copied from pinned memory. On a CPU both would fight over the cores.

R ring rows, B batch_size, D width of a site, T context_size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.activation_cache import DTYPE, ActivationCache, digest_of
from saekit.activation_cache import Rows as Rows
from saekit.errors import InvalidInput
from saekit.lm import model_hash, special_ids
from saekit.sites import capture, check_site, site_width
from saekit.tokens import Position, TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class StreamPosition(NamedTuple):
    """Where a stream of activations stands."""

    filled_from: Position = Position()  # corpus position at which the current ring was filled
    fill: int = 0  # number of the current fill: seeds its permutation
    given: int = 0  # rows of the current ring given out


class Share(NamedTuple):
    """This process's part of a batch."""

    rows: Rows  # by site, [m, D]
    numbers: Tensor  # [m] int64, on the CPU, ascending: which of the batch's rows these are
    size: int  # rows of the whole batch


class _Forward(NamedTuple):
    """One call of the model, and the rows of it that are kept."""

    ids: Tensor  # [N, T]
    kept: Tensor  # [n] int64: positions of the flattened [N · T]


@dataclass(frozen=True)
class _Fill:
    """What a fill brings, as far as the ids tell."""

    number: int
    start: Position  # of the corpus
    end: Position
    forwards: tuple[_Forward, ...]  # this process's
    rows: int  # of all processes
    slots: NDArray[np.int64]  # [held] ring rows in the order in which they are given out
    held: NDArray[np.bool_]  # [rows] in that order: whether this process holds the row


class Activations:
    """One pass (or, over `Tokens` with `epochs=None`, an endless stream) of shuffled activations.

    One site: iterating gives [batch_size, D] tensors in the model's dtype. A list of sites: `{site: [batch_size, D]}`,
    the rows of all sites belonging together. The last batch of a pass may be shorter.

    model: a `TransformerBridge`. site: a TransformerLens name, or several. tokens: `Tokens`, or ids [N, T].
    batch_size: rows per batch. ring: rows held for shuffling. contexts: contexts per forward.
    seed: of the shuffling. include_special: keep BOS, EOS and pad positions (attention sinks).
    share: (r, n): this is process r of n that share the stream. Batches then hold this process's rows only (from 0 to
        all of them), the ring is an n-th, positions are those of the whole stream; `shares` says which rows they are.
    overlap: fill one half of the ring while the other is used; None: on a GPU, where half a ring holds a batch. With a
        ring of 2R it gives what a ring of R gives without.
    cache: a folder that keeps the activations, in bf16 and the order in which this stream needs them, so that another
        run of it, or of some of its sites, calls no model. Batches are bf16, from the first run on. cache_rows: how many
        rows will be taken, for an endless stream (those of a finite one are counted, which takes a pass over the text);
        the size on disk is told before anything is written, and kept to. tell: gets such lines.

    Raises `UnknownName` for a site that is not there, `InvalidInput` for a ring that cannot hold a batch, and for a cache
    that was made of something else, is being written, is damaged, or does not fit on the disk.
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
        share: tuple[int, int] = (0, 1),
        overlap: bool | None = None,
        cache: str | Path | None = None,
        cache_rows: int | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.device = torch.device(model.cfg.device or "cpu")
        if overlap is None:
            overlap = self.device.type == "cuda" and ring // 2 >= batch_size
        self._overlap = overlap
        self._capacity = ring // 2 if self._overlap else ring
        if batch_size < 1 or self._capacity < batch_size:
            half = "half of " if self._overlap else ""
            raise InvalidInput(f"ring: {half}{ring} rows cannot hold a batch_size of {batch_size}")
        if not site:
            raise InvalidInput(
                "site: expected a name such as 'blocks.2.hook_resid_pre', or a list of them; got none"
            )
        self.rank, self.processes = share
        if not 0 <= self.rank < self.processes:
            raise InvalidInput(f"share: expected (r, n) with 0 ≤ r < n, got {share}")
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
        self.widths = {name: site_width(model, name) for name in self.sites}
        self.dtype = model.cfg.dtype if cache is None else DTYPE
        self._cache = None if cache is None else self._opened(cache, cache_rows, ring, tell)

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
        with contextlib.closing(self.shares()) as shares:
            for share in shares:
                yield share.rows

    def shares(self) -> Generator[Share, None, None]:
        """Batches as `batches`, each with the numbers of its rows in the whole batch, for processes that share a stream."""
        start = self.position
        contexts = self._token_batches(start.filled_from)
        beside = _Beside(self.device if self._overlap else None)
        rings = [_Ring(self, beside) for _ in range(2 if self._overlap else 1)]
        begun: list[Share] = []  # parts of a batch that spans two fills
        missing = self.batch_size
        given = start.given
        with contextlib.ExitStack() as stack:
            if self._cache is not None:
                stack.enter_context(self._cache.writing())
            stack.callback(beside.wait)
            ring, spare = rings[0], rings[-1]
            ring.begin(self._fill(contexts, start.fill, start.filled_from))
            while (fill := ring.fill).rows:
                ring.finish()
                if self._overlap:
                    spare.begin(self._fill(contexts, fill.number + 1, fill.end))
                while given < fill.rows:
                    take = min(missing, fill.rows - given)
                    part = ring.take(given, take, self.batch_size - missing)
                    given, missing = given + take, missing - take
                    if self._overlap:
                        spare.advance(given / fill.rows)
                    if missing:
                        begun.append(part)
                        continue
                    self.position = StreamPosition(fill.start, fill.number, given)
                    yield _joined([*begun, part])
                    begun, missing = [], self.batch_size
                if not self._overlap:
                    spare.begin(self._fill(contexts, fill.number + 1, fill.end))
                ring, spare, given = spare, ring, 0
            if begun:
                self.position = StreamPosition(fill.start, fill.number, 0)
                yield _joined(begun)

    def _token_batches(self, start: Position) -> Iterator[TokenBatch]:
        if isinstance(self.tokens, Tokens):
            return self.tokens.batches(self.contexts, start)
        return token_batches(self.tokens, self.contexts)

    def _fill(self, contexts: Iterator[TokenBatch], number: int, start: Position) -> _Fill:
        """Read contexts while another forward is sure to fit, and draw the order of their rows."""
        forwards: list[_Forward] = []
        slots: list[NDArray[np.int64]] = []  # by forward; −1 where another process holds the row
        rows = held = largest = 0
        end = start
        while not slots or rows + largest <= max(self._capacity, largest):
            if (tokens := next(contexts, None)) is None:
                break
            ids, kept = self._kept(tokens)
            # Over the fills every process has its turn, also where a fill is fewer forwards than there are processes.
            if mine := (number + len(slots)) % self.processes == self.rank:
                forwards.append(_Forward(ids, kept))
            slots.append(held + np.arange(len(kept)) if mine else np.full(len(kept), -1))
            held += len(kept) if mine else 0
            rows += len(kept)
            largest = max(largest, ids.numel())
            end = tokens.position
        order = np.random.default_rng([self.seed, number]).permutation(rows)
        ordered = np.concatenate([*slots, np.empty(0, np.int64)])[order]
        return _Fill(number, start, end, tuple(forwards), rows, ordered[ordered >= 0], ordered >= 0)

    def _read(self, forward: _Forward, rings: Rows, at: int) -> None:
        """Put a forward's rows into the rings, from row `at` on: off the disk where they are there, else by the model."""
        n = len(forward.kept)
        if self._cache is None:
            index = _moved(forward.kept, self.device)
            for site, acts in self._captured(self.sites, forward).items():
                torch.index_select(acts, 0, index, out=rings[site][at : at + n])
            return
        digest = digest_of(forward.ids)
        if (rows := self._cache.get(digest)) is None:
            index = _moved(forward.kept, self.device)
            sites = self._cache.sites if self._cache.writes else self.sites
            captured = self._captured(sites, forward)
            rows = {site: acts.index_select(0, index) for site, acts in captured.items()}
            if self._cache.writes:
                self._cache.add(digest, rows)
        for site, ring in rings.items():
            ring[at : at + n] = _moved(rows[site], self.device)

    def _captured(self, sites: Sequence[str], forward: _Forward) -> Rows:
        """By site, [N · T, D] where and of what type the rings are."""
        acts = capture(self.model, sites, _moved(forward.ids, self.device))
        return {
            site: acts_NTD.reshape(-1, acts_NTD.shape[-1]).to(self.device, self.dtype)
            for site, acts_NTD in acts.items()
        }

    def _kept(self, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """(ids [N, T], positions of the flattened ids that are kept), on the CPU."""
        ids = tokens.ids.cpu()
        return ids, (~torch.isin(ids, self._excluded)).flatten().nonzero().squeeze(1)

    def _opened(
        self, folder: str | Path, rows: int | None, ring: int, tell: Callable[[str], None]
    ) -> ActivationCache:
        """The cache, checked against all that its rows depend on."""
        if isinstance(self.tokens, Iterator):
            raise InvalidInput("cache: the tokens can be read only once; give `Tokens`, a tensor or a list")
        first = next(self._token_batches(Position()), None)
        made_of = {
            "model": model_hash(self.model),
            "dtype": str(self.model.cfg.dtype).removeprefix("torch."),
            "context_size": 0 if first is None else first.ids.shape[1],
            "contexts": self.contexts,
            "special_ids_dropped": self._excluded.tolist(),
            "first_tokens": "none" if first is None else digest_of(first.ids.cpu()),
        }
        spare = 0
        if rows is not None:
            spare = max(ring, 0 if first is None else first.ids.numel())  # a ring is filled whole
        elif isinstance(self.tokens, Tokens) and self.tokens.epochs is None:
            raise InvalidInput(
                "cache_rows: a stream without an end (epochs=None) needs a number of rows to keep"
            )
        else:
            rows = sum(len(self._kept(tokens)[1]) for tokens in self._token_batches(Position()))
        return ActivationCache(folder, made_of, self.widths, rows, spare=spare, writer=self.rank, tell=tell)


class _Ring:
    """Rows of each site, the fill that they are of, and how much of it is done."""

    def __init__(self, stream: Activations, beside: _Beside) -> None:
        self._stream, self._beside = stream, beside
        self._rows: Rows = {}

    def begin(self, fill: _Fill) -> None:
        """Take on a fill. What was there before may be overwritten as soon as all that reads it has been launched."""
        self.fill = fill
        self._make_room(fill)
        self._picks = _moved(torch.from_numpy(fill.slots), self._stream.device)
        self._work = self._forwards()
        self._done = 0
        self._beside.follow()

    def advance(self, share: float) -> None:
        """Launch forwards until this share of the fill's is done."""
        wanted = math.ceil(share * len(self.fill.forwards))
        while self._done < wanted:
            next(self._work)
            self._done += 1

    def finish(self) -> None:
        """Launch what is left, and have the reader wait for it."""
        self.advance(1.0)
        self._beside.wait()

    def take(self, start: int, n: int, at: int) -> Share:
        """This process's among rows `start … start + n` of the order, which are rows `at …` of a batch."""
        held = self.fill.held[start : start + n]
        before = int(np.count_nonzero(self.fill.held[:start]))
        picks = self._picks[before : before + int(np.count_nonzero(held))]
        rows = {site: ring.index_select(0, picks) for site, ring in self._rows.items()}
        return Share(rows, torch.from_numpy(at + np.flatnonzero(held)), n)

    def _make_room(self, fill: _Fill) -> None:
        """Allocated once. A share's ring is an n-th and a forward; it grows where special tokens lie very unevenly."""
        stream = self._stream
        length = stream._capacity
        if stream.processes > 1:
            forward = max((forward.ids.numel() for forward in fill.forwards), default=0)
            length = min(length, math.ceil(length / stream.processes) + forward)
        length = max(length, len(fill.slots))
        if not self._rows or len(self._rows[stream.sites[0]]) < len(fill.slots):
            self._rows.clear()  # before the larger one is allocated
            for site, D in stream.widths.items():
                self._rows[site] = torch.empty(length, D, dtype=stream.dtype, device=stream.device)

    def _forwards(self) -> Iterator[None]:
        at = 0
        for forward in self.fill.forwards:
            with self._beside.stream():
                self._stream._read(forward, self._rows, at)
            at += len(forward.kept)
            yield


class _Beside:
    """A CUDA stream beside the reader's own. Without overlap, or without a GPU, all runs in line."""

    def __init__(self, device: torch.device | None) -> None:
        self._own = None if device is None or device.type != "cuda" else torch.cuda.Stream(device)

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._own is None else torch.cuda.stream(self._own)

    def follow(self) -> None:
        """What is launched beside from now on comes after all that the reader has launched."""
        if self._own is not None:
            self._own.wait_stream(torch.cuda.current_stream(self._own.device))

    def wait(self) -> None:
        """What the reader launches from now on comes after all that was launched beside."""
        if self._own is not None:
            torch.cuda.current_stream(self._own.device).wait_stream(self._own)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _joined(parts: list[Share]) -> Share:
    """A batch out of what two or more fills gave of it."""
    if len(parts) == 1:
        return parts[0]
    rows = {site: torch.cat([part.rows[site] for part in parts]) for site in parts[0].rows}
    return Share(rows, torch.cat([part.numbers for part in parts]), sum(part.size for part in parts))
