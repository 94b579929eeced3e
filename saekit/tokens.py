"""Documents → packed, context-sized token ids, lazily, at a position that can be resumed.

    documents ──[shuffle]──[split]──tokenise──▶ ids of documents ──pack──▶ [T], [T], [T] …

A context starts with the separator (BOS) and so does each document in it; long documents run on into the
next context. Nothing is dropped: the last context is filled up with separators, which every average skips.

T context_size, N contexts in a batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import separator_id, special_ids, tokenizer_hash
from saekit.text import Document, Documents, Ids, documents, shard_tokenizer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Split = Literal["train", "held_out"]

TOKENISE_AT_ONCE = 256  # documents
SHUFFLE_AT_ONCE = 16_384  # documents held in memory while their order is drawn
LONGEST_PIECE = 1_000_000  # characters given to the tokenizer at once
SPLIT_PIECE = 20_000  # characters: with a split, longer documents are assigned piece by piece
PADDING = -1  # the document number of filled-up positions


class Position(NamedTuple):
    """Where a stream of contexts stands: everything before it has been given out."""

    epoch: int = 0
    document: int = 0  # documents consumed, in the order of this epoch
    offset: int = 0  # ids of the next document already given out


class TokenBatch(NamedTuple):
    """Contexts with the documents they come from."""

    ids: Tensor  # [N, T] int64
    documents: Tensor  # [N, T] int64: number of the document in the source, −1 where filled up
    position: Position  # the stream's position after these contexts


class _Numbered(NamedTuple):
    number: int  # of the document in the source
    content: Document


@dataclass(frozen=True)
class Tokens:
    """Token ids of a corpus as contexts of `context_size`; iterating gives int64 rows [T], lazily.

    Build with `tokenize`. `split`, `held_out`, `shuffle` and `epochs` say which documents come, in which order,
    how often; the same values always give the same contexts.
    """

    source: Documents
    tokenizer: Any
    context_size: int
    separator: int | None
    special: tuple[int, ...]
    label: str
    split: Split | None = None
    held_out: float = 0.0
    shuffle: int | None = None  # seed
    epochs: int | None = 1  # None: for ever

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.from_numpy(ids.astype(np.int64)) for ids, _, _ in self._contexts(Position()))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T). Takes a pass over the corpus."""
        if self.epochs is None:
            raise InvalidInput("shape: this stream has no end (epochs=None)")
        return sum(1 for _ in self._contexts(Position())), self.context_size

    def batches(self, n: int, start: Position = Position()) -> Iterator[TokenBatch]:  # noqa: B008
        """Batches of up to `n` contexts, from a position on."""
        contexts = self._contexts(start)
        while rows := list(itertools.islice(contexts, n)):
            yield TokenBatch(
                torch.from_numpy(np.stack([ids for ids, _, _ in rows]).astype(np.int64)),
                torch.from_numpy(np.stack([docs for _, docs, _ in rows])),
                rows[-1][2],
            )

    def with_(self, **changes: Any) -> Tokens:
        """The same corpus under other choices, e.g. `tokens.with_(split="held_out", shuffle=None)`."""
        return replace(self, **changes)

    # The pipeline, in the order of the drawing above

    def _order(self, epoch: int) -> Iterator[_Numbered]:
        numbered = itertools.starmap(_Numbered, enumerate(self.source()))
        if self.shuffle is None:
            yield from numbered
            return
        for bucket in itertools.count():
            held = list(itertools.islice(numbered, SHUFFLE_AT_ONCE))
            if not held:
                return
            order = np.random.default_rng([self.shuffle, epoch, bucket]).permutation(len(held))
            yield from (held[i] for i in order)

    def _pieces(self, document: _Numbered) -> list[Document]:
        content = document.content
        if self.split is None:
            return [content]
        pieces = [content] if not isinstance(content, str) else cut(content, SPLIT_PIECE)
        wanted = self.split == "held_out"
        return [piece for piece in pieces if is_held_out(piece, self.held_out) == wanted]

    def _tokenised(self, epoch: int, skip: int) -> Iterator[tuple[int, list[Ids]]]:
        """(number, pieces) per document, tokenised many at a time because that is what tokenizers are fast at."""
        ordered = itertools.islice(self._order(epoch), skip, None)
        while held := list(itertools.islice(ordered, TOKENISE_AT_ONCE)):
            pieces = [self._pieces(document) for document in held]
            ids = iter(self._encode([piece for group in pieces for piece in group]))
            for document, group in zip(held, pieces, strict=True):
                yield document.number, [next(ids) for _ in group]

    def _encode(self, pieces: list[Document]) -> list[Ids]:
        texts = [[p] if not isinstance(p, str) else cut(p, LONGEST_PIECE) for p in pieces]
        flat = [part for parts in texts for part in parts if isinstance(part, str)]
        encoded = self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else []
        ids = (np.asarray(row, dtype=np.int32) for row in encoded)
        return [
            np.concatenate([next(ids) if isinstance(part, str) else part for part in parts])
            for parts in texts
        ]

    def _contexts(self, start: Position) -> Iterator[tuple[Ids, NDArray[np.int64], Position]]:
        """Rows (ids [T], documents [T], position after the row)."""
        T = self.context_size
        fill = 0
        row, docs = np.empty(T, np.int32), np.empty(T, np.int64)
        given = False
        epochs = itertools.count(start.epoch) if self.epochs is None else range(start.epoch, self.epochs)
        for epoch in epochs:
            skip = start.document if epoch == start.epoch else 0
            for consumed, (number, pieces) in enumerate(self._tokenised(epoch, skip), skip):
                # Pieces of one document follow each other in one array; a separator goes before each.
                length = sum(len(piece) for piece in pieces)
                done = 0
                for piece in pieces:
                    at = 0
                    if (epoch, consumed) == (start.epoch, start.document) and done < start.offset:
                        at = min(len(piece), start.offset - done)
                    while at < len(piece):
                        if self.separator is not None and (at == 0 or fill == 0):
                            row[fill], docs[fill] = self.separator, number
                            fill += 1
                        take = min(T - fill, len(piece) - at)
                        row[fill : fill + take] = piece[at : at + take]
                        docs[fill : fill + take] = number
                        fill, at = fill + take, at + take
                        if fill == T:
                            whole = done + at == length
                            after = (consumed + 1, 0) if whole else (consumed, done + at)
                            yield row.copy(), docs.copy(), Position(epoch, *after)
                            given, fill = True, 0
                    done += len(piece)
            if not given and fill == 0:
                if start != Position():  # resumed at the very end of the last epoch
                    continue
                raise InvalidInput(self._empty())
        if fill:
            row[fill:], docs[fill:] = self.separator or 0, PADDING
            yield row.copy(), docs.copy(), Position(epoch + 1, 0, 0)

    def _empty(self) -> str:
        if self.split == "held_out":
            return (
                f"{self.label}: no document fell into the held-out split (held_out = {self.held_out}). "
                "Raise data.held_out, or name a text of its own with data.held_out_text"
            )
        return f"{self.label}: the corpus is empty, no document with a token in it"


def tokenize(
    source: Any,
    model: TransformerBridge,
    context_size: int = 128,
    *,
    field: str = "text",
    split: Split | None = None,
    held_out: float = 0.0,
    shuffle: int | None = None,
    epochs: int | None = 1,
) -> Tokens:
    """Texts, paths, a `datasets.Dataset`, a hub id or token shards → contexts [N, context_size], lazily.

    field: the column or key that holds the text.
    split: `"train"` or `"held_out"`; `held_out` is the share of documents kept back, chosen by a hash of
        their content, so that a document and its copies fall on the same side whatever their order.
    shuffle: a seed; documents come in a random order, another one in each epoch. None keeps the order.
    epochs: passes over the corpus; None goes on for ever.

    Raises `InvalidInput` for an empty corpus, a context beyond the model's, shards of another tokenizer.
    """
    limit = model.cfg.n_ctx
    if isinstance(context_size, bool) or not isinstance(context_size, int) or not 2 <= context_size <= limit:
        raise InvalidInput(f"context_size: {context_size!r}; expected 2 … {limit}, the model's context")
    if not 0.0 <= held_out < 1.0:
        raise InvalidInput(f"held_out: {held_out!r}; expected a share in [0, 1)")
    if split == "held_out" and held_out == 0.0:
        raise InvalidInput("held_out: the held-out split was asked for, but its share is 0")
    read = documents(source, field=field)
    label = source if isinstance(source, str) and len(source) < 200 else getattr(source, "name", "corpus")
    shard = shard_tokenizer(source)
    if shard is not None and shard != tokenizer_hash(model.tokenizer):
        raise InvalidInput(
            f"{label}: these token shards belong to another tokenizer than {model.cfg.model_name}'s"
        )
    if next((True for document in read() if len(document)), None) is None:
        raise InvalidInput(f"{label}: the corpus is empty, no document with a token in it")
    return Tokens(
        source=read,
        tokenizer=model.tokenizer,
        context_size=context_size,
        separator=separator_id(model),
        special=special_ids(model),
        label=str(label),
        split=split,
        held_out=held_out,
        shuffle=shuffle,
        epochs=epochs,
    )


def token_batches(tokens: Tokens | Tensor | Iterable[Tensor], n: int) -> Iterator[TokenBatch]:
    """Batches from `Tokens`, from a tensor [N, T] of ids, or from an iterable of rows [T].

    Without documents of their own, contexts count as one document each.
    """
    if isinstance(tokens, Tokens):
        yield from tokens.batches(n)
        return
    rows = iter(tokens)
    start = 0
    while held := list(itertools.islice(rows, n)):
        ids = torch.stack(held).long()
        if ids.ndim != 2:
            raise InvalidInput(f"tokens: expected ids [N, T], got rows of shape {tuple(held[0].shape)}")
        numbers = torch.arange(start, start + len(ids))[:, None].expand_as(ids).contiguous()
        start += len(ids)
        yield TokenBatch(ids, numbers, Position(0, start, 0))


def cut(text: str, longest: int) -> list[str]:
    """The text in pieces of about `longest` characters, each starting at white space where there is some."""
    pieces = []
    start = 0
    while len(text) - start > longest:
        end = max(text.rfind(" ", start + 1, start + longest), text.rfind("\n", start + 1, start + longest))
        end = end if end > start else start + longest
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out share, by a hash of its content alone."""
    content = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
