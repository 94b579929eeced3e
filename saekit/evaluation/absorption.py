"""Feature absorption: a concept's latent stays silent where a more special latent says the concept along with its own.

"starts with S" is a direction of the model and a latent of the SAE; on the token " snake" that latent does not fire,
because the snake latent's decoder row holds the S direction too. Sparsity rewards this (one latent instead of
two), and a reader of the S latent is misled (Chanin 2024, "A is for Absorption", arXiv 2409.14507).

Measured as in SAEBench (Karvonen 2025, arXiv 2503.09532), for a concept with a probe direction p, p̂ = p / ‖p‖, and
main latents M, those that stand for the concept. On every activation x that has the concept, and is found to by the
probe, its latents f (decoder rows d_i) are held against the probe:

    a    = (x − b_dec)·p̂                      what there is of the concept
    c_i  = f_i·(d_i·p̂)                         what latent i says of it
    m    = Σ_{i ∈ M} c_i                       what the main latents say
    r    = sum of the `max_absorbing` largest c_i of i ∉ M with cos(d_i, p) ≥ `min_cosine`

    absorption fraction   0 where m ≥ a or r < `min_share`·a,   1 else where m ≤ 0,
                          else r' / (r' + m) with r' = min(r, a − m)
    full absorption       no i ∈ M fires, a > 0, and the latent of the largest c_i has cos(d_i, p) ≥ `min_cosine_full`
                          and c_i ≥ `min_share`·a

averaged over those activations. SAEBench takes x·p̂ for a, and f_i·cos(d_i, p) for c_i: the same for unit decoder rows
and b_dec ⟂ p. Latents say nothing of b_dec, so it is not held against them here.

n activations, D = d_in, S = d_sae.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saekit.errors import InvalidInput
from saekit.evaluation.logistic import logistic
from saekit.evaluation.synthetic import Superposition
from saekit.sae import SAE

MIN_COSINE, MIN_COSINE_FULL, MIN_SHARE, MAX_ABSORBING = 0.1, 0.025, 0.4, 3  # SAEBench's
MAX_MAIN, F1_JUMP = 10, 0.03  # likewise
MIN_PROBE_F1, MIN_POSITIVES = 0.6, 20  # likewise: below, a concept is not measured
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Absorption:
    """One concept's absorption; the module's docstring has the definitions."""

    main: tuple[int, ...]  # main latents; more than one: the concept is split
    fraction: float  # mean absorption fraction
    full: float  # share of positives with full absorption
    silent: float  # share of positives on which no main latent fires, for whatever reason
    positives: int  # activations that have the concept, as the probe finds too


@torch.no_grad()
def absorption(
    sae: SAE,
    x: Tensor,
    probe: Tensor,
    labels: Tensor,
    main: Sequence[int],
    *,
    bias: float | None = None,
    min_cosine: float = MIN_COSINE,
    min_cosine_full: float = MIN_COSINE_FULL,
    min_share: float = MIN_SHARE,
    max_absorbing: int = MAX_ABSORBING,
) -> Absorption:
    """Absorption of one concept.

    x: activations [n, D]. probe: the concept's direction [D], of any length. labels: [n] bool, where the concept is.
    main: its latents, see `main_latents`. bias: the probe finds the concept where x·probe + bias > 0, and only
    positives it finds count; None: it finds all of them (a direction known to be true needs no test).

    Raises `InvalidInput` for shapes that do not fit, for no main latent, and where no positive is left.
    """
    _check(sae, x, labels)
    if sae.is_transcoder:
        raise InvalidInput(
            "absorption: a transcoder's latents do not write where they read; expected an SAE of one site"
        )
    if probe.shape != (sae.d_in,):
        raise InvalidInput(f"absorption: expected a probe direction [{sae.d_in}], got {tuple(probe.shape)}")
    if not main:
        raise InvalidInput("absorption: no main latent; expected at least one, as main_latents finds them")
    for latent in main:
        sae.check_latent(latent)
    x, probe = x.to(sae.W_dec.device, torch.float64), probe.to(sae.W_dec.device, torch.float64)
    found = labels.to(x.device).bool()
    if bias is not None:
        found = found & (x @ probe + bias > 0)
    if not bool(found.any()):
        raise InvalidInput("absorption: no activation has the concept and is found by the probe")

    x = x[found]
    unit = normalize(probe, dim=0)
    rows = sae.directions().double()
    cosines = cosine_similarity(rows, unit[None], dim=1)
    f_nS = sae.encode(x).double()
    says_nS = f_nS * (rows @ unit)
    has_n = (x - sae.b_dec.double()) @ unit
    is_main = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    is_main[list(main)] = True
    main_n = says_nS[:, is_main].sum(1)
    silent_n = ~(f_nS[:, is_main] > 0).any(1)

    others_nS = says_nS * (~is_main & (cosines >= min_cosine))
    others_n = others_nS.topk(min(max_absorbing, sae.d_sae), dim=1).values.sum(1)
    taken_n = torch.minimum(others_n, has_n - main_n)
    fraction_n = torch.where(main_n <= 0, 1.0, taken_n / (taken_n + main_n))
    fraction_n = torch.where((main_n >= has_n) | (others_n < min_share * has_n), 0.0, fraction_n)

    top = says_nS.max(dim=1)
    full_n = silent_n & (has_n > 0) & (top.values >= min_share * has_n)
    full_n &= cosines[top.indices] >= min_cosine_full
    return Absorption(
        main=tuple(main),
        fraction=float(fraction_n.double().mean()),
        full=float(full_n.double().mean()),
        silent=float(silent_n.double().mean()),
        positives=len(x),
    )


def main_latents(
    sae: SAE, x: Tensor, labels: Tensor, *, max_main: int = MAX_MAIN, f1_jump: float = F1_JUMP
) -> tuple[int, ...]:
    """The latents that stand for a concept, by k-sparse probing (Gurnee 2023, arXiv 2305.01610; Chanin 2024).

    Latents are ranked by how much more they say on positives than on negatives, in units of their deviation; a
    logistic regression on the first k of them gives F1(k), and k grows as long as F1(k) > F1(k − 1) + `f1_jump`: one
    latent, unless the concept is split among several. (SAEBench ranks by an L1 probe.)

    x: activations [n, D]. labels: [n] bool. Raises `InvalidInput` unless there are positives and negatives, and a
    latent that prefers the positives.
    """
    _check(sae, x, labels)
    with torch.no_grad():
        f_nS = sae.encode(x).float()
    labels = labels.to(f_nS.device).bool()
    if bool(labels.all()) or not bool(labels.any()):
        raise InvalidInput("main_latents: expected positives and negatives, got one kind only")
    gap = (f_nS[labels].mean(0) - f_nS[~labels].mean(0)) / f_nS.std(0).clamp_min(1e-8)
    ranked = [i for i in gap.argsort(descending=True, stable=True).tolist() if gap[i] > 0][:max_main]
    if not ranked:
        raise InvalidInput("main_latents: no latent says more where the concept is than where it is not")
    best, kept = -1.0, 0
    for k in range(1, len(ranked) + 1):
        weight, bias = logistic(f_nS[:, ranked[:k]], labels)
        score = f1(f_nS[:, ranked[:k]].double() @ weight + bias > 0, labels)
        if score <= best + f1_jump:
            break
        best, kept = score, k
    return tuple(ranked[:kept])


def tree_absorption(
    sae: SAE, truth: Superposition, *, samples: int = 16_384, seed: int = 0
) -> dict[str, float]:
    """Absorption of the parents of a forest whose directions are known: mean over all features with children.

    The probe is the parent's direction, the labels say where the parent fires, and the main latent is the one of the
    highest cosine with it. k-sparse probing would not do: a child that fires often predicts its parent, and its
    latent would be counted as the parent's.

    Returns absorption (mean fraction), full_absorption, silent. Raises `InvalidInput` when truth has no hierarchy.
    """
    if not truth.children:
        raise InvalidInput("tree_absorption: this data has no hierarchy; Superposition(parents=forest(…))")
    x, f = truth.sample(samples, seed)
    closest = truth.directions @ normalize(sae.directions().float().cpu(), dim=1).t()
    results = [
        absorption(sae, x, truth.directions[parent], f[:, parent] > 0, [int(closest[parent].argmax())])
        for parent in truth.children
        if bool((f[:, parent] > 0).any())
    ]
    return _means(results)


def concept_absorption(
    sae: SAE, x: Tensor, concepts: Mapping[str, Tensor], strings: Sequence[str], *, seed: int = 0
) -> tuple[dict[str, float], dict[str, Absorption]]:
    """Absorption of concepts that tokens have or not, with probes trained here. First letters are Chanin's task:

        concept_absorption(sae, x, first_letters(strings), strings)

    x: activations [n, D] at tokens. strings: the tokens [n]. concepts: name → [n] bool. Half of the different strings
    train each concept's probe, a logistic regression on x, and find its main latents; the other half is measured, so
    that no probe knows its words by heart.

    Returns means over concepts (absorption, full_absorption, silent, main: mean number of main latents, concepts: how
    many were measured), and each concept's `Absorption`. A concept is left out when in the half that is measured its
    probe has an F1 below 0.6 or finds fewer than 20 positives: then the model does not know the concept well enough for
    any latent to. Models much below 2B parameters know few first letters.

    Raises `InvalidInput` when no concept is left.
    """
    if len(strings) != len(x):
        raise InvalidInput(f"concept_absorption: {len(x)} activations but {len(strings)} strings")
    different = sorted(set(strings))
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    training = {different[i] for i in order[: len(different) // 2]}
    train = torch.tensor([string in training for string in strings], device=x.device)
    results: dict[str, Absorption] = {}
    for name, labels in concepts.items():
        _check(sae, x, labels)
        labels = labels.to(x.device).bool()
        y_train, y_test = labels[train], labels[~train]
        if not 0 < int(y_train.sum()) < len(y_train):
            continue
        weight, bias = logistic(x[train], y_train)
        says = x[~train].double() @ weight + bias > 0
        if f1(says, y_test) < MIN_PROBE_F1 or int((says & y_test).sum()) < MIN_POSITIVES:
            continue
        main = main_latents(sae, x[train], y_train)
        results[name] = absorption(sae, x[~train], weight, y_test, main, bias=bias)
    if not results:
        raise InvalidInput(
            f"concept_absorption: no concept has {MIN_POSITIVES} positives and a probe of F1 ≥ {MIN_PROBE_F1}; "
            "expected more tokens, another site, or a larger model"
        )
    split = sum(len(result.main) for result in results.values()) / len(results)
    return _means(list(results.values())) | {"main": split, "concepts": float(len(results))}, results


def first_letters(strings: Sequence[str]) -> dict[str, Tensor]:
    """Letter → [n] bool: which strings start with it after spaces, in either case. Letters that none starts with are
    left out."""
    firsts = [string.lstrip()[:1].lower() for string in strings]
    return {
        letter: torch.tensor([first == letter for first in firsts]) for letter in LETTERS if letter in firsts
    }


def f1(said: Tensor, labels: Tensor) -> float:
    """2·true positives / (said + labels); 0 where nothing was said and nothing was there."""
    both = int(said.sum()) + int(labels.sum())
    return 2 * int((said & labels).sum()) / both if both else 0.0


def _means(results: Sequence[Absorption]) -> dict[str, float]:
    names = {"absorption": "fraction", "full_absorption": "full", "silent": "silent"}
    return {
        name: sum(getattr(result, field) for result in results) / len(results)
        for name, field in names.items()
    }


def _check(sae: SAE, x: Tensor, labels: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != sae.d_in:
        raise InvalidInput(f"absorption: expected activations [n, {sae.d_in}], got {tuple(x.shape)}")
    if labels.shape != (len(x),):
        raise InvalidInput(
            f"absorption: expected one label for each of {len(x)} activations, got {tuple(labels.shape)}"
        )
