"""One pass over held-out contexts → figures with their confidence intervals, each right by construction.

    ids ──clean forward──▶ activations at every site read or written ──SAE──▶ x̂ ──spliced in──▶ CE, KL

x̂ is computed once, from clean activations, and spliced in where it belongs: at the site an autoencoder reads, at a
transcoder's target, at all the sites of a crosscoder together. BOS, EOS and pad are excluded from every average and
stay untouched in every forward. What the figures mean is in `figures`, where the intervals come from in `intervals`.

N contexts, T context_size, n evaluated tokens of a batch, D width read, E width written, S = d_sae, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.evaluation.figures import (
    INTERVALS,
    figures,
    token_faithfulness,
    token_reconstruction,
    variance,
)
from saekit.evaluation.intervals import DocumentSums, bootstrap, totals
from saekit.lm import special_ids
from saekit.sae import SAE
from saekit.sites import Edit, capture, editing
from saekit.tokens import Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOGITS_AT_ONCE = 2**26  # float32 logits held per forward, 256 MiB
MEAN_CONTEXTS = 256  # contexts that the mean of mean-ablation is taken over


@dataclass(frozen=True)
class Evaluation:
    """What one pass over held-out contexts says about an SAE."""

    figures: dict[str, float]  # as `evaluate` returns them
    density: Tensor  # [S] float64: share of evaluated tokens on which each latent fired


class _Batch(NamedTuple):
    ids: Tensor  # [N, T]
    documents: Tensor  # [N, T]
    kept: Tensor  # [N, T] bool: ordinary tokens


def evaluate(
    model: TransformerBridge,
    sae: SAE,
    tokens: Tokens | Tensor | Iterable[Tensor],
    *,
    max_tokens: int | None = None,
    faithfulness: bool = True,
) -> dict[str, float]:
    """Evaluate an SAE, a transcoder or a crosscoder on contexts it was not trained on.

    tokens: `Tokens` or ids [N, T]. max_tokens: stop after about so many. faithfulness: also run the model
    with the reconstruction spliced in, and with zero and the mean in its place (three more forwards).

    Returns l0, l1, mse, explained_variance, fvu, cosine, norm_ratio, bias (relative reconstruction bias), dead
    (share of latents that never fired here), dead_latents, mean_log10_density, tokens, documents, and with
    faithfulness ce_clean, ce_sae, ce_zero, ce_mean, ce_recovered, ce_recovered_mean, kl_sae, kl_zero, kl_mean,
    kl_recovered, kl_recovered_mean. CE and KL are in nats per token. A crosscoder's explained_variance is that of
    its sites' activations side by side; beside it stands explained_variance/<site> for each.

    Where two documents or more were read, l0, mse, explained_variance (also per site), fvu, cosine and the recovered
    shares come with <name>_low and <name>_high, a 95 % interval by resampling documents. Contexts given as plain
    ids count as a document each. Memory grows with documents (a vector of E and a few numbers each), not with tokens.

    The mean that replaces activations in mean-ablation is that of the first 256 contexts (of all of them where
    there are no more): they are run once more beforehand, up to the last target site, so that a stream that can
    be read only once will do.

    Raises `InvalidInput` when no position is left to evaluate, or the SAE does not fit the model.
    """
    return assess(model, sae, tokens, max_tokens=max_tokens, faithfulness=faithfulness).figures


def assess(
    model: TransformerBridge,
    sae: SAE,
    tokens: Tokens | Tensor | Iterable[Tensor],
    *,
    max_tokens: int | None = None,
    faithfulness: bool = True,
) -> Evaluation:
    """As `evaluate`, with the firing rate of every latent beside the figures."""
    sae.check_fits(model)
    sums = DocumentSums()
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    batches = _batches(model, tokens, max_tokens)
    ablations: dict[str, dict[str, Tensor]] = {}
    if faithfulness:
        first = list(islice(batches, -(-MEAN_CONTEXTS // _contexts_at_once(model))))
        mean = _mean(model, sae.target_sites, first)
        ablations = {
            "zero": {site: torch.zeros_like(value) for site, value in mean.items()},
            "mean": mean,
        }
        batches = chain(first, batches)
    for batch in batches:
        _one_batch(model, sae, batch, ablations, sums, fired)
    return _evaluation(sae, sums, fired)


def _contexts_at_once(model: TransformerBridge) -> int:
    return max(1, min(16, LOGITS_AT_ONCE // (model.cfg.d_vocab * 256)))


def _batches(
    model: TransformerBridge, tokens: Tokens | Tensor | Iterable[Tensor], max_tokens: int | None
) -> Iterator[_Batch]:
    excluded = torch.tensor(special_ids(model), dtype=torch.long)
    remaining = max_tokens if max_tokens is not None else float("inf")
    for batch in token_batches(tokens, _contexts_at_once(model)):
        kept = ~torch.isin(batch.ids, excluded) & (batch.documents >= 0)
        yield _Batch(batch.ids, batch.documents, kept)
        remaining -= int(kept.sum())
        if remaining <= 0:
            return


def _mean(model: TransformerBridge, sites: Iterable[str], batches: Iterable[_Batch]) -> dict[str, Tensor]:
    """The mean activation over ordinary tokens at each site, [D] float32."""
    sums = dict.fromkeys(sites, torch.zeros((), dtype=torch.float64))
    n = 0
    for batch in batches:
        for site, x in capture(model, list(sums), batch.ids).items():
            sums[site] = sums[site] + x[batch.kept.to(x.device)].sum(0, dtype=torch.float64).cpu()
        n += int(batch.kept.sum())
    return {site: (total / max(1, n)).float() for site, total in sums.items()}


@torch.no_grad()
def _one_batch(
    model: TransformerBridge,
    sae: SAE,
    batch: _Batch,
    ablations: Mapping[str, Mapping[str, Tensor]],
    sums: DocumentSums,
    fired: Tensor,
) -> None:
    ids, kept = batch.ids.to(model.cfg.device), batch.kept.to(model.cfg.device)
    if not kept.any():
        return
    seen: dict[str, Tensor] = {}

    def keep(site: str, x: Tensor) -> Tensor:
        seen[site] = x
        return x

    clean = _log_probs(model, {site: partial(keep, site) for site in (*sae.sites, *sae.target_sites)}, ids)

    def activations(sites: Iterable[str]) -> Tensor:
        return torch.cat([seen[site][kept] for site in sites], 1).to(sae.W_enc.device, torch.float32)

    x_nD = activations(sae.sites)
    y_nE = activations(sae.target_sites) if sae.is_transcoder else x_nD
    f_nS = sae.encode(x_nD)
    x_hat_nE = sae.reconstruct(f_nS, x_nD).float()
    # Centred SAEs are measured on what they see; what is spliced in gets its mean back.
    mean_n1 = y_nE.mean(1, keepdim=True) if sae.config.center_input else y_nE.new_zeros(())
    fired += (f_nS != 0).sum(0).cpu()
    all_n = torch.ones(len(x_nD), dtype=torch.bool)
    per_token = token_reconstruction(f_nS, x_hat_nE, y_nE - mean_n1, list(sae.widths))
    values = {name: (all_n, value) for name, value in per_token.items()}
    if ablations:
        # Position t predicts token t + 1: both have to be ordinary tokens for the site to matter there.
        scored = kept & torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], 1)
        log_p = {"clean": clean[scored]}
        spliced = dict(zip(sae.target_sites, sae.split(x_hat_nE + mean_n1), strict=True))
        for name, replacement in {"sae": spliced, **ablations}.items():
            log_p[name] = _log_probs(model, _replacing(kept, replacement), ids)[scored]
        targets = ids.roll(-1, 1)[scored]
        scored_n = scored[kept].cpu()
        values |= {name: (scored_n, value) for name, value in token_faithfulness(log_p, targets).items()}
    sums.add(batch.documents[batch.kept], values)


def _replacing(kept: Tensor, values: Mapping[str, Tensor]) -> dict[str, Edit]:
    """Edits that put each site's value, [n, D] or [D], in the place of the activations of kept positions."""

    def replace(value: Tensor, x: Tensor) -> Tensor:
        x = x.clone()
        x[kept] = value.to(x)
        return x

    return {site: partial(replace, value) for site, value in values.items()}


def _log_probs(model: TransformerBridge, edits: Mapping[str, Edit], ids: Tensor) -> Tensor:
    """Next-token log-probabilities [N, T, V], float32."""
    with editing(model, edits):
        return model(ids).float().log_softmax(-1)


def _evaluation(sae: SAE, sums: DocumentSums, fired: Tensor) -> Evaluation:
    per_document = sums.per_document()
    if not per_document:
        raise InvalidInput(
            "evaluate: no token to evaluate on; the contexts hold special tokens only, or none"
        )
    documents = len(per_document["tokens"])
    whole = totals(per_document, torch.ones(1, documents, dtype=torch.float64))
    n = int(whole["tokens"])
    if float(variance(whole, list(sae.widths)).sum()) <= 0:
        raise InvalidInput(
            f"evaluate: the {n} activations are all the same, so no share of variance can be told"
        )
    formulas = partial(figures, sites=dict(zip(sae.target_sites, sae.widths, strict=True)))
    density = fired.double() / n
    dead = int((fired == 0).sum())
    made = {name: float(value) for name, value in formulas(whole).items() if not value.isnan()}
    made |= {
        "dead": dead / sae.d_sae,
        "dead_latents": dead,
        "mean_log10_density": float(density.clamp_min(1e-10).log10().mean()),
        "tokens": n,
        "documents": documents,
    }
    for name, (low, high) in bootstrap(per_document, formulas).items():
        if name in INTERVALS or name.startswith("explained_variance/"):
            made |= {f"{name}_low": low, f"{name}_high": high}
    return Evaluation(made, density)
