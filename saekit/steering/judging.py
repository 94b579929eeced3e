"""Judging steered text without a judge: what it costs in fluency, what it repeats, what it speaks of.

All figures are of the *plain* model, or of the text alone, so nothing steered grades itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sites import capture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

FAINT = 1e-30  # a probability whose logarithm is asked for


def kl_parts(p: Tensor, q: Tensor) -> Tensor:
    """[V] the summands p log(p / q) of KL(p ‖ q), in nats: p and q [V] are probabilities."""
    return p * (p.clamp_min(FAINT).log() - q.clamp_min(FAINT).log())


@torch.no_grad()
def token_log_probs(model: TransformerBridge, ids: Tensor) -> Tensor:
    """[T − 1] log-probability, in nats, of each of ids [T] but the first under the model as it stands."""
    log_p = model(ids[None])[0, :-1].float().log_softmax(-1)
    return log_p.gather(1, ids[1:, None].to(log_p.device)).squeeze(1).cpu()


def perplexity(model: TransformerBridge, ids: Tensor, start: int) -> float:
    """exp of the mean loss of ids[start:] given what is before them; ids [T]. 1 where there is none."""
    if len(ids) <= max(1, start):
        return 1.0
    return float((-token_log_probs(model, ids)[max(0, start - 1) :].mean()).exp())


def repetition(tokens: Sequence[int], n: int = 3) -> float:
    """rep-n: the share of n-grams that were there before; 0 for texts shorter than n (Welleck 2020, arXiv 1908.04319)."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """distinct-n: different n-grams over all n-grams of several texts; 1 where there are none (Li 2016, arXiv 1510.03055)."""
    grams = [gram for tokens in texts for gram in zip(*(tokens[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 1.0


def keyword_rate(texts: Sequence[str], keywords: Iterable[str]) -> float:
    """The share of texts in which one of the words stands as a word of its own.

    A keyword with a capital is looked for as it is written, one without in whatever case. Raises `InvalidInput` without any.
    """
    wanted = {word.strip() for word in keywords}
    if not wanted or "" in wanted:
        raise InvalidInput("keywords: expected at least one word, none of them empty")
    words = (re.findall(r"\w+", text) for text in texts)
    found = (bool(wanted & {form for word in of for form in (word, word.lower())}) for of in words)
    return sum(found) / len(texts) if texts else 0.0


def word_ids(model: TransformerBridge, words: Iterable[str]) -> list[int]:
    """Ids of the words that are single tokens after a space, so that their next-token probability can be summed."""
    encoded = (model.tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"] for word in words)
    return sorted({ids[0] for ids in encoded if len(ids) == 1})


@torch.no_grad()
def reactivation(model: TransformerBridge, sae: SAE, latent: int, ids: Tensor, start: int) -> float:
    """The latent's largest activation on ids[start:] when the text [T] is read again without steering."""
    if len(ids) <= start:
        return 0.0
    x = capture(model, sae.sites, ids[None].to(model.cfg.device))
    f = sae.encode_some(torch.cat([x[site][0] for site in sae.sites], -1), [latent])[:, 0].float().cpu()
    ordinary = ~torch.isin(ids.cpu(), torch.tensor(special_ids(model)))
    ordinary[:start] = False
    return float(f[ordinary].max()) if bool(ordinary.any()) else 0.0
