"""What a direction is made of, in the features of an SAE: three views that answer three questions.

    by cosine    which decoder rows point the same way (or, negative, the opposite way)?
    by fit       which few rows, added in positive amounts, make it up, and how much of it?
    by sides     what fires more on the positive side than on the negative one?

The fit is orthogonal matching pursuit with non-negative coefficients: the row that correlates most with what is left joins,
then all coefficients are fitted anew by non-negative least squares (Pati 1993; Bruckstein 2008). Rows are plentiful, so a few
of them explain something of any vector: the share that they explain of random ones stands beside it.

D the site's width, S = d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.errors import InvalidInput
from saekit.steering.directions.sources import Sides

if TYPE_CHECKING:
    from saekit.sae import SAE

ROWS_AT_ONCE = 256
# Random directions, from a seed that no SAE is likely to have been started from: its first rows would be the very same.
CONTROL, DRAWS = 1_618_033, 4


class Aligned(NamedTuple):
    """A feature whose decoder row points along the direction, or against it."""

    feature: int
    cosine: float


class Fitted(NamedTuple):
    """A feature of the sparse fit, in the order in which they joined."""

    feature: int
    coefficient: float  # of its decoder row, ≥ 0: how far it would be active
    explained: float  # share of ‖direction‖² that the fit explains with this feature and those before it


class Moved(NamedTuple):
    """A feature that fires differently on the two sides."""

    feature: int
    plus: float  # mean activation over the positive states
    minus: float  # … and over the negative ones


@dataclass(frozen=True)
class Parts:
    """A direction in an SAE's features."""

    label: str
    site: str
    by_cosine: tuple[Aligned, ...]  # by descending |cosine|
    by_fit: tuple[Fitted, ...]
    by_sides: tuple[Moved, ...] | None  # by descending |plus − minus|; None where no two sides are known

    explained: float  # share of ‖direction‖² that the whole fit explains
    explained_random: float  # … that a fit of as many features explains of random directions, on average

    def __str__(self) -> str:
        cosine = ", ".join(f"{p.feature} ({p.cosine:+.2f})" for p in self.by_cosine)
        fit = ", ".join(f"{p.feature} (×{p.coefficient:.3g})" for p in self.by_fit)
        lines = [
            f"{self.label} at {self.site}",
            f"  by cosine  {cosine}",
            f"  by fit     {fit or 'no row points its way'}",
            f"             {self.explained:.1%} of its squared norm; of random directions' {self.explained_random:.1%}",
        ]
        if self.by_sides is None:
            lines.append(
                "  by sides   not known: this direction was not taken from two sides that the SAE reads"
            )
        else:
            moved = ", ".join(f"{p.feature} ({p.minus:.3g} → {p.plus:.3g})" for p in self.by_sides)
            lines.append(f"  by sides   {moved or 'nothing fires differently'}")
        return "\n".join(lines)


@torch.no_grad()
def decompose(vector: Tensor, site: str, label: str, sae: SAE, n: int, sides: Sides | None = None) -> Parts:
    """The three views of a vector [D] at a site. Raises `InvalidInput` for an SAE of another site or width."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidInput(f"n: expected a whole number from 1, got {n!r}")
    if site not in sae.target_sites:
        raise InvalidInput(
            f"{label} is at {site}, but this SAE writes {', '.join(sae.target_sites)}: take a direction there"
        )
    rows = sae.split(sae.directions())[sae.target_sites.index(site)].float()
    if rows.shape[1] != len(vector):
        raise InvalidInput(f"{label} has width {len(vector)}, but this SAE has {rows.shape[1]} at {site}")
    if not float(vector.norm()) > 0:
        raise InvalidInput(f"{label}: a vector of zeros has no parts")
    vector = vector.to(rows.device, torch.float32)
    n = min(n, sae.d_sae)
    axes = normalize(rows, dim=1)
    cosines = axes @ normalize(vector, dim=0)
    nearest = cosines.abs().topk(n).indices
    fit = _pursue(vector, rows, axes, n)
    draw = torch.Generator().manual_seed(CONTROL)
    controls = [_pursue(torch.randn(len(vector), generator=draw), rows, axes, n) for _ in range(DRAWS)]
    return Parts(
        label=label,
        site=site,
        by_cosine=tuple(Aligned(int(i), float(cosines[i])) for i in nearest),
        by_fit=tuple(fit),
        by_sides=_moved(sae, sides, n) if sides is not None and sae.sites == (site,) else None,
        explained=fit[-1].explained if fit else 0.0,
        explained_random=sum(one[-1].explained for one in controls if one) / DRAWS,
    )


def _pursue(vector: Tensor, rows: Tensor, axes: Tensor, n: int) -> list[Fitted]:
    """Non-negative orthogonal matching pursuit of a vector [D] in rows [S, D] whose unit vectors are `axes`."""
    from scipy.optimize import nnls

    target = vector.double().cpu()
    squared = float(target.square().sum())
    chosen: list[int] = []
    explained: list[float] = []
    coefficients: list[float] = []
    left = target
    for _ in range(n):
        gains = axes @ left.to(axes)
        gains[chosen] = 0.0
        best = int(gains.argmax())
        if not float(gains[best]) > 1e-6 * squared**0.5:
            break
        chosen.append(best)
        matrix = rows[chosen].double().cpu().t()
        solved, _ = nnls(matrix.numpy(), target.numpy())
        coefficients = solved.tolist()
        left = target - matrix @ torch.from_numpy(solved)
        explained.append(1 - float(left.square().sum()) / squared)
    return [Fitted(*part) for part in zip(chosen, coefficients, explained, strict=True)]


def _moved(sae: SAE, sides: Sides, n: int) -> tuple[Moved, ...]:
    plus, minus = (
        torch.cat([sae.encode(part).float() for part in side.split(ROWS_AT_ONCE)]).mean(0) for side in sides
    )
    order = (plus - minus).abs().topk(n).indices.tolist()
    return tuple(
        Moved(i, float(plus[i]), float(minus[i])) for i in order if float(plus[i]) != float(minus[i])
    )
