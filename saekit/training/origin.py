"""What a run is made from, as text: model, tokenizer, corpus and program. A resume with another one is refused.

An exact resume goes on as if nothing had happened; with other weights, another text or another version of a library it
would be neither the old run nor a new one (`checkpoint.check_origin`).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from saekit.lm import model_hash, tokenizer_hash
from saekit.recipe import Recipe
from saekit.text import fingerprint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LIBRARIES = ("saekit", "torch", "transformer_lens")


def origin(recipe: Recipe, model: TransformerBridge) -> dict[str, str]:
    """Versions by library, and fingerprints of `model`, `tokenizer`, `text` and, where it is its own, `held_out_text`."""
    found = {
        "model": model_hash(model),
        "tokenizer": tokenizer_hash(model.tokenizer),
        "text": fingerprint(recipe.data.text),
    }
    if recipe.data.held_out_text is not None:
        found["held_out_text"] = fingerprint(recipe.data.held_out_text)
    return found | {name: version(name) for name in LIBRARIES}
