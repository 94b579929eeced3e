"""One pass over held-out contexts → a plain dict of figures, each right by construction.

    reconstruction   explained variance = 1 − Σ‖x − x̂‖² / Σ‖x − μ‖², μ the mean of all evaluated activations,
                     so predicting the mean gives 0 and a perfect reconstruction 1
    faithfulness     CE recovered = (CE_zero − CE_sae) / (CE_zero − CE_clean), KL recovered likewise
                     with KL(clean ‖ ·); x̂ is spliced in at the site and excluded positions stay untouched

BOS, EOS and pad are excluded from all averages. Sums are float64.

N contexts, T context_size, D = d_in, S = d_sae, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sae import SAE
from saekit.sites import editing
from saekit.tokens import Tokens, token_batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LOGITS_AT_ONCE = 2**26  # float32 logits held per forward, 256 MiB


@dataclass
class _Sums:
    """Running sums over evaluated positions."""

    d_in: int
    d_sae: int
    tokens: int = 0
    x: Tensor = field(init=False)  # Σ x [D]
    fired: Tensor = field(init=False)  # tokens on which each latent fired [S]
    scalars: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.x = torch.zeros(self.d_in, dtype=torch.float64)
        self.fired = torch.zeros(self.d_sae, dtype=torch.int64)

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.scalars[name] = self.scalars.get(name, 0.0) + value


def evaluate(
    model: TransformerBridge,
    sae: SAE,
    tokens: Tokens | Tensor | Iterable[Tensor],
    *,
    max_tokens: int | None = None,
    faithfulness: bool = True,
) -> dict[str, float]:
    """Evaluate an SAE on contexts it was not trained on.

    tokens: `Tokens` or ids [N, T]. max_tokens: stop after about so many. faithfulness: also run the model
    with the reconstruction spliced in (three more forwards).

    Returns l0, l1, mse, explained_variance, fvu, cosine, norm_ratio, bias (relative reconstruction bias), dead
    (share of latents that never fired here), dead_latents, mean_log10_density, tokens, and with faithfulness
    ce_clean, ce_sae, ce_zero, ce_recovered, kl_sae, kl_zero, kl_recovered. CE and KL are in nats per token.

    Raises `InvalidInput` when no position is left to evaluate, or the SAE does not fit the model.
    """
    sae.check_fits(model)
    sums = _Sums(sae.d_in, sae.d_sae)
    excluded = torch.tensor(special_ids(model), dtype=torch.long)
    remaining = max_tokens if max_tokens is not None else float("inf")
    for batch in token_batches(tokens, _contexts_at_once(model)):
        ids = batch.ids
        kept = ~torch.isin(ids, excluded)
        _one_batch(model, sae, ids, kept, sums, faithfulness)
        remaining -= int(kept.sum())
        if remaining <= 0:
            break
    if sums.tokens == 0:
        raise InvalidInput(
            "evaluate: no token to evaluate on; the contexts hold special tokens only, or none"
        )
    return _figures(sums, faithfulness)


def _contexts_at_once(model: TransformerBridge) -> int:
    return max(1, min(16, LOGITS_AT_ONCE // (model.cfg.d_vocab * 256)))


@torch.no_grad()
def _one_batch(
    model: TransformerBridge, sae: SAE, ids: Tensor, kept: Tensor, sums: _Sums, faithfulness: bool
) -> None:
    device = model.cfg.device
    ids, kept = ids.to(device), kept.to(device)
    seen: list[Tensor] = []

    def observe(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    clean = _log_probs(model, sae.site, observe, ids)
    x_nD = seen[0][kept].to(sae.W_enc.device, torch.float32)
    _reconstruction(sae, x_nD, sums)
    if not faithfulness:
        return

    def splice(x: Tensor) -> Tensor:
        return torch.where(kept[..., None], sae(x).to(x), x)

    def zero(x: Tensor) -> Tensor:
        return torch.where(kept[..., None], torch.zeros_like(x), x)

    # Position t predicts token t + 1: both have to be ordinary tokens for the site to matter there.
    scored = kept[:, :-1] & kept[:, 1:]
    targets = ids[:, 1:][scored][:, None]
    clean_nV = clean[:, :-1][scored]
    sums.add(scored=float(scored.sum()), ce_clean=-_sum(clean_nV.gather(1, targets)))
    for name, edit in (("sae", splice), ("zero", zero)):
        edited_nV = _log_probs(model, sae.site, edit, ids)[:, :-1][scored]
        sums.add(
            **{
                f"ce_{name}": -_sum(edited_nV.gather(1, targets)),
                f"kl_{name}": _sum(clean_nV.exp() * (clean_nV - edited_nV)),
            }
        )


def _log_probs(model: TransformerBridge, site: str, edit: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Next-token log-probabilities [N, T, V], float32."""
    with editing(model, {site: edit}):
        return model(ids).float().log_softmax(-1)


def _reconstruction(sae: SAE, x_nD: Tensor, sums: _Sums) -> None:
    f_nS = sae.encode(x_nD)
    reconstruction = sae.decode(f_nS)
    if sae.config.center_input:  # measured on what the SAE sees
        x_nD = x_nD - x_nD.mean(1, keepdim=True)
    active = f_nS != 0
    sums.tokens += len(x_nD)
    sums.x += x_nD.double().sum(0).cpu()
    sums.fired += active.sum(0).cpu()
    sums.add(
        l0=_sum(active),
        l1=_sum(f_nS),
        squared_error=_sum((x_nD - reconstruction).square()),
        x_squared=_sum(x_nD.square()),
        reconstruction_squared=_sum(reconstruction.square()),
        x_dot_reconstruction=_sum(x_nD * reconstruction),
        cosine=_sum(torch.cosine_similarity(x_nD, reconstruction, dim=1)),
        norm_ratio=_sum(reconstruction.norm(dim=1) / x_nD.norm(dim=1).clamp_min(1e-12)),
    )


def _sum(tensor: Tensor) -> float:
    return tensor.sum(dtype=torch.float64).item()


def _figures(sums: _Sums, faithfulness: bool) -> dict[str, float]:
    s, n = sums.scalars, sums.tokens
    variance = s["x_squared"] - float(sums.x @ sums.x) / n
    if variance <= 0:
        raise InvalidInput(
            f"evaluate: the {n} activations are all the same, so no share of variance can be told"
        )
    fvu = s["squared_error"] / variance
    density = sums.fired.double() / n
    dead = int((sums.fired == 0).sum())
    figures = {
        "l0": s["l0"] / n,
        "l1": s["l1"] / n,
        "mse": s["squared_error"] / n,
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "cosine": s["cosine"] / n,
        "norm_ratio": s["norm_ratio"] / n,
        "bias": s["reconstruction_squared"] / s["x_dot_reconstruction"] if s["x_dot_reconstruction"] else 0.0,
        "dead": dead / sums.d_sae,
        "dead_latents": dead,
        "mean_log10_density": float(density.clamp_min(1e-10).log10().mean()),
        "tokens": n,
    }
    if faithfulness and s.get("scored"):
        ce = {name: s[f"ce_{name}"] / s["scored"] for name in ("clean", "sae", "zero")}
        kl = {name: s[f"kl_{name}"] / s["scored"] for name in ("sae", "zero")}
        figures |= {f"ce_{name}": value for name, value in ce.items()}
        figures |= {f"kl_{name}": value for name, value in kl.items()}
        figures["ce_recovered"] = _recovered(ce["zero"], ce["sae"], ce["clean"])
        figures["kl_recovered"] = _recovered(kl["zero"], kl["sae"], 0.0)
    return figures


def _recovered(zero: float, spliced: float, clean: float) -> float:
    """The share of what zero-ablation loses that the SAE keeps; 1 where ablation loses nothing."""
    return (zero - spliced) / (zero - clean) if zero != clean else 1.0
