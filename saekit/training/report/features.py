"""Ten latents of an SAE and where they fire: not the best ones, those that come first by a hash of their numbers.

The draw is among the latents that fired in the last evaluation, and is the same for every SAE of one width: nobody has
picked. Their contexts are from one short pass over held-out text, read from its beginning, as the evaluation reads it.

N contexts, T context_size, n ordinary tokens of a batch, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.catalog.draws import draw
from saekit.catalog.effects import logit_effects
from saekit.evaluation import Evaluation
from saekit.lm import special_ids, token_strings
from saekit.sae import SAE
from saekit.sites import capture
from saekit.tokens import TokenBatch, Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FEATURES, CONTEXTS, LOGITS = 10, 3, 5
CANDIDATES = 40  # drawn, so that ten of them fire in a pass that may be shorter than the evaluation
READ = 50_000  # tokens of the pass: about so many, or as many as were evaluated where that is less
ROWS = 8  # contexts of a forward
BEFORE, AFTER = 24, 12  # tokens shown around a peak
REPORT = 0x4E9047  # sets this draw apart from others


class Excerpt(NamedTuple):
    """A stretch of one document around a peak."""

    tokens: list[str]
    activations: list[float]
    peak: int  # index of the peak among the tokens


@dataclass(frozen=True)
class Example:
    """A latent that was drawn."""

    index: int
    density: float  # share of the tokens of the last evaluation on which it fired
    excerpts: list[Excerpt]  # strongest first, at most one per document
    raised: list[
        str
    ]  # tokens whose logits its direction raises most; none where it writes to no residual stream
    lowered: list[str]

    @property
    def strongest(self) -> float:
        return self.excerpts[0].activations[self.excerpts[0].peak]


class _Seen(NamedTuple):
    value: float
    document: int
    ids: list[int]
    activations: list[float]
    peak: int


def drawn(density: Tensor, n: int) -> list[int]:
    """n latents with a firing, or all of them, in the order of a hash of their numbers. density: [S]."""
    fired = np.flatnonzero(density.numpy() > 0)
    return fired[np.argsort(draw(REPORT, fired), kind="stable")][:n].tolist()


@torch.no_grad()
def examples(
    model: TransformerBridge, sae: SAE, held_out: Tokens | Tensor, evaluation: Evaluation
) -> list[Example]:
    """Up to ten latents, in the order of their numbers. held_out: what was evaluated on."""
    density, read = evaluation.density, min(READ, int(evaluation.figures["tokens"]))
    candidates = drawn(density, CANDIDATES)
    if not candidates:
        return []
    best: list[dict[int, _Seen]] = [{} for _ in candidates]
    for batch, f in _activations(model, sae, held_out, candidates, read):
        for latent, mine in enumerate(best):
            _keep(mine, batch, f[:, :, latent])
    fired = [k for k in range(len(candidates)) if best[k]][:FEATURES]
    chosen = sorted((candidates[k], _strongest(best[k])) for k in fired)
    effects = _effects(model, sae, [index for index, _ in chosen])
    return [
        Example(index, float(density[index]), [_excerpt(model, one) for one in seen], *moved)
        for (index, seen), moved in zip(chosen, effects, strict=True)
    ]


def _activations(
    model: TransformerBridge, sae: SAE, held_out: Tokens | Tensor, latents: Sequence[int], wanted: int
) -> Iterator[tuple[TokenBatch, Tensor]]:
    """(contexts, f [N, T, C] at these latents), until so many tokens have been read; special tokens are of no document."""
    excluded, read = torch.tensor(special_ids(model), dtype=torch.long), 0
    for batch in token_batches(held_out, ROWS):
        kept = ~torch.isin(batch.ids, excluded) & (batch.documents >= 0)
        seen = capture(model, sae.sites, batch.ids)
        x = torch.cat([seen[site][kept.to(seen[site].device)] for site in sae.sites], 1)  # [n, D]
        f = torch.zeros(*batch.ids.shape, len(latents))
        f[kept] = sae.encode_some(x.to(sae.W_enc.device, torch.float32), latents).float().cpu()
        yield batch._replace(documents=batch.documents.where(kept, -1)), f
        read += int(kept.sum())
        if read >= wanted:
            return


def _keep(best: dict[int, _Seen], batch: TokenBatch, f: Tensor) -> None:
    """Take the strongest firing of each document into `best`, which keeps the strongest documents. f: [N, T]."""
    enough = min(seen.value for seen in best.values()) if len(best) == CONTEXTS else 0.0
    for row in (f.amax(1) > enough).nonzero()[:, 0].tolist():
        documents, values = batch.documents[row], f[row]
        for document in documents[values > 0].unique().tolist():
            inside = (documents == document).nonzero()[:, 0]
            peak = int(inside[values[inside].argmax()])
            value = float(values[peak])
            if document in best and best[document].value >= value:
                continue
            start, end = max(int(inside[0]), peak - BEFORE), min(int(inside[-1]) + 1, peak + AFTER + 1)
            ids, activations = batch.ids[row, start:end].tolist(), values[start:end].tolist()
            best[document] = _Seen(value, document, ids, activations, peak - start)
    for seen in sorted(best.values(), key=_order)[CONTEXTS:]:
        del best[seen.document]


def _order(seen: _Seen) -> tuple[float, int]:
    return -seen.value, seen.document


def _strongest(best: dict[int, _Seen]) -> list[_Seen]:
    return sorted(best.values(), key=_order)[:CONTEXTS]


def _excerpt(model: TransformerBridge, seen: _Seen) -> Excerpt:
    return Excerpt(token_strings(model.tokenizer, seen.ids), seen.activations, seen.peak)


def _effects(model: TransformerBridge, sae: SAE, latents: Sequence[int]) -> list[tuple[list[str], list[str]]]:
    """(tokens raised, tokens lowered) of each latent; none of what acts on several sites, or off the residual stream."""
    nothing: list[tuple[list[str], list[str]]] = [([], [])] * len(latents)
    if sae.is_crosscoder or not latents:
        return nothing
    found = logit_effects(model, sae.directions()[list(latents)].float(), sae.target_sites[0], LOGITS)
    if found is None:
        return nothing
    return [
        (token_strings(model.tokenizer, raised), token_strings(model.tokenizer, lowered))
        for raised, lowered in zip(found.raised_ids.tolist(), found.lowered_ids.tolist(), strict=True)
    ]
