"""Edits as hooks for TransformerLens: what `model.run_with_hooks` and `model.hooks` take.

    model.run_with_hooks(ids, fwd_hooks=hooks(model, feature.add(8.0)))

They do what `steer` does. Positions and padding are told by the model's own calls, which a watcher sees; it changes
nothing, and goes when the last of the hooks is let go of.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saekit.sites import check_site
from saekit.steering.edits import Edit
from saekit.steering.plan import Plan
from saekit.steering.positions import Positions, Tracker

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Hook = tuple[str, Callable[..., Tensor]]


def hooks(
    model: TransformerBridge,
    *edits: Edit | Sequence[Edit],
    positions: Positions = "all",
    rows: Sequence[Sequence[Edit]] | None = None,
    include_special: bool = False,
    preserve_norm: bool = False,
) -> list[Hook]:
    """[(site, function)] of the edits: a `fwd_hooks` list, on its own or joined with others.

    Arguments and errors are those of `steer`.
    """
    plan = Plan(
        model,
        edits,
        positions=positions,
        rows=rows,
        include_special=include_special,
        preserve_norm=preserve_norm,
    )
    changes = plan.changes
    if changes:
        watch = partial(_see, weakref.ref(plan.tracker))
        handle = model.original_model.register_forward_pre_hook(watch, with_kwargs=True)
        weakref.finalize(plan, handle.remove)
    return [(check_site(model, site), partial(_hook, change)) for site, change in changes.items()]


def _see(tracker: weakref.ref[Tracker], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (watching := tracker()) is not None:
        watching(module, args, kwargs)


def _hook(change: Callable[[Tensor], Tensor], x: Tensor, hook: Any) -> Tensor:
    return change(x.flatten(2)).reshape(x.shape)  # heads [N, T, heads, d_head] are edited flat
