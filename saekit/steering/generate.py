"""Continuing prompts: cached, batched, sampled from a seed for each row, streamed, with chat templates.

Hugging Face's `generate` does the work, on the model under the bridge, so edits that are on are on here too. Sampling is
its greedy search over logits with Gumbel noise added (Gumbel 1954; argmax(log p + g) draws from p), so that each row of a batch draws
from a generator of its own: row i of a batch is what its prompt and seed give alone, and the global generator is left as it was.

N prompts of T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Prompt = str | Sequence[Mapping[str, str]]  # a text, or a chat's messages: {"role": …, "content": …}


@dataclass(frozen=True)
class Generated:
    """A prompt and what the model made of it."""

    text: str  # prompt and continuation
    continuation: str
    ids: Tensor = field(repr=False)  # [prompt_length + new] int64, on the CPU
    prompt_length: int  # tokens, BOS included

    def __str__(self) -> str:
        return self.text


def generate(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 20,
    *,
    seed: int | Sequence[int] = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop_at_eos: bool = True,
    cached: bool = True,
) -> list[Generated]:
    """Continue each prompt.

    prompts: texts, or lists of chat messages, which go through the tokenizer's chat template.
    seed: of row 0, and one more for each further row; or one for each row. temperature: 0 is greedy.
    Raises `InvalidInput` for an empty prompt, one that leaves no room in the context, a chat without a template, or
    sampling options out of range.
    """
    ids = [prompt_ids(model, prompt, max_new_tokens) for prompt in prompts]
    seeds = [seed + i for i in range(len(ids))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(ids) or not ids:
        raise InvalidInput(
            f"generate: {len(seeds)} seeds for {len(ids)} prompts; expected one for each, and a prompt"
        )
    noise = _Sampler(seeds, temperature, top_p, top_k)
    rows = _run(model, ids, max_new_tokens, noise, stop_at_eos=stop_at_eos, cached=cached)
    return [_told(model, row, prompt) for row, prompt in zip(rows, ids, strict=True)]


def stream(
    model: TransformerBridge,
    prompt: Prompt,
    max_new_tokens: int = 20,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop_at_eos: bool = True,
) -> Iterator[str]:
    """The continuation in pieces, as they come; together the text that `generate` gives. A loop that is left stops it."""
    from transformers import TextIteratorStreamer

    ids = prompt_ids(model, prompt, max_new_tokens)
    sampler = _Sampler([seed], temperature, top_p, top_k)
    pieces = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left, failed = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            _run(model, [ids], max_new_tokens, sampler, stop_at_eos=stop_at_eos, streamer=pieces, left=left)
        except BaseException as error:  # told where the pieces are read
            failed.append(error)
        finally:
            pieces.end()

    def read() -> Iterator[str]:
        worker = threading.Thread(target=work, name="saekit-stream", daemon=True)
        worker.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            left.set()
            worker.join()
        if failed:
            raise failed[0]

    return read()


def prompt_ids(model: TransformerBridge, prompt: Prompt, max_new_tokens: int) -> Tensor:
    """The prompt's ids [T] with BOS, if there is room for the new tokens."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidInput(f"max_new_tokens: expected a whole number from 1, got {max_new_tokens!r}")
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidInput("prompt: expected a text, got ''")
        ids = model.to_tokens(prompt, truncate=False)[0]
    else:
        ids = torch.tensor(_chat_ids(model, prompt), device=model.cfg.device)
    if len(ids) + max_new_tokens > model.cfg.n_ctx:
        raise InvalidInput(
            f"prompt: {len(ids)} tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.cfg.n_ctx}; shorten the prompt or lower max_new_tokens"
        )
    return ids


def _chat_ids(model: TransformerBridge, messages: Any) -> list[int]:
    fits = (
        isinstance(messages, Sequence)
        and messages
        and all(isinstance(m, Mapping) and set(m) == {"role", "content"} for m in messages)
    )
    if not fits:
        raise InvalidInput(
            f"prompt: expected a text or chat messages with role and content, got {messages!r:.200}"
        )
    if not getattr(model.tokenizer, "chat_template", None):
        raise InvalidInput(
            f"prompt: the tokenizer of {model.cfg.model_name} has no chat template; give a text"
        )
    text = model.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


class _Sampler:
    """A logits processor: temperature, top-k, top-p, and each row's own Gumbel noise."""

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float | None, top_k: int | None
    ) -> None:
        if not temperature >= 0:
            raise InvalidInput(f"temperature: expected a number from 0 (greedy), got {temperature!r}")
        if top_p is not None and not 0 < top_p <= 1:
            raise InvalidInput(f"top_p: expected a share in (0, 1], got {top_p!r}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise InvalidInput(f"top_k: expected a whole number from 1, got {top_k!r}")
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Of logits [N, V], those whose greatest is the token drawn."""
        if self._temperature == 0:
            return logits
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        logits = logits.float() / self._temperature
        if self._top_k is not None:
            logits = TopKLogitsWarper(self._top_k)(ids, logits)
        if self._top_p is not None:
            logits = TopPLogitsWarper(self._top_p)(ids, logits)
        waits = torch.stack(
            [torch.empty(logits.shape[1]).exponential_(generator=draw) for draw in self._draws]
        )
        return logits - waits.log().to(logits.device)  # −log of an exponential is Gumbel


class _Left:
    """A stopping criterion: nobody reads on."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), self._event.is_set(), device=ids.device)


def _run(
    model: TransformerBridge,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    sampler: _Sampler,
    *,
    stop_at_eos: bool = True,
    cached: bool = True,
    streamer: Any = None,
    left: threading.Event | None = None,
) -> list[Tensor]:
    """Each prompt's ids and the new ones, without padding."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    tokenizer = model.tokenizer
    eos = tokenizer.eos_token_id if stop_at_eos else None
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, device=model.cfg.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    underneath: Any = model.original_model
    made = underneath.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=eos,
            use_cache=cached,
        ),
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([_Left(left)] if left else []),
        streamer=streamer,
    ).cpu()
    rows = []
    for row, prompt in enumerate(prompts):
        new = made[row, longest:]
        ends = (new == eos).nonzero() if eos is not None else new.new_zeros(0, 1)
        new = new[: int(ends[0]) + 1] if len(ends) else new
        rows.append(torch.cat([prompt.cpu(), new]))
    return rows


def _told(model: TransformerBridge, ids: Tensor, prompt: Tensor) -> Generated:
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    before = model.tokenizer.decode(prompt, skip_special_tokens=True)
    return Generated(text, text[len(before) :], ids, len(prompt))
