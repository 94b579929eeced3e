"""The logit lens: what the model would say next if it stopped at a layer (nostalgebraist 2020).

    x_l ──▶ final norm ──▶ unembedding (and the logits' soft cap, where there is one) ──▶ p_l

Layer l is the residual stream before block l; layer n_layers is the stream after the last block, and p there is the model's
own. Streams and their normalisation are TransformerLens's (`ActivationCache.accumulated_resid`).

L layers, P positions, D = d_model, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lens.drawing import drawable_token
from saekit.lens.tokens import check_position, token_id, visible
from saekit.lm import token_strings
from saekit.steering.directions.states import text_ids

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge


class Guess(NamedTuple):
    """A token and its probability."""

    token: str
    p: float


class Wanted(NamedTuple):
    """Where a given token stands."""

    rank: int  # 0 is the most probable
    p: float


@dataclass(frozen=True)
class LogitLens:
    """Next-token guesses by layer and position."""

    tokens: tuple[str, ...]  # of the whole text, spaces kept
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    top: tuple[tuple[tuple[Guess, ...], ...], ...]  # [layer][position], most probable first
    token: str | None  # the token asked for
    wanted: tuple[tuple[Wanted, ...], ...] | None  # [layer][position], where one was asked for

    def __str__(self) -> str:
        lines = []
        for p, position in enumerate(self.positions):
            asked = "" if self.token is None else f"   {visible(self.token)!r}: rank, probability"
            lines.append(f"after {visible(self.tokens[position])!r} (position {position}){asked}")
            for at, layer in enumerate(self.layers):
                guesses = "  ".join(f"{visible(guess.token)!r} {guess.p:.1%}" for guess in self.top[at][p])
                there = (
                    ""
                    if self.wanted is None
                    else f"{self.wanted[at][p].rank:>8,} {self.wanted[at][p].p:>7.1%}   "
                )
                lines.append(f"  layer {layer:>3}  {there}{guesses}")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """A matplotlib figure: layers × positions, coloured by the probability of the token asked for, or of the first guess."""
        from matplotlib.figure import Figure

        values = [
            [
                self.top[at][p][0].p if self.wanted is None else self.wanted[at][p].p
                for p in range(len(self.positions))
            ]
            for at in range(len(self.layers))
        ]
        size = (min(40.0, 2.0 + 0.9 * len(self.positions)), 1.6 + 0.3 * len(self.layers))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        for at in range(len(self.layers)):
            for p in range(len(self.positions)):
                colour = "white" if values[at][p] > 0.6 else "black"
                axes.text(
                    p,
                    at,
                    drawable_token(self.top[at][p][0].token),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color=colour,
                )
        axes.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        axes.set_xticks(
            range(len(self.positions)),
            [drawable_token(self.tokens[t]) for t in self.positions],
            rotation=90,
            fontsize=7,
        )
        axes.set(xlabel="after token", ylabel="layer")
        shown = "first guess" if self.token is None else drawable_token(self.token)
        figure.colorbar(image, label=f"probability of {shown}")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: a row for each layer and position."""
        rows = []
        for at, layer in enumerate(self.layers):
            for p, position in enumerate(self.positions):
                row: dict[str, Any] = {"layer": layer, "position": position}
                row["top"] = [guess._asdict() for guess in self.top[at][p]]
                if self.wanted is not None:
                    row |= self.wanted[at][p]._asdict()
                rows.append(row)
        return {"tokens": list(self.tokens), "token": self.token, "rows": rows}


@torch.no_grad()
def logit_lens(
    model: TransformerBridge,
    text: str,
    *,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    token: str | int | None = None,
    k: int = 5,
) -> LogitLens:
    """What each layer would say next.

    positions: after which tokens (BOS is 0, −1 the last); all by default. layers: from 0 to n_layers; all by default.
    token: also give the rank and probability of this one. k: how many guesses to keep.

    Raises `InvalidInput` for an empty text, one longer than the context, positions, layers or a token that are not there.
    """
    ids = text_ids(model, text)
    n_layers = int(model.cfg.n_layers)
    at_positions = [
        check_position(t, len(ids)) for t in (range(len(ids)) if positions is None else positions)
    ]
    at_layers = list(range(n_layers + 1) if layers is None else layers)
    if wrong := [layer for layer in at_layers if layer not in range(n_layers + 1)]:
        raise InvalidInput(
            f"layers: {wrong}; {model.cfg.model_name} has layers 0 (before the first block) to {n_layers} (its output)"
        )
    if not at_positions or not at_layers:
        raise InvalidInput("logit_lens: expected at least one position and one layer")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= model.cfg.d_vocab:
        raise InvalidInput(f"k: expected a whole number from 1 to {model.cfg.d_vocab}, got {k!r}")
    asked = None if token is None else token_id(model, token)

    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    _, cache = model.run_with_cache(
        ids[None].to(model.cfg.device),
        names_filter=[*streams, f"blocks.{n_layers - 1}.hook_resid_post"],
    )
    stack = cache.accumulated_resid(apply_ln=True, pos_slice=at_positions)
    assert isinstance(stack, Tensor)  # [n_layers + 1, 1, P, D]
    top, wanted = [], []
    for layer in at_layers:
        p = _logits(model, stack[layer])[0].softmax(-1)  # [P, V]
        best = p.topk(k, dim=-1)
        names = token_strings(model.tokenizer, best.indices.flatten().tolist())
        top.append(
            tuple(
                tuple(
                    Guess(*g)
                    for g in zip(names[row * k : (row + 1) * k], best.values[row].tolist(), strict=True)
                )
                for row in range(len(p))
            )
        )
        if asked is not None:
            mine = p[:, asked]
            ranks = (p > mine[:, None]).sum(-1)
            wanted.append(tuple(Wanted(*w) for w in zip(ranks.tolist(), mine.tolist(), strict=True)))
    return LogitLens(
        tokens=tuple(token_strings(model.tokenizer, ids.tolist())),
        positions=tuple(at_positions),
        layers=tuple(at_layers),
        top=tuple(top),
        token=None if asked is None else token_strings(model.tokenizer, [asked])[0],
        wanted=tuple(wanted) if asked is not None else None,
    )


def _logits(model: TransformerBridge, normalised: Tensor) -> Tensor:
    """Logits [.., V] float32 of streams [.., D] that went through the final norm."""
    logits = model.unembed(normalised).float()
    cap = soft_cap(model)
    return logits if cap is None else cap * (logits / cap).tanh()


def soft_cap(model: TransformerBridge) -> float | None:
    """The c of a model whose logits are c · tanh(logits / c), as Gemma 2's are. The unembedding's own output is before it."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None
