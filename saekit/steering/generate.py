"""Continuing prompts: cached, batched, sampled from a seed for each row, streamed, with chat templates.

The Hugging Face model under the bridge runs step by step on its own cache, without the bridge's components where nobody listens
(`unwrapped`) and with kernels for the few rows of a step (`few_rows`); edits that are on are on here too. Sampling is greedy search
over logits with Gumbel noise added (Gumbel 1954; argmax(log p + g) draws from p), so that each row of a batch draws from a
generator of its own: row i of a batch is what its prompt and seed give alone, and the global generator is left as it was.

N prompts of T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.steering.few_rows import FewRows
from saekit.unwrapped import unwrapped

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Said = str | Sequence[Mapping[str, str]]  # a text, or a chat's messages: {"role": …, "content": …}
Prompt = Said | Tensor  # or ids [T]


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

    prompts: texts; lists of chat messages, which go through the tokenizer's chat template; or ids [T], taken as they are.
    seed: of row 0, and one more for each further row; or one for each row. temperature: 0 is greedy.
    Raises `InvalidInput` for an empty prompt, one that leaves no room in the context, a chat without a template, or
    sampling options out of range.
    """
    ids = [prompt_ids(model, prompt, max_new_tokens) for prompt in prompts]
    sampler = _Sampler(_seeds(seed, len(ids)), temperature, top_p, top_k)
    rows = _Rows(model, ids, sampler, stop_at_eos=stop_at_eos, cached=cached)
    with unwrapped(model), rows.products:
        while not rows.ended and rows.made < max_new_tokens:
            rows.step()
    return [_told(model, row, prompt) for row, prompt in zip(rows.ids(), ids, strict=True)]


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
    """The continuation in pieces, as they come; together the text that `generate` gives."""
    rows = stream_rows(
        model, [prompt], max_new_tokens, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k,
        stop_at_eos=stop_at_eos,
    )  # fmt: skip
    return (piece for (piece,) in rows if piece)


def stream_rows(
    model: TransformerBridge,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 20,
    *,
    seed: int | Sequence[int] = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    stop_at_eos: bool = True,
) -> Generator[list[str], None, list[Generated]]:
    """`generate`, a step at a time: what each row's text grows by, `""` where a character is not whole yet or the row has ended.

    What `generate` gives is the generator's own value, at its end. Prompts and options are checked at the call; a loop that is left stops generating.
    """
    ids = [prompt_ids(model, prompt, max_new_tokens) for prompt in prompts]
    sampler = _Sampler(_seeds(seed, len(ids)), temperature, top_p, top_k)
    rows = _Rows(model, ids, sampler, stop_at_eos=stop_at_eos, cached=True)
    texts = [_Growing(model, row) for row in ids]

    def steps() -> Generator[list[str], None, list[Generated]]:
        while not rows.ended and rows.made < max_new_tokens:
            # step by step: between two of them the model is everybody's
            with unwrapped(model), rows.products:
                rows.step()
            last = rows.ended or rows.made == max_new_tokens
            yield [text.grown(row, last=last) for text, row in zip(texts, rows.ids(), strict=True)]
        return [_told(model, row, prompt) for row, prompt in zip(rows.ids(), ids, strict=True)]

    return steps()


def _seeds(seed: int | Sequence[int], n: int) -> list[int]:
    seeds = [seed + i for i in range(n)] if isinstance(seed, int) else list(seed)
    if len(seeds) != n or not n:
        raise InvalidInput(
            f"generate: {len(seeds)} seeds for {n} prompts; expected one for each, and a prompt"
        )
    return seeds


def prompt_ids(model: TransformerBridge, prompt: Prompt, max_new_tokens: int) -> Tensor:
    """The prompt's ids [T] with BOS, if there is room for the new tokens."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidInput(f"max_new_tokens: expected a whole number from 1, got {max_new_tokens!r}")
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidInput("prompt: expected a text, got ''")
        ids = model.to_tokens(prompt, truncate=False)[0]
    elif isinstance(prompt, Tensor):
        vocabulary = model.cfg.d_vocab
        if prompt.dtype != torch.int64 or prompt.ndim != 1 or not len(prompt):
            raise InvalidInput(f"prompt: expected ids [T], int64, got {prompt.dtype} {list(prompt.shape)}")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
            raise InvalidInput(
                f"prompt: ids from 0 to {vocabulary - 1} expected, got {int(prompt.min())} to {int(prompt.max())}"
            )
        ids = prompt.to(model.cfg.device)
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
    """Temperature, top-k, top-p, and each row's own Gumbel noise."""

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

    def __call__(self, logits: Tensor) -> Tensor:
        """Of logits [N, V], those whose greatest is the token drawn."""
        if self._temperature == 0:
            return logits
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        logits, ids = logits.float() / self._temperature, torch.empty(0)  # ids: asked for, never read
        if self._top_k is not None:
            logits = TopKLogitsWarper(self._top_k)(ids, logits)
        if self._top_p is not None:
            logits = TopPLogitsWarper(self._top_p)(ids, logits)
        waits = torch.stack(
            [torch.empty(logits.shape[1]).exponential_(generator=draw) for draw in self._draws]
        )
        return logits - waits.log().to(logits.device)  # −log of an exponential is Gumbel


class _Rows:
    """Texts of one batch, each a token longer at every step until it ends."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: Sequence[Tensor],
        sampler: _Sampler,
        *,
        stop_at_eos: bool,
        cached: bool,
    ) -> None:
        self._model: Any = model.original_model
        self.products = FewRows(self._model)  # to be open around steps
        self._sampler, self._cached = sampler, cached
        self._takes = inspect.signature(self._model.forward).parameters
        tokenizer, longest = model.tokenizer, max(map(len, prompts))
        self._stops = _stops(model) if stop_at_eos else set()
        self._pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        text = torch.full((len(prompts), longest), self._pad, device=model.cfg.device)
        mask = torch.zeros_like(text)
        for row, prompt in enumerate(prompts):
            text[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        self._prompts, self._past = prompts, None
        self._new = [text]  # what the model has yet to read, and then what it has drawn, [N, 1] each
        self._mask = None if bool(mask.all()) else mask  # a batch without padding needs none
        self._made: list[list[int]] = [[] for _ in prompts]
        self._on = [True for _ in prompts]
        self.made = 0

    @property
    def ended(self) -> bool:
        return not any(self._on)

    @torch.inference_mode()  # as TransformerLens generates
    def step(self) -> None:
        from saekit.steering.cache import roomy  # here: it brings transformers

        inputs: dict[str, Any] = {"input_ids": self._new[-1], "use_cache": self._cached}
        if self._past is None:
            inputs["input_ids"] = torch.cat(self._new, 1)
        else:
            inputs["past_key_values"] = self._past
        if self._mask is not None:
            inputs["attention_mask"] = self._mask
            if "position_ids" in self._takes:
                position = (self._mask.cumsum(1) - 1).clamp_min(0)
                inputs["position_ids"] = position[:, -inputs["input_ids"].shape[1] :]
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1
        out = self._model(**inputs)
        if self._cached and self._past is None:
            # a model without one reads it all again
            self._past = roomy(getattr(out, "past_key_values", None))
        new = self._sampler(out.logits[:, -1]).argmax(-1)
        for row, drawn in enumerate(new.tolist()):
            if self._on[row]:
                self._made[row].append(drawn)
                self._on[row] = drawn not in self._stops
        self._new.append(new[:, None])  # what an ended row goes on with is nobody's
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        self.made += 1

    def ids(self) -> list[Tensor]:
        """Each prompt's ids and the new ones up to its end, on the CPU."""
        return [
            torch.cat([p.cpu(), torch.tensor(new, dtype=torch.int64)])
            for p, new in zip(self._prompts, self._made, strict=True)
        ]


def _stops(model: TransformerBridge) -> set[int]:
    """Tokens that end a text: the tokenizer's EOS, and what the model's own settings name besides (a chat's end of turn)."""
    settings: Any = getattr(model.original_model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    found = [model.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return {int(i) for i in found if i is not None}


class _Growing:
    """A continuation's text as far as it is certain: a character of several tokens waits for the last."""

    def __init__(self, model: TransformerBridge, prompt: Tensor) -> None:
        self._decode = model.tokenizer.decode
        self._before = len(self._decode(prompt, skip_special_tokens=True))
        self._told = ""

    def grown(self, ids: Tensor, *, last: bool) -> str:
        text = self._decode(ids, skip_special_tokens=True)[self._before :]
        if text.endswith("\ufffd") and not last:
            return ""
        piece, self._told = text[len(self._told) :], text
        return piece


def _told(model: TransformerBridge, ids: Tensor, prompt: Tensor) -> Generated:
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    before = model.tokenizer.decode(prompt, skip_special_tokens=True)
    return Generated(text, text[len(before) :], ids, len(prompt))
