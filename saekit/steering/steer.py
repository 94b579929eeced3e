"""Put edits on a model for the length of a `with` block, and take them off again whatever happens.

    with saekit.steer(model, feature.add(8.0)):
        model.generate("Mike pulls out his")
    with saekit.edited(model, feature.add(8.0)) as hf:          the Hugging Face model underneath
        hf.generate(**tokenizer("Mike pulls out his", return_tensors="pt"))

Both are the same hooks (`plan`, `sites.editing`): the bridge runs the Hugging Face model, so what steers one steers the
other, in `generate` with or without a cache, padded, sampled or with beams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from saekit.errors import InvalidInput
from saekit.lm import token_strings
from saekit.sites import editing
from saekit.steering.edits import Edit
from saekit.steering.plan import Plan
from saekit.steering.positions import Positions, tracking

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


@contextlib.contextmanager
def steer(
    model: TransformerBridge,
    *edits: Edit | Sequence[Edit],
    positions: Positions = "all",
    rows: Sequence[Sequence[Edit]] | None = None,
    include_special: bool = False,
    preserve_norm: bool = False,
) -> Iterator[TransformerBridge]:
    """Steer every forward inside the block; weights and other hooks are untouched, contexts nest.

    edits: `Edit`s, or lists of them, for every row of a batch. rows: instead, the edits of each row.
    positions: `"all"`, `"prompt"`, `"generated"`, `"last_prompt"` (from the last prompt token on), or absolute
        positions; the named ones leave BOS, EOS and pad alone unless include_special. An edit's own (`edit.at`) come
        first.
    preserve_norm: where edits act, the activations keep the norm they came with.

    Raises `UnknownName` for a site the model lacks, `InvalidInput` for a width that does not fit, unknown positions, an
    edit that depends on a later site, or a batch that has another number of rows than `rows`.
    """
    plan = Plan(
        model,
        edits,
        positions=positions,
        rows=rows,
        include_special=include_special,
        preserve_norm=preserve_norm,
    )
    with _on(model, plan):
        yield model


@contextlib.contextmanager
def edited(
    model: TransformerBridge,
    *edits: Edit | Sequence[Edit],
    positions: Positions = "all",
    rows: Sequence[Sequence[Edit]] | None = None,
    include_special: bool = False,
    preserve_norm: bool = False,
) -> Iterator[PreTrainedModel]:
    """`steer`, handing out the Hugging Face model underneath: for `generate`, pipelines and evaluation harnesses.

    Batches are padded with an attention mask, as Hugging Face asks for; without one, padding counts as text. Beam search
    makes several rows of one, so it takes edits for all rows, not `rows`.
    """
    with steer(
        model,
        *edits,
        positions=positions,
        rows=rows,
        include_special=include_special,
        preserve_norm=preserve_norm,
    ):
        yield model.original_model  # type: ignore[misc]


@contextlib.contextmanager
def _on(model: TransformerBridge, plan: Plan) -> Iterator[None]:
    changes = plan.changes
    if not changes:
        yield
        return
    with tracking(model, plan.tracker), editing(model, changes):
        yield


@dataclass(frozen=True)
class Touched:
    """Which tokens of a text are steered."""

    tokens: list[str]  # BOS included, spaces kept
    sites: dict[str, list[bool]]  # for each site, whether an edit acts on each token

    def __str__(self) -> str:
        """One line per site, the steered tokens in « »."""
        return "\n".join(
            f"{site}: " + "".join(f"«{t}»" if on else t for t, on in zip(self.tokens, flags, strict=True))
            for site, flags in self.sites.items()
        )


def touched(
    model: TransformerBridge,
    text: str,
    *edits: Edit | Sequence[Edit],
    positions: Positions = "all",
    include_special: bool = False,
) -> Touched:
    """Which tokens `steer` acts on when it runs over a prompt, conditions and special tokens considered.

    Raises as `steer` does, and `InvalidInput` for an empty text.
    """
    if not isinstance(text, str) or not text:
        raise InvalidInput(f"text: expected a text, got {text!r}")
    plan = Plan(model, edits, positions=positions, include_special=include_special)
    ids = model.to_tokens(text)
    with torch.no_grad(), _on(model, plan):
        model(ids, return_type=None)
    none = [False] * ids.shape[1]
    sites = {site: none if mask is None else mask[0].tolist() for site, mask in sorted(plan.changed.items())}
    return Touched(token_strings(model.tokenizer, ids[0].tolist()), sites)
