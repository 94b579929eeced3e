"""The same prompt continued plainly and steered, from one seed, with the probabilities that moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.lm import special_ids, token_strings
from saekit.steering.edits import Edit
from saekit.steering.generate import Generated, Prompt, Said, generate, prompt_ids
from saekit.steering.judging import kl_parts, token_log_probs
from saekit.steering.positions import Positions
from saekit.steering.steer import steer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from transformer_lens.model_bridge import TransformerBridge

TOP = 10


class Odds(NamedTuple):
    """A token of a text, and its log-probability in nats under both models, given what is before it."""

    token: str
    plain: float
    steered: float


@dataclass(frozen=True)
class Comparison:
    """Plain and steered text beside each other."""

    prompt: Said  # of ids: the text they stand for
    edits: tuple[Edit, ...]
    plain: str  # prompt and continuation
    steered: str  # prompt and continuation
    kl: float  # KL(steered ‖ plain) of the token after the prompt, nats
    top_tokens: list[tuple[str, float, float]]  # (token, p plain, p steered), largest |difference| first
    kl_tokens: list[tuple[str, float]]  # (token, its summand of the KL in nats), largest |summand| first
    plain_odds: list[Odds]  # the plain continuation, token by token
    steered_odds: list[Odds]  # the steered one
    p_plain: Tensor = field(repr=False)  # [V] next-token probabilities after the prompt
    p_steered: Tensor = field(repr=False)  # [V]

    @property
    def perplexity(self) -> float:
        """Of the steered continuation under the plain model: how strange the plain model finds it."""
        losses = [-odds.plain for odds in self.steered_odds]
        return float(torch.tensor(losses).mean().exp()) if losses else 1.0

    def _repr_html_(self) -> str:
        from saekit.display.comparison import comparison_html

        return comparison_html(self)

    def __rich__(self) -> RenderableType:
        from saekit.display.comparison import comparison_text

        return comparison_text(self)

    def _repr_pretty_(self, p: Any, cycle: bool) -> None:
        """IPython's: coloured in a terminal, as `print` has it elsewhere."""
        from saekit.display.terminal import pretty

        pretty(self, p)

    def figure(self) -> Figure:
        """A matplotlib figure: the probabilities that moved, and the log-probability of every token of both texts."""
        from saekit.steering.figures import comparison_figure

        return comparison_figure(self)

    def __str__(self) -> str:
        """Plain text, whose control characters and bidi overrides are escapes."""
        from saekit.lens.tokens import visible

        moved = "\n".join(f"  {token!r:<16} {a:7.2%} → {b:7.2%}" for token, a, b in self.top_tokens)
        edits = "; ".join(str(edit) for edit in self.edits)
        return visible(
            f"plain    {self.plain!r}\nsteered  {self.steered!r}\n  {edits}, KL {self.kl:.2f} nats\n{moved}"
        )


def compare(
    model: TransformerBridge,
    prompt: Prompt,
    edits: Edit | Sequence[Edit],
    *,
    max_new_tokens: int = 20,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    positions: Positions = "all",
) -> Comparison:
    """Continue a prompt, or a chat, plainly and with edits on; what is not said of the options is as `generate` has it.

    Both continuations draw from the same seed.
    Raises `InvalidInput` for an empty prompt, one that leaves no room in the context, or a negative temperature.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    ids = prompt_ids(model, prompt, max_new_tokens)
    options = {"seed": seed, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    plain_p = next_token_probabilities(model, ids[None])[0]
    (plain,) = generate(model, [prompt], max_new_tokens, **options)  # type: ignore[arg-type]
    with steer(model, edits, positions=positions):
        steered_p = next_token_probabilities(model, ids[None])[0]
        (steered,) = generate(model, [prompt], max_new_tokens, **options)  # type: ignore[arg-type]
    parts = kl_parts(steered_p, plain_p)
    return Comparison(
        prompt=model.tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(prompt, Tensor)
        else prompt,
        edits=edits,
        plain=plain.text,
        steered=steered.text,
        kl=float(parts.sum()),
        top_tokens=[
            (token, float(plain_p[i]), float(steered_p[i])) for token, i in _top(model, steered_p - plain_p)
        ],
        kl_tokens=[(token, float(parts[i])) for token, i in _top(model, parts)],
        plain_odds=_odds(model, plain, edits, positions),
        steered_odds=_odds(model, steered, edits, positions),
        p_plain=plain_p,
        p_steered=steered_p,
    )


def _top(model: TransformerBridge, of: Tensor) -> list[tuple[str, int]]:
    """(token, id) of the largest |values| of [V]."""
    ids = of.abs().topk(min(TOP, len(of))).indices.tolist()
    return list(zip(token_strings(model.tokenizer, ids), ids, strict=True))


@torch.no_grad()
@torch.no_grad()
def next_token_probabilities(model: TransformerBridge, ids: Tensor) -> Tensor:
    """[N, V] probabilities of the token after ids [N, T], float32 on the CPU."""
    return model(ids)[:, -1].float().softmax(-1).cpu()


def _odds(
    model: TransformerBridge, made: Generated, edits: Sequence[Edit], positions: Positions
) -> list[Odds]:
    """The continuation's tokens under both models, each read in one forward."""
    n, ids = made.prompt_length, made.ids.to(model.cfg.device)
    plain = token_log_probs(model, ids)[n - 1 :].tolist()
    with steer(model, edits, positions=spelled(positions, made.ids, n, special_ids(model))):
        steered = token_log_probs(model, ids)[n - 1 :].tolist()
    tokens = token_strings(model.tokenizer, made.ids[n:].tolist())
    return [Odds(*each) for each in zip(tokens, plain, steered, strict=True)]


def spelled(positions: Positions, ids: Tensor, prompt_length: int, special: Sequence[int]) -> Positions:
    """The positions that a name means in a text [T] whose prompt has a known length, for a forward over all of it."""
    if positions == "all" or not isinstance(positions, str):
        return positions
    first = {"prompt": 0, "generated": prompt_length, "last_prompt": prompt_length - 1}[positions]
    last = prompt_length if positions == "prompt" else len(ids)
    return [i for i in range(first, last) if int(ids[i]) not in special]
