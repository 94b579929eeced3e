"""Which token of which row a forward is looking at, in prompts, cached steps and uncached ones alike.

A forward of the underlying model shows its ids, its attention mask and how much a KV cache holds. From these
follow the absolute position of every token (counted over a row's real tokens, so padding on either side does not
shift anything) and the length of the prompt: a forward that extends the last one, by cached tokens or uncached by one
token per row, goes on generating; any other one is a new prompt. Beams may change rows on the way.

N rows, T tokens in this forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
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


class Look:
    """What one forward looks at."""

    def __init__(
        self,
        ids: Tensor,
        position: Tensor,
        prompt_length: Tensor,
        prompt: int,
        start: int,
        columns: int,
        *,
        is_padded: bool,
    ) -> None:
        self.ids = ids  # [N, T]
        self.position = position  # [N, T] counted over each row's real tokens; −1 on padding
        self._is_padded = is_padded  # or may be
        self.prompt_length = prompt_length  # [N, 1] real tokens of the prompt
        self.prompt = prompt  # the how manieth prompt this is, or goes on with
        self._past_prompt = start >= columns  # all of its columns come after the prompt's
        self._in_prompt = start + ids.shape[1] <= columns
        self._masks: dict[Any, Tensor | None] = {}

    def mask(self, positions: Positions, special: Sequence[int] = ()) -> Tensor | None:
        """[N, T] bool: the tokens that `positions` means, or None where it can be told without looking that there are
        none. Named positions leave the special ids out; explicit ones mean what they say."""
        key = positions if isinstance(positions, str) else tuple(positions), tuple(special)
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def _mask(self, positions: Where | tuple[int, ...], special: tuple[int, ...]) -> Tensor | None:
        if not isinstance(positions, str):
            return _among(self.position, positions)
        if (positions == "prompt" and self._past_prompt) or (positions == "generated" and self._in_prompt):
            return None
        wanted = [self.position >= 0] if self._is_padded else []
        if positions == "prompt":
            wanted.append(self.position < self.prompt_length)
        elif positions == "generated" and not self._past_prompt:
            wanted.append(self.position >= self.prompt_length)
        elif positions == "last_prompt" and not self._past_prompt:
            wanted.append(self.position >= self.prompt_length - 1)
        if special:
            wanted.append(_among(self.ids, special).logical_not())
        if not wanted:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return functools.reduce(torch.logical_and, wanted)


def _among(values: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Whether each value is one of a few: a comparison with each, quicker than `torch.isin`."""
    if len(wanted) == 1:
        return values == wanted[0]
    return (values[..., None] == _on_device(wanted, values.device)).any(-1)


@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers where they are needed: to bring them there at each step would wait for a GPU."""
    return torch.tensor(numbers, dtype=torch.long, device=device)


class Tracker:
    """Watches the forwards of one model; `look` is the current one."""

    look: Look

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # of the last forward that brought its whole text [N, total]
        self._total = 0  # columns so far: padding, prompt and what was generated
        self._columns = 0  # the prompt's
        self._prompt = 0
        self._prompt_length: Tensor | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise InvalidInput("steer: the model was called without token ids, so positions cannot be told")
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        total = start + ids.shape[1]
        goes_on = self._goes_on_cached(ids, start) if start else self._goes_on(ids)
        position, real, is_padded = self._positions(ids, start, total, kwargs)
        if not goes_on or self._prompt_length is None:
            self._columns, self._prompt_length = total, real
            self._prompt += 1
        self._ids, self._total = (None if start else ids), total
        self.look = Look(
            ids, position, self._prompt_length, self._prompt, start, self._columns, is_padded=is_padded
        )

    def _positions(
        self, ids: Tensor, start: int, total: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, bool]:
        """[N, T] positions over the real tokens, [N, 1] how many real tokens there are by now, and whether any may be padding."""
        attention, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(attention, Tensor) and attention.ndim == 2 and attention.shape[1] >= total:
            real = attention[:, :total].to(ids.device, torch.bool)
            counted = real.cumsum(1)
            return torch.where(real, counted - 1, -1)[:, start:], counted[:, -1:], True
        if attention is not None and isinstance(given, Tensor) and given.shape == ids.shape:
            # a mask of another form: what is missing in the last position is padding on the left
            counted = given[:, -1:].to(ids.device) + 1
            columns = torch.arange(start - total, 0, device=ids.device)
            return (columns + counted).clamp_min(-1), counted, True
        position = torch.arange(start, total, device=ids.device).expand(len(ids), -1)
        return position, position[:, -1:] + 1, False

    def _goes_on_cached(self, ids: Tensor, start: int) -> bool:
        """A step on a cache that holds the text so far (or less of it: drafted tokens may have been rejected)."""
        length = self._prompt_length
        return length is not None and len(length) == len(ids) and self._columns <= start <= self._total

    def _goes_on(self, ids: Tensor) -> bool:
        """An uncached step: each row is a row so far, its own or another beam's, and one token more."""
        before = self._ids
        return (
            before is not None
            and ids.shape == (len(before), before.shape[1] + 1)
            and (
                torch.equal(ids[:, :-1], before)
                or bool((ids[:, None, :-1] == before[None]).all(-1).any(1).all())
            )
        )


@contextlib.contextmanager
def tracking(model: TransformerBridge, tracker: Tracker) -> Iterator[None]:
    """While open, the tracker sees each forward of the model before its sites do."""
    handle = model.original_model.register_forward_pre_hook(tracker, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
