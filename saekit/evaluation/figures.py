"""From sums over tokens to figures: the formulas, each written once, for the data and for every resample of it.

    reconstruction   explained variance = 1 − Σ‖y − x̂‖² / Σ‖y − μ‖², μ the mean of all evaluated y,
                     so predicting the mean gives 0 and a perfect reconstruction 1
    faithfulness     CE recovered = (CE_zero − CE_sae) / (CE_zero − CE_clean), KL recovered likewise
                     with KL(clean ‖ ·); against the mean instead of zero: ce_recovered_mean, kl_recovered_mean

Σ‖y − μ‖² = Σ‖y‖² − ‖Σy‖²/n is made of sums, so a resample has its own μ, as it should.

y is what x̂ is for: x itself, or the activations at a transcoder's target; for a crosscoder all its sites side by side.
n tokens, E width of y, L sites, S = d_sae, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saekit.evaluation.intervals import Sums

ABLATIONS = ("zero", "mean")
INTERVALS = (  # the figures that come with an interval, beside explained_variance/<site>
    "l0",
    "mse",
    "explained_variance",
    "fvu",
    "cosine",
    "ce_recovered",
    "kl_recovered",
    "ce_recovered_mean",
    "kl_recovered_mean",
)


def token_reconstruction(
    f_nS: Tensor, x_hat_nE: Tensor, y_nE: Tensor, widths: list[int]
) -> dict[str, Tensor]:
    """What each token adds to the sums behind the reconstruction figures, [n, …] each."""
    total = torch.float64
    squared_error = (y_nE - x_hat_nE).square().split(widths, 1)
    return {
        "tokens": torch.ones(len(y_nE), dtype=total),
        "l0": (f_nS != 0).sum(1),
        "l1": f_nS.sum(1, dtype=total),
        "y": y_nE,
        "y_squared": torch.stack([part.sum(1, dtype=total) for part in y_nE.square().split(widths, 1)], 1),
        "squared_error": torch.stack([part.sum(1, dtype=total) for part in squared_error], 1),
        "x_hat_squared": x_hat_nE.square().sum(1, dtype=total),
        "y_dot_x_hat": (y_nE * x_hat_nE).sum(1, dtype=total),
        "cosine": torch.cosine_similarity(y_nE, x_hat_nE, dim=1),
        "norm_ratio": x_hat_nE.norm(dim=1) / y_nE.norm(dim=1).clamp_min(1e-12),
    }


def token_faithfulness(log_p: Mapping[str, Tensor], targets_n: Tensor) -> dict[str, Tensor]:
    """What each scored position adds to the sums of CE and KL, [n] each.

    log_p: log-probabilities [n, V] of the model `clean`, and with something spliced in. targets: the next ids.
    """
    clean = log_p["clean"]
    p = clean.exp()
    sums = {"scored": torch.ones(len(targets_n), dtype=torch.float64)}
    for name, edited in log_p.items():
        sums[f"ce_{name}"] = -edited.gather(1, targets_n[:, None])[:, 0]
        if name != "clean":
            sums[f"kl_{name}"] = (p * (clean - edited)).sum(1, dtype=torch.float64)
    return sums


def variance(sums: Sums, widths: list[int]) -> Tensor:
    """Σ‖y − μ‖² per site, [R, L]."""
    squared_mean = torch.stack([part.square().sum(1) for part in sums["y"].split(widths, 1)], 1)
    return sums["y_squared"] - squared_mean / sums["tokens"][:, None]


def figures(sums: Sums, sites: Mapping[str, int]) -> dict[str, Tensor]:
    """Figures [R] of sums [R, …]. sites: name → width. NaN where there is nothing to divide by."""
    s, n = sums, sums["tokens"]
    site_variance = variance(s, list(sites.values()))
    squared_error = s["squared_error"].sum(1)
    fvu = _ratio(squared_error, site_variance.sum(1))
    made = {
        "l0": s["l0"] / n,
        "l1": s["l1"] / n,
        "mse": squared_error / n,
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "cosine": s["cosine"] / n,
        "norm_ratio": s["norm_ratio"] / n,
        "bias": torch.where(s["y_dot_x_hat"] == 0, 0.0, s["x_hat_squared"] / s["y_dot_x_hat"]),
    }
    if len(sites) > 1:
        explained = 1 - _ratio(s["squared_error"], site_variance)
        made |= {f"explained_variance/{site}": explained[:, i] for i, site in enumerate(sites)}
    if "scored" in s:
        made |= {name: s[name] / s["scored"] for name in s if name.startswith(("ce_", "kl_"))}
        for ablation in ABLATIONS:
            suffix = "" if ablation == "zero" else f"_{ablation}"
            for measure, clean in (("ce", made["ce_clean"]), ("kl", torch.zeros_like(n))):
                lost = made[f"{measure}_{ablation}"]
                made[f"{measure}_recovered{suffix}"] = _recovered(lost, made[f"{measure}_sae"], clean)
    return made


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.nan)


def _recovered(ablated: Tensor, spliced: Tensor, clean: Tensor) -> Tensor:
    """The share of what an ablation loses that the SAE keeps; 1 where the ablation loses nothing."""
    return torch.where(ablated == clean, 1.0, (ablated - spliced) / (ablated - clean))
