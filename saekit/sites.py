"""Sites: named places in a model, and the two things done there, reading and editing.

    ids [N, T] ──▶ model … site ──▶ activations [N, T, D]     `capture`: the forward stops at the last site
    ids [N, T] ──▶ model … sites ──▶ side by side [N, T, ΣD]  `read`: what a crosscoder takes
    model … site ──▶ function(activations) ──▶ … model        `editing`: hooks on, and off again

A site is the name TransformerLens gives it (`blocks.2.hook_resid_pre`), never a bare layer number.
Places that carry heads ([N, T, heads, d_head], as `hook_z`) are seen flat as [N, T, heads · d_head].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from saekit.errors import InvalidInput, UnknownName, near

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Edit = Callable[[Tensor], Tensor]  # [N, T, D] → [N, T, D]
RESIDUAL = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
)  # of width d_model


class _Reached(Exception):
    """Ends a forward once every wanted site has been seen."""


def check_site(model: TransformerBridge, site: str) -> str:
    """The site's name, or `UnknownName` that lists near names. (The bridge ignores unknown hooks silently.)"""
    if not isinstance(site, str):
        raise InvalidInput(f"site: expected a name such as 'blocks.2.hook_resid_pre', got {site!r}")
    if (
        model.get_hook_point(site) is None
    ):  # quick, where `hook_dict` lists all hook points anew at each access
        hint = near(site, model.hook_dict) or "Names look like 'blocks.2.hook_resid_pre'"
        raise UnknownName(
            f"site {site!r} is not in {model.cfg.model_name} ({model.cfg.n_layers} blocks, "
            f"0 … {model.cfg.n_layers - 1}). {hint}"
        )
    return site


def site_width(model: TransformerBridge, site: str) -> int:
    """D at the site. Raises `UnknownName` for a site that is not there or never fires."""
    if check_site(model, site).endswith(RESIDUAL):
        return int(model.cfg.d_model)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    return capture(model, [site], token)[site].shape[-1]


def capture(model: TransformerBridge, sites: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """Activations at each site, [N, T, D] in the model's dtype. The forward stops at the last site.

    ids: [N, T] token ids. A site named twice is captured once.
    """
    sites = list(dict.fromkeys(check_site(model, site) for site in sites))
    seen: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any, site: str) -> None:
        seen[site] = _flat(tensor)
        if len(seen) == len(sites):
            raise _Reached

    hooks = [(site, partial(keep, site=site)) for site in sites]
    with torch.no_grad(), contextlib.suppress(_Reached), _hooked(model, hooks):
        model(ids.to(model.cfg.device), return_type=None)
    if missing := [site for site in sites if site not in seen]:
        raise UnknownName(f"{missing} exist in {model.cfg.model_name} but never fire in a forward")
    return seen


def read(model: TransformerBridge, sites: Sequence[str], ids: Tensor) -> Tensor:
    """Activations of several sites side by side, [N, T, ΣD], in the order the sites are named.

    ids: [N, T] token ids. This is what an SAE over these sites reads (`sae.sites`); one site gives its own [N, T, D].
    """
    seen = capture(model, sites, ids)
    return torch.cat([seen[site] for site in sites], -1)


@contextlib.contextmanager
def editing(model: TransformerBridge, edits: Mapping[str, Edit]) -> Iterator[None]:
    """While open, each site's activations pass through its function. Other hooks stay untouched.

    The hooks come off on exit, also after an exception or Ctrl-C. Contexts nest; inner edits act last.
    """
    hooks = [(check_site(model, site), partial(_apply, edit=edit)) for site, edit in edits.items()]
    with _hooked(model, hooks):
        yield


@contextlib.contextmanager
def _hooked(model: TransformerBridge, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    """Hooks on and off, by their handles: `model.hooks` lists all hook points several times for each."""
    added: list[tuple[Any, Any]] = []
    try:
        for site, function in hooks:
            point: Any = model.get_hook_point(site)
            try:
                model.check_hooks_to_add(point.name or site)
            except ValueError as error:  # a hook point that a flag of TransformerLens keeps switched off
                raise UnknownName(f"site {site!r}: {error}") from error
            point.add_hook(function)
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, ours in added:
            ours.hook.remove()
            point.fwd_hooks = [handle for handle in point.fwd_hooks if handle is not ours]


def _flat(tensor: Tensor) -> Tensor:
    return rearrange(tensor, "n t h d -> n t (h d)") if tensor.ndim == 4 else tensor


def _apply(tensor: Tensor, hook: Any, edit: Edit) -> Tensor:
    return edit(_flat(tensor)).reshape(tensor.shape)
