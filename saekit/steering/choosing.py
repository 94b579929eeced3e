"""Which features are worth steering with: scores of what fires them and of what they do (Arad 2025, arXiv 2505.20063).

A feature's lens tokens are the k tokens that its direction raises most through the unembedding.

    input score    share of its strongest contexts whose peak token is one of the lens tokens
    output score   max P(lens tokens) · (1 − best rank of a lens token / V), next token, after adding 10 · max at a neutral prompt

Features with a high output score say what they stand for when they are turned up; a high input score says little of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from saekit.errors import InvalidInput
from saekit.lm import to_logits, token_strings
from saekit.sites import RESIDUAL
from saekit.steering.edits import Edit
from saekit.steering.generate import prompt_ids
from saekit.steering.steer import steer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog import Feature

LENS = 20  # tokens
AMPLIFIED = 10.0  # times the maximum
PROMPT = "In my experience,"
AT_ONCE = 32  # edits in a batch


class OutputScore(NamedTuple):
    """What an edit makes the model say."""

    score: float  # in [0, 1]
    rank: int  # best rank of a lens token after the edit, 0 is the likeliest
    probability: float  # of the likeliest lens token
    token: str  # that one


def lens_tokens(model: TransformerBridge, edits: Sequence[Edit], k: int = LENS) -> torch.Tensor:
    """[n, k] ids of the tokens that each edit's direction raises most. Raises `InvalidInput` off the residual stream."""
    off = next((edit.site for edit in edits if not edit.site.endswith(RESIDUAL)), None)
    if off is not None:
        raise InvalidInput(
            f"output score: {off} does not write to the residual stream, so it has no lens tokens"
        )
    return (
        to_logits(model, torch.stack([edit.direction for edit in edits]).to(model.cfg.device))
        .topk(k, dim=1)
        .indices
    )


@torch.no_grad()
def output_scores(
    model: TransformerBridge, edits: Sequence[Edit], *, prompt: str = PROMPT, k: int = LENS
) -> list[OutputScore]:
    """The output score of each edit, e.g. of `feature.add(10, unit="max")` for each feature in question.

    Raises `InvalidInput` for an edit off the residual stream.
    """
    if not edits:
        return []
    ids, lens = prompt_ids(model, prompt, 1), lens_tokens(model, edits, k)
    scores = []
    for start in range(0, len(edits), AT_ONCE):
        part = edits[start : start + AT_ONCE]
        with steer(model, rows=[[edit] for edit in part]):
            p = model(ids.expand(len(part), -1))[:, -1].float().softmax(-1)
        of_lens = p.gather(1, lens[start : start + AT_ONCE])
        best, which = of_lens.max(1)
        ranks = (p > best[:, None]).sum(1)
        tokens = lens[start : start + AT_ONCE].gather(1, which[:, None])[:, 0].tolist()
        for rank, probability, token in zip(
            ranks.tolist(), best.tolist(), token_strings(model.tokenizer, tokens), strict=True
        ):
            scores.append(OutputScore((1 - rank / p.shape[1]) * probability, rank, probability, token))
    return scores


def input_score(model: TransformerBridge, feature: Feature, k: int = LENS) -> float | None:
    """The input score of a catalog's feature; None where it never fired."""
    if not feature.contexts:
        return None
    lens = set(lens_tokens(model, [feature.add(1.0)], k)[0].tolist())
    return sum(c.token_ids[c.peak] in lens for c in feature.contexts) / len(feature.contexts)


def choose(
    model: TransformerBridge, features: Sequence[Feature], *, prompt: str = PROMPT
) -> list[tuple[Feature, OutputScore]]:
    """Features by their output score, best first; those that never fired have none and are left out."""
    alive = [feature for feature in features if feature.max_activation > 0]
    scores = output_scores(model, [f.add(AMPLIFIED, unit="max") for f in alive], prompt=prompt)
    return sorted(zip(alive, scores, strict=True), key=lambda pair: -pair[1].score)
