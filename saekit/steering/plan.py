"""Edits made ready for one model: what each site does to the activations that pass it, worked out once.

At a site all edits see the same un-edited x [N, T, D]. Their deltas are summed and added in float32:

    y = x + Σ δ                          at the positions where an edit acts; all others pass bit for bit
    y = (x + Σ δ) · ‖x‖ / ‖x + Σ δ‖      with preserve_norm

Plain additions, which depend on nothing, are summed beforehand: one vector per site, or one per row of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.errors import InvalidInput
from saekit.lm import model_hash, special_ids
from saekit.sites import editing, site_width
from saekit.steering.edits import Condition, Edit
from saekit.steering.positions import Positions, Tracker, check_positions

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from saekit.sae import SAE

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class _Sum:
    """Plain additions at the same positions."""

    positions: Positions
    vectors: Tensor  # [1 or N, 1, D] float32
    rows: Tensor | None  # [N, 1] bool: rows with any edit; None: all


@dataclass(frozen=True, eq=False)
class _PerPosition:
    """Plain additions at one position each (ActAdd's, say): looked up, not gone through one by one."""

    positions: Tensor  # [P] int64, ascending
    vectors: Tensor  # [1 or N, P, D] float32
    rows: Tensor  # [1 or N, P] bool: whether the row has an edit there

    def at(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Mask [N, T] and delta [N, T, D] of tokens at position [N, T]."""
        i = torch.searchsorted(self.positions, position.contiguous()).clamp(max=len(self.positions) - 1)
        row = torch.arange(len(self.rows), device=i.device)[:, None]
        return (self.positions[i] == position) & self.rows[row, i], self.vectors[row, i]


@dataclass(frozen=True, eq=False)
class _One:
    """An edit that depends on the activations."""

    edit: Edit
    positions: Positions
    rows: Tensor | None
    along: Tensor  # what its amount multiplies: d, or d̂ where x·d̂ or a norm counts
    probe: Tensor | None  # d̂ of its condition, where that is no feature
    values: Tensor | None  # swap: v [D] or [T, D]
    basis: Tensor | None  # swap: Q [k, D]


class Plan:
    """The edits of one `steer`, or of one set of hooks."""

    def __init__(
        self,
        model: TransformerBridge,
        edits: Sequence[Any],
        *,
        positions: Positions = "all",
        rows: Sequence[Sequence[Edit]] | None = None,
        include_special: bool = False,
        preserve_norm: bool = False,
    ) -> None:
        """Raises `UnknownName` for a site the model lacks, `InvalidInput` for edits that cannot be made on it."""
        positions = check_positions(positions)
        self._ordinary = special_ids(model)  # what norms are measured without
        self._special = () if include_special else self._ordinary
        self._preserve_norm = preserve_norm
        self._device = torch.device(model.cfg.device or "cpu")  # brought there once, not at each step
        self._n_rows = None if rows is None else len(rows)
        placed = _placed(edits, rows)
        _check_fit(model, [edit for edit, _ in placed])
        groups: dict[str, list[tuple[Edit, int | None]]] = {}
        for edit, row in placed:
            if not edit.is_nothing:
                groups.setdefault(edit.site, []).append((edit, row))
        self._per_position: dict[str, _PerPosition] = {}
        self._sums = {site: self._added_up(here, positions) for site, here in groups.items()}
        self._ones = {
            site: [self._one(edit, row, positions) for edit, row in here if not _is_plain(edit)]
            for site, here in groups.items()
        }
        # Where x is kept for an edit at a later site.
        self._kept = {
            site
            for own, here in groups.items()
            for edit, _ in here
            for site in _read_sites(edit)
            if site != own
        }
        self._seen: dict[str, Tensor] = {}
        self._norms: dict[str, tuple[int, Tensor]] = {}  # the prompt they were measured on, and [N, 1]
        self.changed: dict[str, Tensor | None] = {}  # by site: the tokens [N, T] edited in the last forward
        self.tracker = Tracker()

    @property
    def changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What each site's activations pass through: the edits' sites, and those that are only looked at."""
        return {site: partial(self._pass, site) for site in {*self._sums, *self._kept}}

    def _one(self, edit: Edit, row: int | None, positions: Positions) -> _One:
        d, condition, source = self._here(edit.direction), edit.condition, edit.source
        probe = None if condition is None or condition.sae is not None else self._here(condition.direction)
        rows = None
        if row is not None:
            rows = torch.zeros(self._n_rows or 1, 1, dtype=torch.bool, device=self._device)
            rows[row] = True
        return _One(
            edit,
            positions if edit.positions is None else edit.positions,
            rows,
            _unit(d) if edit.needs_projection or _measures(edit) else d,
            None if probe is None else _unit(probe),
            None if source is None else self._here(source.values),
            None if source is None or source.basis is None else self._here(source.basis),
        )

    def _added_up(self, here: Sequence[tuple[Edit, int | None]], positions: Positions) -> list[_Sum]:
        """The plain additions of a site, summed by the positions they are for."""
        by_positions: dict[Any, list[tuple[Edit, int | None]]] = {}
        for edit, row in here:
            if _is_plain(edit):
                where = positions if edit.positions is None else edit.positions
                key = where if isinstance(where, str) else tuple(where)
                by_positions.setdefault(key, []).append((edit, row))
        single = [key for key in by_positions if isinstance(key, tuple) and len(key) == 1]
        if len(single) > 1:
            self._per_position[here[0][0].site] = self._looked_up(
                {key[0]: by_positions.pop(key) for key in sorted(single)}
            )
        sums = []
        for key, same in by_positions.items():
            n, D = self._n_rows or 1, len(same[0][0].direction)
            vectors = torch.zeros(n, 1, D, device=self._device)
            rows = torch.zeros(n, 1, dtype=torch.bool, device=self._device)
            for edit, row in same:
                vectors[row or 0] += edit.amount * self._here(edit.direction)
                rows[row or 0] = True
            sums.append(_Sum(key, vectors, None if self._n_rows is None else rows))
        return sums

    def _looked_up(self, by_position: dict[int, list[tuple[Edit, int | None]]]) -> _PerPosition:
        n, P = self._n_rows or 1, len(by_position)
        D = len(next(iter(by_position.values()))[0][0].direction)
        vectors = torch.zeros(n, P, D, device=self._device)
        rows = torch.zeros(n, P, dtype=torch.bool, device=self._device)
        for i, same in enumerate(by_position.values()):
            for edit, row in same:
                vectors[row or 0, i] += edit.amount * self._here(edit.direction)
                rows[row or 0, i] = True
        return _PerPosition(torch.tensor(list(by_position), device=self._device), vectors, rows)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, torch.float32)

    def _pass(self, site: str, x: Tensor) -> Tensor:
        if site in self._kept:
            self._seen[site] = x
        return self._change(site, x) if site in self._sums else x

    def _change(self, site: str, x: Tensor) -> Tensor:
        """x [N, T, D] with the deltas added where they are wanted."""
        if self._n_rows is not None and self._n_rows != len(x):
            raise InvalidInput(
                f"steer: rows has {self._n_rows} lists of edits, but the batch has {len(x)} rows"
            )
        x32 = x.float()
        parts = [*self._added(site, x), *self._dependent(site, x, x32)]
        self.changed[site] = None
        if not parts:
            return x
        mask, delta = parts[0]
        if len(parts) > 1:
            delta = torch.where(mask[..., None], delta, 0.0)
        for other, further in parts[1:]:
            delta = delta + torch.where(other[..., None], further, 0.0)
            mask = mask | other
        y = x32 + delta
        if self._preserve_norm:
            y = y * (x32.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True).clamp_min(TINY))
        self.changed[site] = mask
        return torch.where(mask[..., None], y.to(x.dtype), x)

    def _added(self, site: str, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Mask [N, T] and delta of the plain additions."""
        for part in self._sums[site]:
            if (mask := self.tracker.look.mask(part.positions, self._special)) is not None:
                yield _only(mask, part.rows), part.vectors.to(x.device)
        if site in self._per_position:
            mask, delta = self._per_position[site].at(self.tracker.look.position.to(self._device))
            yield mask.to(x.device), delta.to(x.device)

    def _dependent(self, site: str, x: Tensor, x32: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Mask [N, T] and delta [N, T, D] of the edits that depend on the activations."""
        look = self.tracker.look
        if any(_measures(one.edit) for one in self._ones[site]):
            self._norm(site, x32)  # on the prompt, also where only generated tokens are edited
        acting = [
            (one, _only(mask, one.rows))
            for one in self._ones[site]
            if (mask := look.mask(one.positions, self._special)) is not None
        ]
        if not acting:
            return
        found = self._activations([one.edit for one, _ in acting], site, x)
        for one, mask in acting:
            edit, condition = one.edit, one.edit.condition
            if condition is not None:
                if condition.sae is not None:
                    level = found[id(condition.sae), condition.latent]
                else:
                    assert one.probe is not None
                    at = x if condition.site == site else self._seen[condition.site]
                    level = (at.float() @ one.probe.to(at.device)).to(x.device)
                mask = mask & (level > condition.above)
            if edit.kind == "swap":
                yield _swapped(one, x32, look.position, mask)
                continue
            along = one.along.to(x.device)
            f = found[id(edit.sae), edit.latent] if edit.needs_activation else None
            amount = self._amount(edit, site, x32, along, f)
            yield mask, (amount[..., None] if isinstance(amount, Tensor) else amount) * along

    def _amount(self, edit: Edit, site: str, x32: Tensor, along: Tensor, f: Tensor | None) -> Tensor | float:
        """What d, or d̂, is multiplied by: a number, or [N, T] or [N, 1]."""
        strength: Any = edit.amount
        if _measures(edit):
            strength = strength * self._norm(site, x32)
        if edit.kind == "add":
            return strength
        if f is not None:
            if edit.kind == "scale":
                return (strength - 1) * f
            if edit.kind == "ablate":
                return -f
            return (strength if edit.kind == "clamp" else f.clamp(min=strength)) - f
        p = x32 @ along
        if edit.kind == "rescale":
            return (strength - 1) * p
        return -p if edit.kind == "project_out" else p.clamp(max=strength) - p

    def _norm(self, site: str, x32: Tensor) -> Tensor:
        """[N, 1]: each row's median ‖x‖ over its ordinary tokens, measured on its prompt and kept while it goes on."""
        look = self.tracker.look
        prompt, norms = self._norms.get(site, (0, x32))
        if prompt != look.prompt or len(norms) != len(x32):
            ordinary = look.mask("all", self._ordinary)
            assert ordinary is not None
            of_all = x32.detach().norm(dim=-1)
            norms = torch.where(ordinary, of_all, torch.nan).nanmedian(1, keepdim=True).values
            norms = torch.where(norms.isnan(), of_all.median(1, keepdim=True).values, norms)
            self._norms[site] = look.prompt, norms
        return norms

    def _activations(
        self, edits: Sequence[Edit], site: str, x: Tensor
    ) -> dict[tuple[int, int | None], Tensor]:
        """f [N, T] of every feature that an edit or its condition needs, from the un-edited x; one encode per SAE."""
        wanted: dict[int, tuple[SAE, list[int]]] = {}
        for sae, latent in (feature for edit in edits for feature in _features(edit)):
            latents = wanted.setdefault(id(sae), (sae, []))[1]
            if latent not in latents:
                latents.append(latent)
        found: dict[tuple[int, int | None], Tensor] = {}
        for key, (sae, latents) in wanted.items():
            read = [x if place == site else self._seen[place] for place in sae.sites]
            # sites of a model that is spread over devices meet where the edit is
            together = read[0] if len(read) == 1 else torch.cat([part.to(x.device) for part in read], -1)
            values = sae.encode_some(together, latents).float().to(x.device)
            found |= {(key, latent): values[..., i] for i, latent in enumerate(latents)}
        return found


def _placed(edits: Sequence[Any], rows: Sequence[Sequence[Edit]] | None) -> list[tuple[Edit, int | None]]:
    """Each edit, with the row of the batch it is for (None: all rows)."""
    flat = [edit for item in edits for edit in (item if isinstance(item, (list, tuple)) else [item])]
    if flat and rows is not None:
        raise InvalidInput("steer: give edits for all rows, or rows=[[…], […]], not both")
    placed: list[tuple[Any, int | None]] = [(edit, None) for edit in flat]
    placed += [(edit, row) for row, of_row in enumerate(rows or ()) for edit in of_row]
    for edit, _ in placed:
        if not isinstance(edit, Edit):
            raise InvalidInput(f"steer: expected edits such as feature.add(8.0), got {type(edit).__name__}")
    return placed


def _is_plain(edit: Edit) -> bool:
    """Whether its delta is known before any forward."""
    return edit.kind == "add" and edit.condition is None and not _measures(edit)


def _measures(edit: Edit) -> bool:
    """Whether its strength counts in a norm that nobody has measured yet."""
    return edit.unit == "norm" and edit.norm is None


def _only(mask: Tensor, rows: Tensor | None) -> Tensor:
    return mask if rows is None else mask & rows.to(mask.device)


def _unit(direction: Tensor) -> Tensor:
    return direction / direction.norm()


def _swapped(one: _One, x32: Tensor, position: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask without positions that the other run did not have, and QᵀQ·(v − x) [N, T, D]."""
    assert one.values is not None
    v = one.values.to(x32.device)
    if v.ndim == 2:
        mask = mask & (position < len(v))
        v = v[position.clamp(0, len(v) - 1)]
    if one.basis is None:
        return mask, v - x32
    q = one.basis.to(x32.device)
    return mask, ((v - x32) @ q.t()) @ q


# What an edit needs of a model


def _features(edit: Edit) -> Iterator[tuple[SAE, int]]:
    """The features whose f it depends on."""
    for part in (edit if edit.needs_activation else None, edit.condition):
        if part is not None and part.sae is not None:
            assert part.latent is not None
            yield part.sae, part.latent


def _read_sites(edit: Edit) -> list[str]:
    """The sites whose un-edited x it depends on, its own among them if it does."""
    sites = [site for sae, _ in _features(edit) for site in sae.sites]
    condition: Condition | None = edit.condition
    return sites + ([condition.site] if condition is not None and condition.sae is None else [])


def _check_fit(model: TransformerBridge, edits: Sequence[Edit]) -> None:
    """Raises unless the edits are for this model, which has every site that is written or read, at these widths, those read not after the edit."""
    widths: dict[str, int] = {}

    def check(site: str, width: int, what: str) -> None:
        if site not in widths:
            widths[site] = site_width(model, site)
        if widths[site] != width:
            raise InvalidInput(
                f"{what} of width {width} cannot act on {site} of {model.cfg.model_name}, which has width {widths[site]}"
            )

    own = model_hash(model) if any(edit.model_hash for edit in edits) else None
    for edit in edits:
        if edit.model_hash not in (None, own):
            raise InvalidInput(
                f"{edit.label} was found in a model with weights {edit.model_hash:.10}…, {model.cfg.model_name} has {own:.10}…; "
                "to steer another model with it all the same: saekit.Direction(edit.direction, edit.site)"
            )
        check(edit.site, len(edit.direction), "an edit")
        for sae, _ in _features(edit):
            for site, width in zip(sae.sites, sae.widths if sae.is_crosscoder else (sae.d_in,), strict=True):
                check(site, width, "an SAE")
        if edit.condition is not None and edit.condition.sae is None:
            check(edit.condition.site, len(edit.condition.direction), "a condition")
    elsewhere = {(edit.site, site) for edit in edits for site in _read_sites(edit) if site != edit.site}
    if not elsewhere:
        return
    order = _order(model, {site for pair in elsewhere for site in pair})
    for written, read in sorted(elsewhere):
        if order.index(read) > order.index(written):
            raise InvalidInput(
                f"an edit at {written} depends on {read}, which the model computes after it; edit a later site, or use "
                "a kind that needs no activation, such as add"
            )


def _order(model: TransformerBridge, sites: set[str]) -> list[str]:
    """The sites in the order in which a forward meets them."""
    order: list[str] = []

    def note(site: str, x: Tensor) -> Tensor:
        order.append(site)
        return x

    token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    with torch.no_grad(), editing(model, {site: partial(note, site) for site in sites}):
        model(token, return_type=None)
    if missing := sorted(sites - set(order)):
        raise InvalidInput(f"{', '.join(missing)} never fires in a forward of {model.cfg.model_name}")
    return order
