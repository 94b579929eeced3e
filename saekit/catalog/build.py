"""Tokens + model + SAE → a catalog folder, in one pass over the text.

contexts ──forward to the site──▶ x ──encode──▶ non-zero activations ──▶ accumulators ──▶ tables
                                                             weights ──▶ logit effects, neighbours ──▶
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saekit.catalog.accumulate import Firings, Moments, TokenTable, TopContexts, bin_edges
from saekit.catalog.effects import encoder_cosine, logit_effects, nearest
from saekit.catalog.tables import CATALOG, DIRECTIONS, SCHEMA_VERSION, write_table
from saekit.errors import InvalidInput
from saekit.files import sha256_of_file, staged, write_json, write_tensors
from saekit.lm import model_hash, special_ids, token_strings, tokenizer_hash
from saekit.sae import SAE
from saekit.sae.files import to_cfg, to_tensors
from saekit.sites import capture
from saekit.tokens import TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOKENS_PER_LATENT = 20
LOGITS_PER_LATENT = 10
NEIGHBOURS_PER_LATENT = 10
AT_LEAST = 2  # occurrences before a token enters the token table
NORMS_KEPT = 1 << 20  # residual norms from which the median is taken
PRUNE_EVERY = 64  # batches between throwing away corpus rows that no context refers to any more

Progress = Callable[[int, int], None]  # (tokens so far, features alive)


def build(
    model: TransformerBridge,
    sae: SAE,
    tokens: Tokens | Tensor | Iterable[Tensor],
    folder: str | Path,
    *,
    contexts: int = 20,
    window: int = 64,
    max_tokens: int | None = None,
    include_special: bool = False,
    batch: int = 32,
    progress: Progress | None = None,
) -> Path:
    """Write a catalog of the SAE's features over the tokens; see `tables` for what is in it.

    contexts: kept per feature, at most one per document. window: tokens around a peak. max_tokens: stop after
    about so many. include_special: count BOS, EOS and pad too. batch: contexts per forward.

    Raises `InvalidInput` for an SAE that does not fit, an empty corpus, or a folder that holds something else.
    """
    if sae.is_transcoder or sae.is_crosscoder:
        raise InvalidInput(
            "catalog: only for SAEs that read and write one site, not for transcoders and crosscoders"
        )
    sae.check_fits(model)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CATALOG).exists():
        raise InvalidInput(f"catalog: {folder} exists and is no catalog; choose another folder")
    if contexts < 1 or window < 1:
        raise InvalidInput(f"catalog: contexts and window start at 1, got {contexts} and {window}")
    survey = _Survey(model, sae, contexts, window, () if include_special else special_ids(model))
    for tokens_batch in token_batches(tokens, batch):
        survey.add(tokens_batch)
        if progress:
            progress(survey.tokens, int((survey.moments.count > 0).sum()))
        if max_tokens is not None and survey.tokens >= max_tokens:
            break
    if survey.tokens == 0:
        raise InvalidInput("catalog: no token to look at; the corpus is empty or holds special tokens only")
    label = tokens.label if isinstance(tokens, Tokens) else "token ids"
    with staged(folder) as building:
        survey.write(building, label)
    return folder


class _Survey:
    """The state of the pass."""

    def __init__(
        self, model: TransformerBridge, sae: SAE, contexts: int, window: int, excluded: tuple[int, ...]
    ) -> None:
        self.model, self.sae, self.excluded = model, sae, excluded
        self.tokens = 0  # evaluated
        self.moments = Moments(sae.d_sae)
        self.table = TokenTable(model.cfg.d_vocab)
        self.top = TopContexts(sae.d_sae, contexts, window)
        self._rows: dict[int, np.ndarray] = {}  # corpus rows that contexts may refer to
        self._next_row = 0
        self._batches = 0
        self._norms: list[np.ndarray] = []
        self._normed = 0

    @torch.no_grad()
    def add(self, batch: TokenBatch) -> None:
        ids = batch.ids.numpy()
        documents = batch.documents.numpy()
        special = np.isin(ids, self.excluded)
        x = capture(self.model, [self.sae.site], batch.ids)[self.sae.site].flatten(0, 1)
        flat = np.flatnonzero(~special)
        if len(flat):
            x = x[torch.from_numpy(flat).to(x.device)]
            self._norm(x)
            self._firings(x, flat, ids, documents, special)
        self._rows |= {self._next_row + i: row.astype(np.int32) for i, row in enumerate(ids)}
        self._next_row += len(ids)
        self.tokens += len(flat)
        self._batches += 1
        if self._batches % PRUNE_EVERY == 0:
            self._prune()

    def _firings(
        self, x: Tensor, flat: np.ndarray, ids: np.ndarray, documents: np.ndarray, special: np.ndarray
    ) -> None:
        active = self.sae.encode_active(x)
        at = flat[active.tokens.cpu().numpy()]
        T = ids.shape[1]
        firings = Firings(
            latents=active.latents.cpu().numpy(),
            values=active.values.float().cpu().numpy(),
            rows=self._next_row + at // T,
            positions=at % T,
            token_ids=ids.ravel()[at],
            documents=documents.ravel()[at],
        )
        self.moments.add(firings)
        self.table.add(firings)
        self.top.add(firings, documents, self._next_row, special)

    def _norm(self, x: Tensor) -> None:
        if self._normed < NORMS_KEPT:
            self._norms.append(x.float().norm(dim=1).cpu().numpy())
            self._normed += len(x)

    def _prune(self) -> None:
        kept = np.unique(self.top.row[self.top.value > 0])
        self._rows = {int(row): self._rows[int(row)] for row in kept}

    # Writing

    def write(self, folder: Path, label: str) -> None:
        self._prune()
        sae = self.sae
        directions = sae.directions().cpu()
        tensors = to_tensors(sae)
        write_tensors(folder / DIRECTIONS, tensors)
        token_rows = self._write_tokens(folder)
        labels = _labels(token_rows, sae.d_sae)
        self._write_features(folder, labels)
        self._write_contexts(folder)
        self._write_histograms(folder)
        effects = logit_effects(self.model, directions, sae.site, LOGITS_PER_LATENT)
        write_table(folder, "logits", _logit_columns(effects, sae.d_sae))
        index, cosine = nearest(directions, NEIGHBOURS_PER_LATENT)
        write_table(folder, "neighbours", _ranked(sae.d_sae, neighbour=index, cosine=cosine))
        vocabulary = list(range(self.model.cfg.d_vocab))
        strings = token_strings(self.model.tokenizer, vocabulary)
        write_table(folder, "vocabulary", {"token_id": np.array(vocabulary), "token": strings})
        named = [i for i, text in enumerate(labels) if text]
        texts = [_spell(labels[i], strings) for i in named]
        write_table(
            folder,
            "explanations",
            {
                "feature": np.array(named, np.int32),
                "method": ["top_tokens"] * len(named),
                "model": [""] * len(named),
                "text": texts,
                "score": [None] * len(named),
            },
        )
        write_json(folder / CATALOG, self._description(folder, label, tensors))

    def _write_tokens(self, folder: Path) -> dict[str, Any]:
        latents, ranks, ids, counts, sums = self.table.top(TOKENS_PER_LATENT, AT_LEAST)
        columns = {
            "feature": latents,
            "rank": ranks,
            "token_id": ids,
            "count": counts,
            "mean_activation": sums / np.maximum(1, counts),
            "share": sums / np.maximum(1e-30, self.moments.sum[latents]),
        }
        write_table(folder, "tokens", columns)
        return columns

    def _write_features(self, folder: Path, labels: list[list[int]]) -> None:
        sae, moments = self.sae, self.moments
        strings = {i: token_strings(self.model.tokenizer, [i])[0] for i in {i for ids in labels for i in ids}}
        write_table(
            folder,
            "features",
            {
                "feature": np.arange(sae.d_sae),
                "density": moments.count / self.tokens,
                "count": moments.count,
                "max_activation": moments.max,
                "mean_activation": moments.mean(),
                "std_activation": moments.std(),
                "decoder_norm": sae.directions().float().norm(dim=1).cpu().numpy(),
                "encoder_cosine": encoder_cosine(sae.W_enc, sae.W_dec),
                "label": [_spell(ids, strings) for ids in labels],
            },
        )

    def _write_contexts(self, folder: Path) -> None:
        top = self.top
        latents, ranks = np.nonzero(top.value > 0)
        numbers = {row: i for i, row in enumerate(sorted(self._rows))}
        write_table(
            folder,
            "contexts",
            {
                "feature": latents,
                "rank": ranks,
                "document": top.document[latents, ranks],
                "row": np.array([numbers[int(row)] for row in top.row[latents, ranks]], np.int32),
                "start": top.start[latents, ranks],
                "length": top.length[latents, ranks],
                "peak": top.peak[latents, ranks] - top.start[latents, ranks],
                "max_activation": top.value[latents, ranks],
            },
        )
        which, offsets = np.nonzero(top.activations[latents, ranks])
        write_table(
            folder,
            "activations",
            {
                "feature": latents[which],
                "rank": ranks[which],
                "offset": offsets,
                "activation": top.activations[latents, ranks][which, offsets],
            },
        )
        rows = [self._rows[row] for row in sorted(self._rows)]
        lengths = [len(row) for row in rows]
        write_table(
            folder,
            "corpus",
            {
                "row": np.repeat(np.arange(len(rows)), lengths),
                "position": np.concatenate([np.arange(n) for n in lengths])
                if rows
                else np.zeros(0, np.int16),
                "token_id": np.concatenate(rows) if rows else np.zeros(0, np.int32),
            },
        )

    def _write_histograms(self, folder: Path) -> None:
        latents, bins = np.nonzero(self.moments.histogram)
        edges = bin_edges()
        write_table(
            folder,
            "histograms",
            {
                "feature": latents,
                "low": edges[bins],
                "high": edges[bins + 1],
                "count": self.moments.histogram[latents, bins],
            },
        )

    def _description(self, folder: Path, label: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        model, sae = self.model, self.sae
        strings = token_strings(model.tokenizer, list(self.excluded))
        return {
            "schema": SCHEMA_VERSION,
            "model": {
                "name": sae.model_name or str(model.cfg.model_name),
                "hash": model_hash(model),
                "tokenizer_hash": tokenizer_hash(model.tokenizer),
                "dtype": str(model.cfg.dtype).removeprefix("torch."),
            },
            "sae": to_cfg(sae, tensors),
            "site": sae.site,
            "corpus": {"label": Path(label).name, "tokens": self.tokens},
            "excluded": dict(zip(strings, self.excluded, strict=True)),
            "median_norm": float(np.median(np.concatenate(self._norms))),
            "contexts": {"per_feature": self.top.n, "window": self.top.window},
            "definitions": {
                "density": "share of evaluated tokens on which the feature is active",
                "share": "share of the feature's summed activation that falls on the token",
                "effect": "decoder direction, centred for LayerNorm and times the final norm's gain, through W_U",
                "median_norm": "median L2 norm of the activations at the site over evaluated tokens",
            },
            "files": {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())},
        }


def _ranked(d_sae: int, **columns: np.ndarray) -> dict[str, Any]:
    """[S, k] arrays as columns with feature and rank."""
    k = next(iter(columns.values())).shape[1]
    return {
        "feature": np.repeat(np.arange(d_sae), k),
        "rank": np.tile(np.arange(k), d_sae),
        **{name: values.ravel() for name, values in columns.items()},
    }


def _logit_columns(effects: tuple[Tensor, ...] | None, d_sae: int) -> dict[str, Any]:
    if effects is None:
        empty = np.zeros(0, np.int32)
        return {
            "feature": empty,
            "rank": empty,
            "raised": np.zeros(0, bool),
            "token_id": empty,
            "effect": empty,
        }
    up_ids, up, down_ids, down = (part.numpy() for part in effects)
    k = up.shape[1]
    return {
        "feature": np.repeat(np.arange(d_sae), 2 * k),
        "rank": np.tile(np.r_[np.arange(k), np.arange(k)], d_sae),
        "raised": np.tile(np.r_[np.ones(k, bool), np.zeros(k, bool)], d_sae),
        "token_id": np.concatenate([up_ids, down_ids], axis=1).ravel(),
        "effect": np.concatenate([up, down], axis=1).ravel(),
    }


def _labels(tokens: dict[str, Any], d_sae: int, n: int = 3) -> list[list[int]]:
    """Per latent, the ids of the tokens that carry most of its activation."""
    order = np.lexsort((-tokens["share"], tokens["feature"]))
    labels: list[list[int]] = [[] for _ in range(d_sae)]
    for latent, token in zip(
        tokens["feature"][order].tolist(), tokens["token_id"][order].tolist(), strict=True
    ):
        if len(labels[latent]) < n:
            labels[latent].append(token)
    return labels


def _spell(ids: list[int], strings: Any) -> str:
    return ", ".join(strings[i].strip() or repr(strings[i]) for i in ids)
