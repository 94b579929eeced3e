"""Attribution patching onto features: how far each moves a metric between two prompts, by gradients alone.

With x = Σ f_i d_i + b + ε at a site and position, ε the SAE's error, and a metric m of the logits (Marks 2024, arXiv 2403.19647):

    effect of feature i   ≈ ∂m/∂x · d_i (f_i^patch − f_i^clean)
    effect of the error   ≈ ∂m/∂x · (ε^patch − ε^clean)

One forward and one backward give all of them; features and error add up to ∂m/∂x · (x^patch − x^clean) at every position, so
nothing of what the SAE misses is lost. `steps` > 1 averages the gradient along the straight way from clean to patch
(integrated gradients): the effects of all positions then add up to m^patch − m^clean, nearly.

T tokens, D the site's width, A features that fire on either prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lens.tokens import token_id, visible
from saekit.lm import token_strings
from saekit.sites import capture, editing
from saekit.steering.directions.states import text_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

Metric = Callable[[Tensor], Tensor]  # logits [T, V] float32 → a number
Goal = Metric | str | tuple[str, str]


class Effect(NamedTuple):
    """A feature at a position, or the error there."""

    feature: int | None  # None: the SAE's error
    position: int
    effect: float
    clean: float  # its activation, of the error its norm
    patch: float


@dataclass(frozen=True, eq=False)
class FeatureEffects:
    """Estimated effects on a metric of setting features, one at a time, from the clean prompt to the patch."""

    site: str
    tokens: tuple[str, ...]  # of the clean prompt
    patch_tokens: tuple[str, ...] | None  # of the other one; None: patched to silence, f = 0 and ε = 0
    metric: float  # on the clean prompt
    patched: float  # with the whole of x at the site patched
    features: Tensor = field(repr=False)  # [A] those that fire on either prompt
    effects: Tensor = field(repr=False)  # [T, A]
    error: Tensor = field(repr=False)  # [T]
    clean: Tensor = field(repr=False)  # [T, A] activations
    patch: Tensor = field(repr=False)  # [T, A]
    error_norms: Tensor = field(repr=False)  # [T, 2] of the clean prompt and of the patch
    _measure: Callable[[int | None, int], float] = field(repr=False)

    @property
    def total(self) -> float:
        """Of all features and errors at all positions: the estimate of patched − metric."""
        return float(self.effects.sum() + self.error.sum())

    def top(self, n: int = 10) -> list[Effect]:
        """The n strongest features and errors, by |effect|."""
        A = len(self.features)
        both = torch.cat([self.effects, self.error[:, None]], 1).flatten()
        found = both.abs().topk(min(n, len(both))).indices.tolist()
        return [self._at(i // (A + 1), i % (A + 1)) for i in found]

    def by_feature(self, n: int = 10) -> list[tuple[int, float]]:
        """(feature, effect summed over positions), the n strongest."""
        summed = self.effects.sum(0)
        order = summed.abs().topk(min(n, len(summed))).indices
        return [(int(self.features[i]), float(summed[i])) for i in order]

    def measured(self, feature: int | None, position: int) -> float:
        """What the estimate stands for: the metric's true change when only this feature (None: the error) is patched there."""
        return self._measure(feature, position)

    def _at(self, position: int, column: int) -> Effect:
        if column == len(self.features):
            clean, patch = self.error_norms[position].tolist()
            return Effect(None, position, float(self.error[position]), clean, patch)
        place = position, column
        return Effect(
            int(self.features[column]),
            position,
            float(self.effects[place]),
            float(self.clean[place]),
            float(self.patch[place]),
        )

    def __str__(self) -> str:
        lines = [
            f"{self.site}: metric {self.metric:.4g} → {self.patched:.4g} patched, effects add up to {self.total:+.4g} "
            f"(features {float(self.effects.sum()):+.4g}, error {float(self.error.sum()):+.4g})"
        ]
        for effect in self.top():
            what = "error" if effect.feature is None else f"feature {effect.feature}"
            at = f"{visible(self.tokens[effect.position])!r} ({effect.position})"
            lines.append(f"  {effect.effect:+9.4f}  {what} on {at}: {effect.clean:.3g} → {effect.patch:.3g}")
        return "\n".join(lines)


def feature_effects(
    model: TransformerBridge,
    sae: SAE,
    clean: str,
    patch: str | None = None,
    *,
    metric: Goal,
    steps: int = 1,
) -> FeatureEffects:
    """Estimate how far each feature, and the SAE's error, moves a metric of the clean prompt when it is set to what it is on
    another prompt of as many tokens, or (without one) to zero.

    metric: a token (its logit after the last token), two (the first one's logit less the second's), or a function of the
        logits [T, V], float32, that gives a tensor with one number and takes gradients.
    steps: 1 takes the gradient at the clean prompt; more integrate it along the way to the patch, a forward and backward each.

    Raises `InvalidInput` for a crosscoder or a transcoder with a skip, prompts of different lengths, or a metric without
    gradients.
    """
    if len(sae.target_sites) != 1 or sae.config.skip:
        raise InvalidInput(
            f"this SAE writes {', '.join(sae.target_sites)}{' and has a skip' if sae.config.skip else ''}; effects need one "
            "that writes one site with its features alone"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"steps: expected a whole number from 1, got {steps!r}")
    sae.check_fits(model)
    site = sae.target_sites[0]
    ids = text_ids(model, clean)
    others = None if patch is None else text_ids(model, patch)
    if others is not None and len(others) != len(ids):
        raise InvalidInput(
            f"patch: {len(others)} tokens, the clean prompt has {len(ids)}; positions have to correspond"
        )
    goal = _goal(model, metric)

    x, f, error, bias = _parts(model, sae, ids)
    if others is None:
        x_patch, f_patch, error_patch = bias, torch.zeros_like(f), torch.zeros_like(error)
    else:
        x_patch, f_patch, error_patch, _ = _parts(model, sae, others)
    way = (x_patch - x).to(model.cfg.device)
    fractions = [0.0] if steps == 1 else [(i + 0.5) / steps for i in range(steps)]
    slopes = [_slope(model, site, ids, goal, way * fraction) for fraction in fractions]
    gradient = torch.stack(slopes).mean(0)  # [T, D]

    firing = ((f != 0) | (f_patch != 0)).any(0).nonzero().squeeze(1)
    rows = sae.directions()[firing].float()
    f, f_patch = f[:, firing], f_patch[:, firing]
    slope = gradient.to(rows.device)

    def measure(feature: int | None, position: int) -> float:
        if not 0 <= position < len(ids):
            raise InvalidInput(f"position: {position}; this text has positions 0 to {len(ids) - 1}")
        if feature is None:
            delta = (error_patch - error)[position]
        else:
            column = (firing == sae.check_latent(feature)).nonzero().squeeze(1)
            if not len(column):
                return 0.0
            i = int(column)
            delta = (f_patch - f)[position, i] * rows[i]
        shift = torch.zeros_like(way)
        shift[position] = delta.to(shift.device)
        return _value(model, site, ids, goal, shift) - plain

    plain = _value(model, site, ids, goal, None)
    return FeatureEffects(
        site=site,
        tokens=tuple(token_strings(model.tokenizer, ids.tolist())),
        patch_tokens=None if others is None else tuple(token_strings(model.tokenizer, others.tolist())),
        metric=plain,
        patched=_value(model, site, ids, goal, way),
        features=firing.cpu(),
        effects=((f_patch - f) * (slope @ rows.t())).cpu(),
        error=((error_patch - error) * slope).sum(1).cpu(),
        clean=f.cpu(),
        patch=f_patch.cpu(),
        error_norms=torch.stack([error.norm(dim=1), error_patch.norm(dim=1)], 1).cpu(),
        _measure=measure,
    )


@torch.no_grad()
def _parts(model: TransformerBridge, sae: SAE, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D] at the site that is written, f [T, S], ε = x − SAE [T, D], and b [T, D], what no feature carries.

    All float32, where the SAE is.
    """
    (site,) = sae.target_sites
    seen = capture(model, [*sae.sites, site], ids[None])
    read = torch.cat([seen[name][0] for name in sae.sites], -1)
    f = sae.encode(read).float()
    reconstruction = sae(read).float()
    x = seen[site][0].to(f.device).float()
    return x, f, x - reconstruction, reconstruction - f @ sae.directions().float()


def _goal(model: TransformerBridge, metric: Goal) -> Metric:
    if callable(metric):
        return metric
    names = (metric,) if isinstance(metric, str) else metric
    if not isinstance(names, tuple) or len(names) not in (1, 2):
        raise InvalidInput(
            f"metric: expected a token, two of them, or a function of the logits, got {metric!r}"
        )
    v, *rest = (token_id(model, name) for name in names)
    return lambda logits: logits[-1, v] - (logits[-1, rest[0]] if rest else 0.0)


def _slope(model: TransformerBridge, site: str, ids: Tensor, goal: Metric, shift: Tensor) -> Tensor:
    """∂m/∂x [T, D] float32 at x + shift. No parameter's gradient is touched."""
    here: list[Tensor] = []

    def mark(x: Tensor) -> Tensor:
        here.append(torch.zeros_like(x).requires_grad_())
        return (x.float() + shift).to(x.dtype).detach() + here[0]

    with torch.enable_grad(), editing(model, {site: mark}):
        value = goal(model(ids[None].to(model.cfg.device))[0].float())
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InvalidInput(
                "metric: expected a function of the logits [T, V] that gives one number with gradients"
            )
        (gradient,) = torch.autograd.grad(value, here)
    return gradient[0].float()


@torch.no_grad()
def _value(model: TransformerBridge, site: str, ids: Tensor, goal: Metric, shift: Tensor | None) -> float:
    """The metric at x + shift, shift [T, D]."""
    changes = {} if shift is None else {site: lambda x: (x.float() + shift).to(x.dtype)}
    with editing(model, changes):
        return float(goal(model(ids[None].to(model.cfg.device))[0].float()))
