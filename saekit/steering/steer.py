"""Put edits on a model for the length of a `with` block, and take them off again whatever happens.

    with saekit.steer(model, feature.add(8.0)):
        model.generate("Mike pulls out his")

All edits at a site see the same un-edited x; their deltas are summed and added once, in float32. Where no delta
falls, the activations pass through bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import special_ids
from saekit.sites import editing, site_width
from saekit.steering.edits import Edit
from saekit.steering.positions import Positions, Tracker, check_positions, tracking

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class _Placed:
    """An edit, and the batch row it is for (None: all rows)."""

    edit: Edit
    row: int | None


@contextlib.contextmanager
def steer(
    model: TransformerBridge,
    *edits: Edit | Sequence[Edit],
    positions: Positions = "all",
    rows: Sequence[Sequence[Edit]] | None = None,
    include_special: bool = False,
) -> Iterator[TransformerBridge]:
    """Steer every forward inside the block; weights and other hooks are untouched, contexts nest.

    edits: `Edit`s, or lists of them, for every row of a batch. rows: instead, the edits of each row.
    positions: `"all"`, `"prompt"`, `"generated"`, `"last_prompt"` (from the last prompt token on), or absolute
        positions; the named ones leave BOS, EOS and pad alone unless include_special.

    Raises `UnknownName` for a site the model lacks, `InvalidInput` for a width that does not fit, unknown positions,
    or a batch that has another number of rows than `rows`.
    """
    positions = check_positions(positions)
    placed = _placed(edits, rows)
    for site, width in {(p.edit.site, len(p.edit.direction)) for p in placed}:
        if (actual := site_width(model, site)) != width:
            raise InvalidInput(
                f"an edit of width {width} cannot act on {site} of {model.cfg.model_name}, which has width {actual}"
            )
    placed = [p for p in placed if not p.edit.is_nothing]
    by_site: dict[str, list[_Placed]] = {}
    for p in placed:
        by_site.setdefault(p.edit.site, []).append(p)
    special = special_ids(model)
    with tracking(model) as tracker:
        norms = _Norms()
        changes = {
            site: partial(
                _change,
                placed=here,
                tracker=tracker,
                positions=positions,
                special=special,
                include_special=include_special,
                n_rows=len(rows) if rows is not None else None,
                norms=norms,
                site=site,
            )
            for site, here in by_site.items()
        }
        with editing(model, changes):
            yield model


def _placed(edits: Sequence[Any], rows: Sequence[Sequence[Edit]] | None) -> list[_Placed]:
    flat = [edit for item in edits for edit in (item if isinstance(item, (list, tuple)) else [item])]
    if flat and rows is not None:
        raise InvalidInput("steer: give edits for all rows, or rows=[[…], […]], not both")
    placed = [_Placed(edit, None) for edit in flat]
    placed += [_Placed(edit, row) for row, of_row in enumerate(rows or ()) for edit in of_row]
    for p in placed:
        if not isinstance(p.edit, Edit):
            raise InvalidInput(f"steer: expected edits such as feature.add(8.0), got {type(p.edit).__name__}")
    return placed


class _Norms:
    """The median residual norm at each site, measured on the first forward and kept for the cached steps."""

    def __init__(self) -> None:
        self._of: dict[str, float] = {}

    def at(self, site: str, x: Tensor, ordinary: Tensor) -> float:
        if site not in self._of:
            chosen = x[ordinary] if bool(ordinary.any()) else x.flatten(0, 1)
            self._of[site] = float(chosen.float().norm(dim=-1).median())
        return self._of[site]


@torch.no_grad()
def _change(
    x: Tensor,
    *,
    placed: list[_Placed],
    tracker: Tracker,
    positions: Positions,
    special: tuple[int, ...],
    include_special: bool,
    n_rows: int | None,
    norms: _Norms,
    site: str,
) -> Tensor:
    """x [N, T, D] with the deltas added where the mask says so."""
    if n_rows is not None and n_rows != len(x):
        raise InvalidInput(f"steer: rows has {n_rows} lists of edits, but the batch has {len(x)} rows")
    look = tracker.look
    mask = look.mask(positions, special, include_special)
    if not bool(mask.any()):
        return x
    x32 = x.float()
    delta = torch.zeros_like(x32)
    changed = torch.zeros_like(mask)
    activations = _activations(x, placed)
    for p in placed:
        edit = p.edit
        norm = edit.norm
        if edit.unit == "norm" and norm is None:
            norm = norms.at(site, x, look.mask("all", special, False))
        f = activations[id(edit.sae), edit.latent] if edit.needs_activation else None
        here = mask if p.row is None else mask & (torch.arange(len(x), device=x.device) == p.row)[:, None]
        amount = edit.amount(f, norm)
        where = here.float() if not isinstance(amount, Tensor) else torch.where(here, amount, 0)
        scale = amount if not isinstance(amount, Tensor) else 1.0
        delta += (where * scale)[..., None] * edit.direction.to(x.device, torch.float32)
        changed |= here
    return torch.where(changed[..., None], (x32 + delta).to(x.dtype), x)


def _activations(x: Tensor, placed: list[_Placed]) -> dict[tuple[int, int | None], Tensor]:
    """f [N, T] of every feature that an edit needs, from the un-edited x; one encode per SAE."""
    wanted: dict[int, tuple[Any, list[int]]] = {}
    for p in placed:
        if p.edit.needs_activation:
            assert p.edit.latent is not None
            wanted.setdefault(id(p.edit.sae), (p.edit.sae, []))[1].append(p.edit.latent)
    found: dict[tuple[int, int | None], Tensor] = {}
    for key, (sae, latents) in wanted.items():
        values = sae.encode_some(x, latents).float().to(x.device)
        found |= {(key, latent): values[..., i] for i, latent in enumerate(latents)}
    return found
