"""Direct logit attribution: a logit as the sum of what an SAE's features write into it.

With the final norm's division held at the value it had, the logit of token v is linear in the last residual stream x_L:

    logit_v = x_L · u_v + c_v        u_v = P(γ ⊙ W_U[:, v]) / σ,  c_v = β · W_U[:, v] + b_U[v]

σ the norm's denominator at this position, γ and β its weight and bias, P takes the mean off (LayerNorm) or nothing (RMSNorm).
At the site, the stream itself or what an attention or an MLP adds to it, x = Σ f_i d_i + b + ε, b what no feature carries and ε
the SAE's error, and x_L − x is everything else in the stream. So

    logit_v = Σ_i f_i (d_i · u_v)  +  ε · u_v  +  b · u_v  +  (x_L − x) · u_v  +  c_v          exactly

This is what features write themselves; what they do by way of later blocks is in the rest (`patching` follows it).

D = d_model, S = d_sae.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lens.logit_lens import soft_cap
from saekit.lens.tokens import check_position, token_id, visible
from saekit.lm import token_strings
from saekit.sites import RESIDUAL, capture
from saekit.steering.directions.states import text_ids

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # of the largest part


class Contribution(NamedTuple):
    """What one feature writes into the logit."""

    feature: int
    activation: float
    logit: float


@dataclass(frozen=True)
class LogitAttribution:
    """A logit, or a difference of two, in parts that add up to it."""

    token: str
    against: str | None  # the token whose logit is taken off
    position: int
    after: str  # the token at the position
    site: str
    logit: float  # the sum of all parts; of a model with soft-capped logits, before the cap
    features: tuple[Contribution, ...] = field(repr=False)  # all that fire, by descending |logit|
    error: float  # the SAE's error
    bias: float  # the SAE's b_dec, and a transcoder's skip
    rest: float  # everything else in the last residual stream
    constant: float  # the final norm's bias and the unembedding's

    @property
    def total(self) -> float:
        """Of all features together."""
        return sum(part.logit for part in self.features)

    def of(self, feature: int) -> float:
        """A feature's contribution; 0 where it is silent."""
        return next((part.logit for part in self.features if part.feature == feature), 0.0)

    def __str__(self) -> str:
        token = repr(visible(self.token)) + ("" if self.against is None else f" − {visible(self.against)!r}")
        lines = [
            f"logit of {token} after {visible(self.after)!r} (position {self.position}): {self.logit:.3f}",
            f"  {len(self.features)} features at {self.site} {self.total:+.3f}, error {self.error:+.3f}, b_dec {self.bias:+.3f}, "
            f"rest {self.rest:+.3f}, constant {self.constant:+.3f}",
        ]
        lines += [
            f"  {part.logit:+9.3f}  feature {part.feature} at {part.activation:.3g}"
            for part in self.features[:10]
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = (
            "token",
            "against",
            "position",
            "after",
            "site",
            "logit",
            "error",
            "bias",
            "rest",
            "constant",
        )
        return {name: getattr(self, name) for name in names} | {
            "features": [part._asdict() for part in self.features]
        }


@torch.no_grad()
def logit_attribution(
    model: TransformerBridge,
    sae: SAE,
    text: str,
    token: str | int,
    *,
    against: str | int | None = None,
    position: int = -1,
) -> LogitAttribution:
    """The logit of the token after `position` in what an SAE's features write into it.

    against: a token whose logit is taken off, so that what raises both cancels.
    Raises `InvalidInput` for an SAE that does not write one site of the residual stream, for a token or position that is not
    there, and for a model whose logits are not its final norm's output times the unembedding.
    """
    if len(sae.target_sites) != 1 or not sae.target_sites[0].endswith(RESIDUAL):
        raise InvalidInput(
            f"this SAE writes {', '.join(sae.target_sites)}; a logit's parts need one that writes one site of the residual "
            f"stream ({', '.join(RESIDUAL)})"
        )
    site = sae.target_sites[0]
    sae.check_fits(model)
    ids = text_ids(model, text)
    position = check_position(position, len(ids))
    v, w = token_id(model, token), None if against is None else token_id(model, against)

    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    seen = capture(model, [*sae.sites, site, last], ids[None])
    x, end = (seen[name][0, position].float().cpu() for name in (site, last))
    read = torch.cat(
        [seen[name][:, position] for name in sae.sites], -1
    )  # [1, D], the stream at `site` but for transcoders
    u, constant = _reader(model, end, v)
    if w is not None:
        u_w, constant_w = _reader(model, end, w)
        u, constant = u - u_w, constant - constant_w

    f = sae.encode(read)[0].float().cpu()
    reconstruction = sae(read)[0].float().cpu()
    firing = f.nonzero().squeeze(1)
    rows = sae.directions()[firing.to(sae.W_dec.device)].float().cpu()
    contributions = f[firing] * (rows @ u)
    order = contributions.abs().argsort(descending=True)
    bias = reconstruction - f[firing] @ rows
    made = LogitAttribution(
        token=token_strings(model.tokenizer, [v])[0],
        against=None if w is None else token_strings(model.tokenizer, [w])[0],
        position=position,
        after=token_strings(model.tokenizer, [int(ids[position])])[0],
        site=site,
        logit=float(end @ u) + constant,
        features=tuple(
            Contribution(int(firing[i]), float(f[firing[i]]), float(contributions[i])) for i in order
        ),
        error=float((x - reconstruction) @ u),
        bias=float(bias @ u),
        rest=float((end - x) @ u),
        constant=constant,
    )
    _check(model, ids, made, v, w)
    return made


def _reader(model: TransformerBridge, end: Tensor, v: int) -> tuple[Tensor, float]:
    """(u_v [D], c_v) at a last residual stream [D], float32 on the CPU."""
    column = model.W_U[:, v].detach().float().cpu()
    centred = model.cfg.normalization_type in ("LN", "LNPre")
    gain, bias = (getattr(model.ln_final, name, None) for name in ("weight", "bias"))
    around = end - end.mean() if centred else end
    sigma = float((around.square().mean() + model.cfg.eps).sqrt())
    u = column
    if gain is not None:
        offset = 1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0  # Gemma's γ is 1 + weight
        u = u * (gain.detach().float().cpu() + offset)
    u = (u - u.mean() if centred else u) / sigma
    constant = 0.0
    if centred and bias is not None:
        constant += float(bias.detach().float().cpu() @ column)
    if (b_U := getattr(model, "b_U", None)) is not None:
        constant += float(b_U[v])
    return u, constant


def _check(model: TransformerBridge, ids: Tensor, made: LogitAttribution, v: int, w: int | None) -> None:
    """The parts against the model's own logit: a norm or head of another form must not pass for this one."""
    if w is not None and soft_cap(model) is not None:
        return  # the difference before the cap does not follow from the two after it
    logits = model(ids[None])[0, made.position].float().cpu()
    actual = float(logits[v]) - (0.0 if w is None else float(logits[w]))
    expected = made.logit
    if (cap := soft_cap(model)) is not None:
        expected = cap * float(torch.tensor(expected / cap).tanh())
    parts = (made.logit, made.total, made.error, made.bias, made.rest, made.constant)
    allowed = ROUNDING.get(model.cfg.dtype, 1e-3) * max(1.0, *(abs(part) for part in parts))
    if abs(actual - expected) > allowed:
        raise InvalidInput(
            f"the logit of {made.token!r} is {actual:.4g}, but its parts add up to {expected:.4g}: {model.cfg.model_name} does "
            "more after its last block than a norm and an unembedding"
        )
