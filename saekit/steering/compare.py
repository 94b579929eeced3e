"""The same prompt continued plainly and steered, from one seed, with the probabilities that moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import token_strings
from saekit.steering.edits import Edit
from saekit.steering.positions import Positions
from saekit.steering.steer import steer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

TOP = 10


@dataclass(frozen=True)
class Comparison:
    """Plain and steered text beside each other."""

    prompt: str
    edits: tuple[Edit, ...]
    plain: str  # prompt and continuation
    steered: str  # prompt and continuation
    kl: float  # KL(steered ‖ plain) of the token after the prompt, nats
    top_tokens: list[tuple[str, float, float]]  # (token, p plain, p steered), largest |difference| first
    p_plain: Tensor = field(repr=False)  # [V] next-token probabilities after the prompt
    p_steered: Tensor = field(repr=False)  # [V]

    def __str__(self) -> str:
        moved = "\n".join(f"  {token!r:<16} {a:7.2%} → {b:7.2%}" for token, a, b in self.top_tokens)
        edits = "; ".join(str(edit) for edit in self.edits)
        return (
            f"plain    {self.plain!r}\nsteered  {self.steered!r}\n  {edits}, KL {self.kl:.2f} nats\n{moved}"
        )


def compare(
    model: TransformerBridge,
    prompt: str,
    edits: Edit | Sequence[Edit],
    *,
    max_new_tokens: int = 20,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    positions: Positions = "all",
) -> Comparison:
    """Continue a prompt plainly and with edits on.

    temperature: 0 is greedy. Both continuations draw from the same seed.
    Raises `InvalidInput` for an empty prompt, one that leaves no room in the context, or a negative temperature.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    ids = check_prompt(model, prompt, max_new_tokens)
    plain_p = next_token_probabilities(model, ids)
    plain = generate(model, prompt, max_new_tokens, seed=seed, temperature=temperature, top_p=top_p)
    with steer(model, edits, positions=positions):
        steered_p = next_token_probabilities(model, ids)
        steered = generate(model, prompt, max_new_tokens, seed=seed, temperature=temperature, top_p=top_p)
    moved = (steered_p - plain_p).abs().topk(min(TOP, len(plain_p))).indices.tolist()
    tokens = token_strings(model.tokenizer, moved)
    return Comparison(
        prompt=prompt,
        edits=edits,
        plain=plain,
        steered=steered,
        kl=float((steered_p * (steered_p.clamp_min(1e-30).log() - plain_p.clamp_min(1e-30).log())).sum()),
        top_tokens=[
            (token, float(plain_p[i]), float(steered_p[i])) for token, i in zip(tokens, moved, strict=True)
        ],
        p_plain=plain_p,
        p_steered=steered_p,
    )


def check_prompt(model: TransformerBridge, prompt: str, max_new_tokens: int) -> Tensor:
    """The prompt's ids [1, T] with BOS, if there is room for the new tokens."""
    if not isinstance(prompt, str) or not prompt:
        raise InvalidInput(f"prompt: expected a text, got {prompt!r}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidInput(f"max_new_tokens: expected a whole number from 1, got {max_new_tokens!r}")
    ids = model.to_tokens(prompt, truncate=False)
    if ids.shape[1] + max_new_tokens > model.cfg.n_ctx:
        raise InvalidInput(
            f"prompt: {ids.shape[1]} tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.cfg.n_ctx}; shorten the prompt or lower max_new_tokens"
        )
    return ids


@torch.no_grad()
def next_token_probabilities(model: TransformerBridge, ids: Tensor) -> Tensor:
    """[V] probabilities of the token after ids [1, T], float32 on the CPU."""
    return model(ids)[0, -1].float().softmax(-1).cpu()


def generate(
    model: TransformerBridge,
    prompt: str,
    max_new_tokens: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
) -> str:
    """Prompt and continuation. The seed rules the sampling, and the global generator is left as it was."""
    if not temperature >= 0:
        raise InvalidInput(f"temperature: expected a number from 0 (greedy), got {temperature!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = model.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=top_p,
            verbose=False,
        )
    assert isinstance(text, str)
    return text
