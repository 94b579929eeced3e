"""Linear probes: a direction and a threshold that tell positive texts from negative ones, judged on texts kept back.

score(x) = x · w + b      positive where it is above 0

logistic      w, b of the penalised logistic regression (`evaluation.logistic`); the score is a log-odds
difference    w = mean⁺ − mean⁻, b puts 0 halfway between the means ("mass-mean", Marks & Tegmark 2023, arXiv 2310.06824)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.evaluation.logistic import accuracy, auc, logistic
from saekit.steering.directions.direction import Direction
from saekit.steering.directions.sources import Sides
from saekit.steering.directions.states import Token, check_texts, states

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ProbeKind = Literal["logistic", "difference"]
KEPT_BACK = 4  # every fourth text of a side judges the probe


@dataclass(frozen=True, eq=False)
class Probe:
    """A probe and how it did on the texts that it was not fitted on."""

    direction: Direction  # along w; of length 1 for a logistic probe, mean⁺ − mean⁻ for a difference
    kind: ProbeKind
    token: Token  # where it reads a text
    weights: Tensor = field(repr=False)  # w [D] float64
    bias: float
    accuracy: float
    auc: float
    fitted: int  # texts
    kept_back: int  # texts

    def scores(self, model: TransformerBridge, texts: Sequence[str]) -> Tensor:
        """[n] float64 scores of texts, positive above 0. Raises `InvalidInput` for another model."""
        self.direction.check_fits(model)
        return self._score(states(model, texts, self.direction.site, self.token))

    def _score(self, x: Tensor) -> Tensor:
        return x.double() @ self.weights + self.bias

    def __str__(self) -> str:
        return (
            f"{self.kind} probe at {self.direction.site} ({self.token} token), fitted on {self.fitted} texts\n"
            f"  on {self.kept_back} others: accuracy {self.accuracy:.1%}, AUC {self.auc:.3f}"
        )


@torch.no_grad()
def fit_probe(
    model: TransformerBridge,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    site: str,
    kind: ProbeKind = "logistic",
    token: Token = "last",
    penalty: float = 1.0,
    label: str | None = None,
) -> Probe:
    """Fit a probe for positive against negative texts; every fourth of each is kept back to judge it.

    penalty: of the logistic regression's standardised weights.
    Raises `UnknownName` for a site the model lacks, `InvalidInput` for an unknown kind or fewer than four texts of a side.
    """
    if kind not in ("logistic", "difference"):
        raise InvalidInput(f"kind: {kind!r}; a probe is 'logistic' or 'difference'")
    positive, negative = check_texts(positive, "positive"), check_texts(negative, "negative")
    if min(len(positive), len(negative)) < KEPT_BACK:
        raise InvalidInput(
            f"probe: {len(positive)} positive and {len(negative)} negative texts; expected {KEPT_BACK} or more of each"
        )
    x = states(model, [*positive, *negative], site, token)
    y = torch.arange(len(x)) < len(positive)
    place = torch.cat([torch.arange(len(positive)), torch.arange(len(negative))])
    back = place % KEPT_BACK == KEPT_BACK - 1
    sides = Sides(x[y & ~back], x[~y & ~back])
    if kind == "logistic":
        weights, bias = logistic(x[~back], y[~back], penalty=penalty)
    else:
        weights = sides.difference.double()
        bias = -float((sides.plus.mean(0) + sides.minus.mean(0)).double() @ weights) / 2
    if not float(weights.norm()) > 0:
        raise InvalidInput("probe: the two sides do not differ at this site")
    scores = x[back].double() @ weights + bias
    judged = (accuracy(scores, y[back]), auc(scores, y[back]))
    vector = weights / weights.norm() if kind == "logistic" else weights
    direction = Direction._of(
        model,
        site,
        vector.float(),
        label or f"{kind} probe",
        f"{kind} probe of {int((~back).sum())} texts, {token} token: accuracy {judged[0]:.0%} on {int(back.sum())} others",
        sides,
    )
    return Probe(direction, kind, token, weights, bias, *judged, int((~back).sum()), int(back.sum()))
