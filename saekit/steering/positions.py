"""Which token of which row a forward is looking at, in prompts, cached steps and uncached ones alike.

A forward of the underlying model shows its ids, its attention mask and how much a KV cache holds. From these
follow the absolute position of every token (counted from a row's first real token, so left padding does not
shift anything) and the length of the prompt: a forward that extends the last one by a token per row, cached or
not, goes on generating; any other one is a new prompt.

N rows, T tokens in this forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Where = Literal["all", "prompt", "generated", "last_prompt"]
Positions = Where | Sequence[int]


def check_positions(positions: Any) -> Positions:
    """The positions, or `InvalidInput` that lists what they can be."""
    if isinstance(positions, str):
        if positions in ("all", "prompt", "generated", "last_prompt"):
            return positions  # type: ignore[return-value]
    elif isinstance(positions, Sequence) and all(
        isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in positions
    ):
        return list(positions)
    raise InvalidInput(
        f"positions: {positions!r}; expected 'all', 'prompt', 'generated', 'last_prompt' or a list of "
        "positions from 0"
    )


@dataclass(frozen=True)
class Look:
    """What one forward looks at."""

    ids: Tensor  # [N, T]
    position: Tensor  # [N, T] counted from each row's first real token; negative on padding
    prompt_length: Tensor  # [N, 1] real tokens of the prompt

    def mask(self, positions: Positions, special: Sequence[int], include_special: bool) -> Tensor:
        """[N, T] bool: the tokens that `positions` means."""
        if positions == "all":
            chosen = torch.ones_like(self.position, dtype=torch.bool)
        elif positions == "prompt":
            chosen = self.position < self.prompt_length
        elif positions == "generated":
            chosen = self.position >= self.prompt_length
        elif positions == "last_prompt":
            chosen = self.position >= self.prompt_length - 1
        else:
            chosen = torch.isin(self.position, torch.tensor(list(positions), device=self.position.device))
        chosen = chosen & (self.position >= 0)
        if include_special or not isinstance(positions, str):
            return chosen
        return chosen & ~torch.isin(self.ids, torch.tensor(list(special), device=self.ids.device))


class Tracker:
    """Watches the forwards of one model; `look` is the current one."""

    look: Look

    def __init__(self) -> None:
        self._seen: Tensor | None = None  # ids of the text so far [N, so far]
        self._prompt = 0  # its prompt's length, padding included

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise InvalidInput("steer: the model was called without token ids, so positions cannot be told")
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        before = self._seen
        if past and before is not None and before.shape[0] == ids.shape[0] and before.shape[1] >= past:
            text = torch.cat([before[:, :past], ids], 1)
        else:
            text = ids
            if not self._goes_on(ids):
                self._prompt = ids.shape[1]
        self._seen = text
        attention = kwargs.get("attention_mask")
        if isinstance(attention, Tensor) and attention.ndim == 2 and attention.shape[1] >= text.shape[1]:
            padding = (attention[:, : text.shape[1]].cumsum(1) == 0).sum(1, keepdim=True)
        else:
            padding = torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device)
        start = text.shape[1] - ids.shape[1]
        columns = torch.arange(start, text.shape[1], device=ids.device)
        self.look = Look(ids, columns[None, :] - padding, self._prompt - padding)

    def _goes_on(self, ids: Tensor) -> bool:
        """An uncached step of a generation: the text so far and one token more."""
        before = self._seen
        return (
            before is not None
            and ids.shape[0] == before.shape[0]
            and ids.shape[1] == before.shape[1] + 1
            and torch.equal(ids[:, :-1], before)
        )


@contextlib.contextmanager
def tracking(model: TransformerBridge) -> Iterator[Tracker]:
    """A `Tracker` that sees each forward of the model before its sites do."""
    tracker = Tracker()
    handle = model.original_model.register_forward_pre_hook(tracker, with_kwargs=True)
    try:
        yield tracker
    finally:
        handle.remove()
