"""Activations in superposition whose directions are known, and how many of them an SAE finds.

The data (Elhage 2022, "Toy Models of Superposition"; hierarchy as in Chanin 2024, arXiv 2409.14507):

    x = Σ_i f_i·v_i + b + σ·ε,    f_i = g_i·m_i,    ε ~ N(0, 1) in every coordinate

    v_i [D]   unit directions, more of them than dimensions
    m_i > 0   magnitude, mean `magnitude`, drawn for every sample and feature
    g_i       1 where the feature fires: 1[l_i ≤ u_i < l_i + p_i], and for a child also its parent's g

u_i is uniform on [0, 1), so P(g_i | parent fires) is p_i exactly, and what the u_i share decides what fires together:

    groups    each member takes its group's u instead of its own with probability √ρ, ρ = `strength`. Then
              P(i and j) = ρ·min(p_i, p_j) + (1 − ρ)·p_i·p_j, so the lift P(i and j) / (p_i·p_j) is
              1 + ρ·(1 / max(p_i, p_j) − 1), and with p_i = p_j the correlation of the firings is ρ itself
    exclusive siblings share one u and their intervals [l_i, l_i + p_i) do not meet: at most one of them fires
    else      independent, l_i = 0

N samples, F features, D = d_in, S = latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.errors import InvalidInput
from saekit.sae import SAE

Magnitudes = Literal["uniform", "half_normal", "lognormal"]
ROOT = -1  # the parent of a feature that has none
REPULSION_STEPS, REPULSION_RATE = 2000, 0.3
_DIRECTIONS, _BIAS, _SAMPLE, _BATCH = range(4)  # what randomness is for: no draw serves two purposes


def forest(trees: int, children: int, depth: int = 1) -> tuple[int, ...]:
    """`parents` of equal trees, level by level: roots, their children, … Each node above `depth` has `children`."""
    parents = [ROOT] * trees
    level = list(range(trees))
    for _ in range(depth):
        above = [node for node in level for _ in range(children)]
        level = list(range(len(parents), len(parents) + len(above)))
        parents += above
    return tuple(parents)


@dataclass(frozen=True)
class Superposition:
    """Data with known directions; the module's docstring has the model. Equal fields give equal data.

    d_in, features: D and F. seed: of the directions and the bias; every draw depends on it too.
    max_cosine: bound on the mutual |cosine| of directions; None: random ones, 0: orthogonal ones.
    rate: mean P(fires) of the features without a parent. rate_exponent: α of the power law p_r ∝ r^−α over those
    features in order of their index, r = 1, 2, …; 0: all alike.
    magnitude: E[m]. spread: s below. magnitudes, with z ~ N(0, 1) and u uniform on [−1, 1):
        uniform       m = magnitude·(1 + s·u)                       0 ≤ s < 1
        half_normal   m = magnitude·(1 − s + s·√(π/2)·|z|)          0 ≤ s < 1, so m is at least (1 − s)·magnitude
        lognormal     m = magnitude·exp(s·z − s²/2)                 0 ≤ s
    groups, strength: features without parents, each in one group at most, that fire together; ρ in [0, 1].
    parents: the parent of each feature, ROOT where it has none, `()` if none has one; parents come before
    children; see `forest`. child_rate: P(child fires | parent fires). exclusive: at most one child of a parent fires.
    bias: ‖b‖, in a random direction. noise: σ.

    Raises `InvalidInput` for values that cannot be; for a `max_cosine` out of reach when directions are first read.
    """

    d_in: int
    features: int
    seed: int = 0
    max_cosine: float | None = None
    rate: float = 0.05
    rate_exponent: float = 0.0
    magnitude: float = 1.0
    magnitudes: Magnitudes = "uniform"
    spread: float = 0.5
    groups: tuple[tuple[int, ...], ...] = ()
    strength: float = 0.0
    parents: tuple[int, ...] = ()
    child_rate: float = 0.2
    exclusive: bool = False
    bias: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("d_in", 2), ("features", 1), ("seed", 0)):
            _check_whole(name, getattr(self, name), least)
        for name, low, high in (
            ("rate", 0.0, 1.0),
            ("rate_exponent", 0.0, math.inf),
            ("magnitude", 0.0, math.inf),
            ("spread", 0.0, math.inf),
            ("strength", 0.0, 1.0),
            ("child_rate", 0.0, 1.0),
            ("bias", 0.0, math.inf),
            ("noise", 0.0, math.inf),
        ):
            _check_number(name, getattr(self, name), low, high)
        for name in ("rate", "magnitude", "child_rate"):
            if getattr(self, name) == 0:
                raise InvalidInput(f"{name}: 0 means that nothing ever fires; expected more than 0")
        if self.magnitudes not in get_args(Magnitudes):
            raise InvalidInput(
                f"magnitudes: {self.magnitudes!r} is not one of {', '.join(get_args(Magnitudes))}"
            )
        if self.magnitudes != "lognormal" and self.spread >= 1:
            raise InvalidInput(
                f"spread: {self.spread} would give {self.magnitudes} magnitudes of 0; expected < 1"
            )
        self._check_parents()
        self._check_groups()
        self._check_cosine()
        if (top := float(self._gate_rates.max())) > 1:
            raise InvalidInput(
                f"rate: {self.rate} with rate_exponent {self.rate_exponent} asks for a firing rate of {top:.3g}; "
                "lower one of them"
            )

    def _check_parents(self) -> None:
        if not self.parents:
            return
        if len(self.parents) != self.features:
            raise InvalidInput(
                f"parents: expected one for each of {self.features} features, got {len(self.parents)}"
            )
        for child, parent in enumerate(self.parents):
            if not ROOT <= parent < child:
                raise InvalidInput(
                    f"parents: feature {child} has parent {parent}; expected {ROOT} (none) or a smaller index"
                )
        most = max((self.parents.count(parent) for parent in set(self.parents) - {ROOT}), default=0)
        if self.exclusive and most * self.child_rate > 1 + 1e-9:
            raise InvalidInput(
                f"child_rate: {most} exclusive children cannot fire with probability {self.child_rate} each; "
                f"expected at most {1 / most:.3g}"
            )

    def _check_groups(self) -> None:
        members = [feature for group in self.groups for feature in group]
        if len(set(members)) != len(members):
            raise InvalidInput("groups: a feature is in two groups, or twice in one")
        if wrong := [m for m in members if not 0 <= m < self.features or self._parent(m) != ROOT]:
            raise InvalidInput(
                f"groups: {wrong[0]} is not a feature without a parent; expected indices from 0 to {self.features - 1}"
            )

    def _check_cosine(self) -> None:
        if self.max_cosine is None:
            return
        _check_number("max_cosine", self.max_cosine, 0.0, 1.0)
        F, D = self.features, self.d_in
        welch = (
            math.sqrt((F - D) / (D * (F - 1))) if F > D else 0.0
        )  # no F directions in D dimensions do better
        if self.max_cosine < welch:
            raise InvalidInput(
                f"max_cosine: {self.max_cosine} is below {welch:.3f}, the least possible for {F} directions in "
                f"{D} dimensions (Welch 1974)"
            )

    # What is known exactly

    @cached_property
    def directions(self) -> Tensor:
        """v [F, D], unit rows."""
        rows = _normal((self.features, self.d_in), self._generator(_DIRECTIONS))
        if self.max_cosine is None:
            return normalize(rows, dim=1).float()
        if self.features <= self.d_in:
            return torch.linalg.qr(rows.t()).Q.t().contiguous().float()
        return _repelled(normalize(rows, dim=1), self.max_cosine).float()

    @cached_property
    def offset(self) -> Tensor:
        """b [D]."""
        return (self.bias * normalize(_normal((self.d_in,), self._generator(_BIAS)), dim=0)).float()

    @cached_property
    def rates(self) -> Tensor:
        """P(feature fires) [F], float64, exactly: the product of p along the path from the root."""
        rates = self._gate_rates.clone()
        for feature in range(self.features):
            if (parent := self._parent(feature)) != ROOT:
                rates[feature] *= rates[parent]
        return rates

    @property
    def l0(self) -> float:
        """Expected number of features that fire in a sample."""
        return float(self.rates.sum())

    def pair_rate(self, i: int, j: int) -> float:
        """P(features i and j both fire), exactly. Over `rates[i]·rates[j]` it is their lift."""
        up, down = self._path(i), self._path(j)
        if i in down or j in up:  # one is above the other, or the same
            return float(min(self.rates[i], self.rates[j]))
        above, below = self.rates[i], self.rates[j]
        shared = [node for node in up if node in down]
        if not shared:
            return float(above * below * self._lift(up[-1], down[-1]))
        fork = shared[0]
        siblings = up[up.index(fork) - 1], down[down.index(fork) - 1]
        return (
            0.0 if self.exclusive and siblings[0] != siblings[1] else float(above * below / self.rates[fork])
        )

    def _lift(self, root: int, other: int) -> float:
        if not any(root in group and other in group for group in self.groups):
            return 1.0
        return 1 + self.strength * (1 / float(self.rates[[root, other]].max()) - 1)

    @cached_property
    def _gate_rates(self) -> Tensor:
        """p [F], float64: P(fires | parent fires)."""
        roots = torch.tensor([self._parent(feature) == ROOT for feature in range(self.features)])
        law = torch.arange(1, int(roots.sum()) + 1, dtype=torch.float64) ** -self.rate_exponent
        p = torch.full((self.features,), self.child_rate, dtype=torch.float64)
        p[roots] = self.rate * law / law.mean()
        return p

    def _parent(self, feature: int) -> int:
        return self.parents[feature] if self.parents else ROOT

    def _path(self, feature: int) -> list[int]:
        """The feature, its parent, … its root."""
        path = [feature]
        while (parent := self._parent(path[-1])) != ROOT:
            path.append(parent)
        return path

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """The children of every feature that has some."""
        children: dict[int, list[int]] = {}
        for child, parent in enumerate(self.parents):
            if parent != ROOT:
                children.setdefault(parent, []).append(child)
        return children

    # Samples

    def sample(self, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(x [n, D], f [n, F]), float32; the same for the same seed, and never a training batch of `batches`."""
        _check_whole("n", n, 1)
        _check_whole("seed", seed, 0)
        return self._draw(n, self._generator(_SAMPLE, seed))

    def batches(self, batch_size: int, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Endless x [batch_size, D] for a trainer, from batch `start` on; batch i is the same in every run."""
        _check_whole("batch_size", batch_size, 1)
        _check_whole("seed", seed, 0)
        _check_whole("start", start, 0)
        return self._batches(batch_size, seed, start)

    def _batches(self, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
        while True:
            yield self._draw(batch_size, self._generator(_BATCH, seed, step))[0]
            step += 1

    def _draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        f = self._firing(n, generator) * self._magnitudes(n, generator)
        x = f @ self.directions + self.offset
        if self.noise:
            x += self.noise * torch.randn(n, self.d_in, generator=generator)
        return x, f

    def _firing(self, n: int, generator: torch.Generator) -> Tensor:
        """g [n, F] bool."""
        p = self._gate_rates.float()
        low = torch.zeros_like(p)
        u = torch.rand(n, self.features, generator=generator)
        for group in self.groups:
            common = torch.rand(n, 1, generator=generator)
            takes = torch.rand(n, len(group), generator=generator) < math.sqrt(self.strength)
            u[:, group] = torch.where(takes, common, u[:, group])
        if self.exclusive:
            for siblings in self.children.values():
                u[:, siblings] = u[:, siblings[:1]]
                low[siblings] = p[siblings].cumsum(0) - p[siblings]
        fires = (low <= u) & (u < low + p)
        for parent, children in self.children.items():  # in order of index, so parents are settled first
            fires[:, children] &= fires[:, [parent]]
        return fires

    def _magnitudes(self, n: int, generator: torch.Generator) -> Tensor:
        """m [n, F]."""
        s, shape = self.spread, (n, self.features)
        if self.magnitudes == "uniform":
            return self.magnitude * (1 + s * (2 * torch.rand(shape, generator=generator) - 1))
        z = torch.randn(shape, generator=generator)
        if self.magnitudes == "half_normal":
            return self.magnitude * (1 - s + s * math.sqrt(math.pi / 2) * z.abs())
        return self.magnitude * (s * z - s * s / 2).exp()

    def _generator(self, *purpose: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, *purpose]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _repelled(rows: Tensor, bound: float) -> Tensor:
    """Unit rows pushed apart until no two have |cosine| > bound: each moves against what its cosines exceed it by."""
    inner = 0.98 * bound  # aiming lower gets there in finitely many steps
    for _ in range(REPULSION_STEPS):
        cosines = (rows @ rows.t()).fill_diagonal_(0.0)
        if bool(cosines.abs().max() <= bound):
            return rows
        excess = cosines - cosines.clamp(-inner, inner)
        rows = normalize(rows - REPULSION_RATE * excess @ rows, dim=1)
    raise InvalidInput(
        f"max_cosine: no {len(rows)} directions in {rows.shape[1]} dimensions within {bound} after "
        f"{REPULSION_STEPS} steps of repulsion; expected a bound further from the least possible"
    )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(f"{name}: expected a whole number of at least {least}, got {value!r:.80}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InvalidInput(f"{name}: expected a number from {low:g} to {high:g}, got {value!r:.80}")
    if math.isinf(value):
        raise InvalidInput(f"{name}: expected a finite number, got {value}")


@torch.no_grad()
def recovery(
    found: SAE | Tensor,
    truth: Superposition,
    *,
    samples: int = 16_384,
    threshold: float = 0.9,
    seed: int = 0,
) -> dict[str, float]:
    """How well decoder rows d_j match the true directions v_i; an SAE also by when its latents fire.

    found: an SAE, or rows [S, D] alone. Cosines are signed, since a latent only adds its direction. A latent is
    live when it fires on the sample (a row alone: when it is not 0).

    mmcs            mean over true directions of max_j cos(v_i, d_j), over live and dead latents (Sharkey 2022)
    recovered       share of true directions with a latent of cosine > threshold
    unique          share with such a latent of their own: a maximum matching of directions and latents
    latents_mmcs    mean over live latents of max_i cos(v_i, d_j)
    latents_true    share of live latents with a true direction of cosine > threshold
    live            share of latents
    precision, recall, f1   of an SAE only: the firing of the latent of highest cosine as a classifier of the feature's,
                    mean over the features that fire in the sample; a latent that never fires scores 0

    Random rows do not give 0: the best of S random cosines in D dimensions is about √(2·ln S / D).
    Raises `InvalidInput` when widths differ.
    """
    rows = (found.directions() if isinstance(found, SAE) else found).detach().float().cpu()
    if rows.ndim != 2 or rows.shape[1] != truth.d_in:
        raise InvalidInput(f"recovery: expected directions [S, {truth.d_in}], got {tuple(rows.shape)}")
    cosines_FS = truth.directions @ normalize(rows, dim=1).t()
    best = cosines_FS.max(dim=1)
    live = rows.norm(dim=1) > 0
    detection: dict[str, float] = {}
    if isinstance(found, SAE):
        x, f = truth.sample(samples, seed)
        fired = found.encode(x).cpu() > 0
        live = fired.any(0)
        detection = _detection(fired[:, best.indices], f > 0)
    closest = cosines_FS[:, live].max(dim=0).values if bool(live.any()) else torch.zeros(1)
    return {
        "mmcs": float(best.values.mean()),
        "recovered": _share(best.values > threshold),
        "unique": _matched(cosines_FS > threshold) / truth.features,
        "latents_mmcs": float(closest.mean()),
        "latents_true": _share(closest > threshold),
        "live": _share(live),
    } | detection


def _detection(said: Tensor, fires: Tensor) -> dict[str, float]:
    """Mean precision, recall and F1 of said [N, F] as classifiers of fires [N, F]."""
    seen = fires.any(0)
    if not bool(seen.any()):
        raise InvalidInput("recovery: no feature fires in the sample; expected more samples or higher rates")
    said, fires = said[:, seen], fires[:, seen]
    right = (said & fires).sum(0).double()
    precision, recall = right / said.sum(0).clamp_min(1), right / fires.sum(0)
    f1 = 2 * right / (said.sum(0) + fires.sum(0))
    return {"precision": float(precision.mean()), "recall": float(recall.mean()), "f1": float(f1.mean())}


def _matched(may: Tensor) -> int:
    """The most pairs (i, j) with may[i, j] in which no i and no j occurs twice."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(may.numpy(), maximize=True)
    return int(may[rows, columns].sum())


def _share(yes: Tensor) -> float:
    return float(yes.double().mean())
