"""A local `transformers` causal language model that answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from saekit.catalog.explain.answers import Answer, Keep, Prompt, clean, number, places
from saekit.errors import InvalidInput, first_line
from saekit.lm import DTYPES, fast_dtype, locate, quiet_loading


class Local:
    """A causal language model of this machine: `"tiny"`, a Hugging Face folder, or a hub id. It answers greedily.

    A model that was tuned to answer gets its own chat template, another the bare prompt. A prompt that does not fit into
    the model's context loses its beginning, and `cut` counts it. Raises `FileMissing` and `InvalidInput` for what is no model.
    """

    def __init__(self, name: str | Path, *, device: str | None = None, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidInput(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
        self._place = locate(name)
        self.model = Path(name).name if isinstance(self._place, Path) else str(name)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = DTYPES[dtype] if dtype else fast_dtype(self._device)
        self.cut = 0

    def __repr__(self) -> str:
        return f"Local({self.model!r})"

    @torch.inference_mode()
    def ask(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        for prompt in prompts:
            keep(prompt, self._answer(prompt))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(model, tokenizer)"""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            with quiet_loading():
                tokenizer = AutoTokenizer.from_pretrained(self._place)
                model: Any = AutoModelForCausalLM.from_pretrained(self._place, dtype=self._dtype)
        except Exception as error:  # hub, config and weight files fail in a dozen ways of their own
            raise InvalidInput(f"model {self.model!r} could not be loaded: {first_line(error)}") from error
        return model.to(self._device).eval(), tokenizer

    @cached_property
    def _numbers(self) -> tuple[torch.Tensor, list[int]]:
        """Ids of the tokens that spell a number, and which."""
        model, tokenizer = self._loaded
        vocabulary = range(min(len(tokenizer), model.config.vocab_size))
        spelled = [(i, number(tokenizer.decode([i]))) for i in vocabulary]
        found = [(i, n) for i, n in spelled if n is not None]
        return torch.tensor([i for i, _ in found], device=self._device, dtype=torch.long), [
            n for _, n in found
        ]

    def _answer(self, prompt: Prompt) -> Answer:
        model, tokenizer = self._loaded
        ids = self._ids(prompt)
        new = prompt.max_tokens
        if limit := getattr(model.config, "max_position_embeddings", None):
            new = min(new, limit // 2)
            if len(ids) > limit - new:
                ids, self.cut = ids[len(ids) - (limit - new) :], self.cut + 1
        tokens = torch.tensor([ids], device=self._device)
        made = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=prompt.chances,
        )
        answered = made.sequences[0, len(ids) :].tolist()
        text = clean(tokenizer.decode(answered, skip_special_tokens=True))
        if not text.strip():
            return Answer("", error="an empty answer")
        return Answer(text, self._places(text, answered, made.logits) if prompt.chances else None)

    def _ids(self, prompt: Prompt) -> list[int]:
        _, tokenizer = self._loaded
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt.text}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return list(tokenizer(f"{prompt.text}\n\nAnswer:\n", verbose=False)["input_ids"])

    def _places(self, text: str, ids: list[int], logits: Sequence[torch.Tensor]) -> Any:
        _, tokenizer = self._loaded
        which, numbers = self._numbers
        lengths = [len(tokenizer.decode(ids[:i], skip_special_tokens=True)) for i in range(len(ids) + 1)]
        pieces = []
        for i, row in enumerate(logits):
            chances: dict[int, float] = {}
            for n, p in zip(numbers, row[0].float().softmax(-1)[which].tolist(), strict=True):
                chances[n] = chances.get(n, 0.0) + p
            pieces.append((lengths[i], lengths[i + 1], chances))
        return places(text, pieces)
