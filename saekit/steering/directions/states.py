"""Texts as states: the activation at a site at each text's last token, or its mean over the ordinary ones.

n texts, T tokens, D the site's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sites import capture

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Token = Literal["last", "mean"]
TOKENS_AT_ONCE = 4096  # in one forward, so that memory does not grow with the number of texts


def text_ids(model: TransformerBridge, text: str) -> Tensor:
    """[T] ids of a text as the model reads it, with BOS where it takes one. Never cut: a text that is too long is refused."""
    if not isinstance(text, str) or not text:
        given = "a prompt is empty" if text == "" else f"a prompt is {text!r:.60}"
        raise InvalidInput(f"{given}; expected a text such as ' Jedi'")
    ids = model.to_tokens(text, truncate=False)[0].cpu()
    if len(ids) > model.cfg.n_ctx:
        raise InvalidInput(
            f"text {text[:40]!r}… has {len(ids)} tokens, but {model.cfg.model_name} reads {model.cfg.n_ctx}; "
            "shorten it"
        )
    return ids


def check_texts(texts: Sequence[str], what: str) -> list[str]:
    """The texts as a list, of at least one."""
    if isinstance(texts, str) or not texts:
        raise InvalidInput(f"{what}: expected a list of texts, got {texts!r:.60}")
    return list(texts)


@torch.no_grad()
def states(model: TransformerBridge, texts: Sequence[str], site: str, token: Token = "last") -> Tensor:
    """[n, D] float32 on the CPU: each text's activation at its last token, or its mean without BOS, EOS and pad.

    Texts of like length share a forward. They are filled up on the right, where a causal model does not look, so a batch
    gives what its texts give alone.

    Raises `UnknownName` for a site the model lacks, `InvalidInput` for an empty text or one longer than the context.
    """
    if token not in ("last", "mean"):
        raise InvalidInput(f"token: {token!r}; expected 'last' or 'mean'")
    rows = [text_ids(model, text) for text in check_texts(texts, "texts")]
    special = torch.tensor(special_ids(model), dtype=torch.long)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for some in _batches([len(row) for row in rows]):
        ids = pad_sequence([rows[i] for i in some], batch_first=True)
        x = capture(model, [site], ids)[site].float().cpu()
        for i, here in zip(some, x, strict=True):
            row = rows[i]
            if token == "last":
                found[i] = here[len(row) - 1].clone()
            else:
                ordinary = ~torch.isin(row, special)
                if not ordinary.any():
                    raise InvalidInput(f"text {texts[i]!r:.60} has no ordinary token to take the mean of")
                found[i] = here[: len(row)][ordinary].mean(0)
    return torch.stack(found)


def _batches(lengths: list[int]) -> list[list[int]]:
    """Texts by length, as many at once as fit `TOKENS_AT_ONCE` when filled up to the longest."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= TOKENS_AT_ONCE:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
