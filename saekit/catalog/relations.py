"""What is near a feature or a direction, and what raises a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from saekit.errors import InvalidInput, UnknownName, near

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.catalog.store import Catalog

By = Literal["decoder", "firing"]


@dataclass(frozen=True)
class Neighbour:
    """A feature that is near: by cosine of the decoder rows, or by the Jaccard index of the tokens both fire on."""

    feature: int
    similarity: float


@dataclass(frozen=True)
class Raises:
    """A feature whose direction raises a token's logit."""

    feature: int
    effect: float


def nearest(catalog: Catalog, of: int | Tensor, by: By, limit: int) -> list[Neighbour]:
    """See `Catalog.nearest`."""
    if by not in get_args(By):
        raise InvalidInput(f"nearest: by {by!r} is neither 'decoder' nor 'firing'")
    if limit < 1:
        raise InvalidInput(f"nearest: limit starts at 1, got {limit}")
    if not isinstance(of, Tensor):
        feature = catalog[of]
        stored = feature.neighbours if by == "decoder" else feature.coactive
        if by == "firing" or limit <= len(stored):
            return stored[:limit]
        return _by_direction(catalog, feature.direction, limit, itself=feature.index)
    if by == "firing":
        raise InvalidInput("nearest: a direction fires on nothing; by='firing' takes a feature's number")
    return _by_direction(catalog, of, limit)


def _by_direction(
    catalog: Catalog, direction: Tensor, limit: int, itself: int | None = None
) -> list[Neighbour]:
    rows = catalog.sae.directions().float()
    vector = direction.detach().float().to(rows.device)
    if vector.shape != rows.shape[1:]:
        raise InvalidInput(f"nearest: expected a direction [{rows.shape[1]}], got {list(vector.shape)}")
    if not torch.isfinite(vector).all() or not vector.any():
        raise InvalidInput("nearest: the direction is zero, or holds NaN or infinite values")
    cosine = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(vector, dim=0)
    if itself is not None:
        cosine[itself] = -torch.inf
    top = cosine.topk(min(limit, len(rows) - (itself is not None)))
    return [Neighbour(i, c) for i, c in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def raising(catalog: Catalog, token: str | int, limit: int, model: TransformerBridge | None) -> list[Raises]:
    """See `Catalog.raising`."""
    if limit < 1:
        raise InvalidInput(f"raising: limit starts at 1, got {limit}")
    ids = _ids(catalog, token)
    if model is None:
        table = catalog.table("logits")
        here = table["raised"].to_numpy() & np.isin(table["token_id"].to_numpy(), ids)
        features, effects = table["feature"].to_numpy()[here], table["effect"].to_numpy()[here]
    else:
        catalog.check_fits(model)
        effects = _effects(model, catalog, ids).max(dim=1).values.numpy()
        features = np.flatnonzero(effects > 0)
        effects = effects[features]
    best: dict[int, float] = {}
    for i in np.lexsort((features, -effects)).tolist():
        best.setdefault(
            int(features[i]), float(effects[i])
        )  # of several tokens with this text, the one it raises most
    return [Raises(feature, effect) for feature, effect in list(best.items())[:limit]]


def _effects(model: TransformerBridge, catalog: Catalog, ids: list[int]) -> Tensor:
    """[S, len(ids)] effects of all directions on some tokens, as `effects.logit_effects` has them."""
    from saekit.catalog.effects import writes
    from saekit.lm import through_final_norm

    if not writes(model, catalog.target_site):
        raise InvalidInput(f"raising: {catalog.target_site} does not write to the residual stream")
    W_U = model.W_U.detach()[:, ids].float()
    return (through_final_norm(model, catalog.sae.directions()) @ W_U).cpu()


def _ids(catalog: Catalog, token: str | int) -> list[int]:
    """The ids that have this text. Raises `UnknownName` naming near ones, `InvalidInput` for an id that is none."""
    if isinstance(token, int):
        catalog.token(token)
        return [token]
    vocabulary = catalog.vocabulary
    ids = [i for i, text in enumerate(vocabulary) if text == token]
    if not ids:
        other = token[1:] if token.startswith(" ") else f" {token}"  # the commonest slip
        like = f"Did you mean {other!r}?" if other in vocabulary else near(token, vocabulary)
        raise UnknownName(f"{token!r} is not one token of {catalog.model_name}'s vocabulary. {like}".strip())
    return ids
