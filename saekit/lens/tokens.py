"""Tokens as people name and see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.errors import InvalidInput

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def token_id(model: TransformerBridge, token: str | int) -> int:
    """The id of a token named by its text (`" Jedi"`) or by its id. Raises `InvalidInput` unless it is one token."""
    if isinstance(token, int) and not isinstance(token, bool):
        if not 0 <= token < model.cfg.d_vocab:
            raise InvalidInput(f"token {token}: expected an id from 0 to {model.cfg.d_vocab - 1}")
        return token
    if not isinstance(token, str) or not token:
        raise InvalidInput(f"token: expected a text such as ' Jedi' or an id, got {token!r}")
    ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return int(ids[0])
    # SentencePiece puts a space before any text, so " Jedi" comes out as two pieces and "Jedi" with a space too many
    known = model.tokenizer.get_vocab().get(token.replace(" ", "▁"))
    if known is None:
        pieces = model.tokenizer.convert_ids_to_tokens(ids)
        raise InvalidInput(f"token {token!r} is {len(ids)} tokens of this model, {pieces}; name one of them")
    return int(known)


def check_position(position: int, length: int) -> int:
    """A position from 0, or from the end where it is negative."""
    if isinstance(position, bool) or not isinstance(position, int) or not -length <= position < length:
        raise InvalidInput(
            f"position: {position!r}; this text has {length} tokens, positions 0 to {length - 1}"
        )
    return position % length


def visible(token: str) -> str:
    """A token of any text made harmless for a screen: control characters and bidi overrides show as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in token)
