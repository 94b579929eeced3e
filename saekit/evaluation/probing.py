"""Sparse probing: is a concept of the texts in one latent, or in a few?

    texts ──▶ activations, latents ──mean over ordinary tokens──▶ one vector per text
    training half: the k latents whose class means differ most, |mean⁺ − mean⁻| ──▶ logistic regression on them
    test half:     its accuracy and AUC, beside those of a regression on all activations, and of the larger class

Sparse probing is Gurnee 2023 (arXiv 2305.01610); on the latents of an SAE, with mean-pooled texts and the difference
of class means, as SAEBench does it (Karvonen 2025, arXiv 2503.09532). As there, a concept is one label against the
others, with as many negatives as positives where there are more. Unlike there, regressions see standardised columns
(`logistic`), and the halves are of the texts that are there, not given sets.

n texts, D = d_in, S = d_sae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.evaluation.labelled import Labelled
from saekit.evaluation.logistic import accuracy, auc, logistic
from saekit.lm import separator_id, special_ids
from saekit.sae import SAE
from saekit.sites import read

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

KS = (1, 2, 5, 16)
FEWEST = 4  # texts of a label, so that either half has some
TEXTS_AT_ONCE = 32


class Score(NamedTuple):
    """How a probe did on texts it was not trained on."""

    accuracy: float
    auc: float


class Pooled(NamedTuple):
    """Texts as vectors: means over their ordinary tokens. Texts without one are left out."""

    activations: Tensor  # [n, D] float32
    latents: Tensor  # [n, S] float32
    kept: Tensor  # [n] int64: which of the texts these are


@dataclass(frozen=True)
class Probe:
    """One concept, a label against the others."""

    concept: str
    texts: int  # train and test
    latents: tuple[
        int, ...
    ]  # those chosen, by descending difference of class means; k of them means the first k
    by_k: dict[int, Score]  # on k latents
    activations: Score  # on all D activations
    majority: float  # accuracy of always saying the larger class


def probe(
    model: TransformerBridge, sae: SAE, labelled: Labelled, *, ks: Sequence[int] = KS, seed: int = 0
) -> list[Probe]:
    """Probe every label of `read_labelled`'s texts, in their alphabetical order.

    Of two labels one is the other's opposite, so only the second is probed. ks: numbers of latents. seed: of
    the halves and of the negatives drawn.

    Raises `InvalidInput` for a label with fewer than four texts that have an ordinary token, or k beyond d_sae.
    """
    if not ks or not all(1 <= k <= sae.d_sae for k in ks):
        raise InvalidInput(f"ks: {list(ks)}; expected numbers of latents from 1 to {sae.d_sae}")
    sae.check_fits(model)
    pooled = pool(model, sae, labelled.texts)
    labels = np.array(labelled.labels)[pooled.kept.numpy()]
    concepts = sorted(set(labelled.labels))
    for concept in concepts:
        if (there := int((labels == concept).sum())) < FEWEST:
            raise InvalidInput(f"probe: label {concept!r} has {there} texts; expected {FEWEST} or more")
    concepts = concepts[1:] if len(concepts) == 2 else concepts
    return [_probe(pooled, labels == concept, concept, sorted(set(ks)), seed) for concept in concepts]


@torch.no_grad()
def pool(model: TransformerBridge, sae: SAE, texts: Sequence[str]) -> Pooled:
    """Mean activations and mean latents over the ordinary tokens of each text, cut to the model's context."""
    separator = separator_id(model)
    start = [] if separator is None else [separator]
    special = torch.tensor(special_ids(model), dtype=torch.long)
    encoded = model.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    rows = [torch.tensor((start + ids)[: model.cfg.n_ctx], dtype=torch.long) for ids in encoded]
    ordinary = [~torch.isin(row, special) for row in rows]
    kept = [i for i, mask in enumerate(ordinary) if mask.any()]
    activations = torch.zeros(len(texts), sae.d_in)
    latents = torch.zeros(len(texts), sae.d_sae)
    by_length = sorted(kept, key=lambda i: len(rows[i]))
    for first in range(0, len(by_length), TEXTS_AT_ONCE):
        some = by_length[first : first + TEXTS_AT_ONCE]
        # Filled up on the right, where a causal model does not look; masked out below.
        ids = torch.nn.utils.rnn.pad_sequence(
            [rows[i] for i in some], batch_first=True, padding_value=separator or 0
        )
        mask = torch.nn.utils.rnn.pad_sequence([ordinary[i] for i in some], batch_first=True)
        x = read(model, sae.sites, ids)
        x_mD = x[mask.to(x.device)].to(sae.W_enc.device, torch.float32)
        text_m = mask.nonzero()[:, 0].to(x_mD.device)
        share_m1 = (1 / mask.sum(1)).to(x_mD)[text_m, None]
        for pooled, values in ((activations, x_mD), (latents, sae.encode(x_mD).float())):
            means = values.new_zeros(len(some), values.shape[1]).index_add_(0, text_m, values * share_m1)
            pooled[some] = means.cpu()
    return Pooled(activations[kept], latents[kept], torch.tensor(kept, dtype=torch.long))


def _probe(pooled: Pooled, positive: np.ndarray, concept: str, ks: list[int], seed: int) -> Probe:
    draw = np.random.default_rng(seed)
    yes, no = draw.permutation(positive.nonzero()[0]), draw.permutation((~positive).nonzero()[0])
    no = no[: max(len(yes), FEWEST)]
    train = torch.from_numpy(np.concatenate([yes[: len(yes) // 2], no[: len(no) // 2]]))
    test = torch.from_numpy(np.concatenate([yes[len(yes) // 2 :], no[len(no) // 2 :]]))
    y = torch.from_numpy(positive)

    def scored(x: Tensor) -> Score:
        direction, bias = logistic(x[train], y[train])
        scores = x[test].double() @ direction + bias
        return Score(accuracy(scores, y[test]), auc(scores, y[test]))

    f = pooled.latents
    difference = (f[train][y[train]].mean(0) - f[train][~y[train]].mean(0)).abs()
    chosen = difference.topk(ks[-1]).indices
    return Probe(
        concept=concept,
        texts=len(train) + len(test),
        latents=tuple(chosen.tolist()),
        by_k={k: scored(f[:, chosen[:k]]) for k in ks},
        activations=scored(pooled.activations),
        majority=max(share := float(y[test].double().mean()), 1 - share),
    )


def probe_figures(probes: Sequence[Probe]) -> dict[str, float]:
    """Means over concepts as flat figures: k<k>_accuracy, k<k>_auc, activations_accuracy, …, majority_accuracy."""
    n = len(probes)
    made = {}
    for k in probes[0].by_k:
        made[f"k{k}_accuracy"] = sum(p.by_k[k].accuracy for p in probes) / n
        made[f"k{k}_auc"] = sum(p.by_k[k].auc for p in probes) / n
    made["activations_accuracy"] = sum(p.activations.accuracy for p in probes) / n
    made["activations_auc"] = sum(p.activations.auc for p in probes) / n
    made["majority_accuracy"] = sum(p.majority for p in probes) / n
    return made
