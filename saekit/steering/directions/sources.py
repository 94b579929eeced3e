"""What two sides of states are apart by: the difference of their means, or the axis that their pairs differ along.

plus, minus: [n, D] and [m, D] states of the positive and the negative texts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saekit.errors import InvalidInput


class Sides(NamedTuple):
    """The states that a direction points away from and towards."""

    plus: Tensor  # [n, D]
    minus: Tensor  # [m, D]

    @property
    def difference(self) -> Tensor:
        """[D]: mean⁺ − mean⁻ (CAA, Rimsky 2023, arXiv 2312.06681)."""
        return self.plus.mean(0) - self.minus.mean(0)


class Axis(NamedTuple):
    """The first principal axis of pair differences."""

    vector: Tensor  # [D], of length 1
    share: float  # of the differences' summed squares that lies along it
    agreement: float  # of the pairs whose positive side lies further along it


def principal_axis(sides: Sides) -> Axis:
    """The axis with the largest Σ (d_i · v)², d_i = plus_i − minus_i (RepE, Zou 2023, arXiv 2310.01405).

    Nothing is centred: the mean of the differences is the very thing that is wanted. (RepE shuffles the order within the
    pairs and then centres, which comes to the same: the differences ±d_i have mean 0, and Σ dᵢdᵢᵀ does not see signs.)
    The sign is the labels': the positive sides lie further along v on average.

    Raises `InvalidInput` for sides that do not pair up or do not differ.
    """
    if sides.plus.shape != sides.minus.shape:
        raise InvalidInput(
            f"pca: texts are taken in pairs, but there are {len(sides.plus)} positive and {len(sides.minus)} negative ones"
        )
    differences = (sides.plus - sides.minus).double()
    _, lengths, axes = torch.linalg.svd(differences, full_matrices=False)
    if not float(lengths[0]) > 0:
        raise InvalidInput("pca: no pair differs at this site")
    projections = differences @ axes[0]
    sign = -1.0 if float(projections.sum()) < 0 else 1.0
    return Axis(
        (sign * axes[0]).float(),
        float(lengths[0].square() / lengths.square().sum()),
        float((sign * projections > 0).double().mean()),
    )
