"""The model without the bridge's wrappers, where nobody listens.

TransformerBridge puts a component with hook points around each module of the Hugging Face model. While nothing hangs on a
component's hook points, the module under it does the same by itself, and in a small model a token comes a third sooner. A
block that is hooked where it begins or ends keeps its own component only; one that is hooked inside stays whole.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class _Place(NamedTuple):
    parent: nn.Module
    name: str
    component: Any


class _Part(NamedTuple):
    """Components that stand aside together, as soon as nothing listens."""

    places: list[_Place]
    listeners: list[Any]  # the bridge's modules whose hooks would be missed
    block: Any = None  # its bridge's own hooks, which only feed other hooks, do not count
    is_inside: bool = False  # of a block

    def is_free(self) -> bool:
        ours = {handle.id for handle in getattr(self.block, "_capture_hook_handles", ())}
        return not any(_listens(module, ours) for module in self.listeners)


_PARTS: weakref.WeakKeyDictionary[Any, list[_Part]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unwrapped(model: TransformerBridge) -> Iterator[None]:
    """While open, forwards of `model.original_model` go through its own modules; hooks that are on now act as before.

    Hooks that come while it is open may be passed by. A model whose weights the bridge has processed keeps its components.
    """
    parts = [] if model.compatibility_mode else _parts(model)
    free = [part for part in parts if part.is_free()]
    places = [place for part in free for place in part.places]
    insides = [part for part in parts if part.is_inside]
    fused = bool(insides) and all(any(part is one for one in free) for part in insides)
    try:
        for parent, name, component in places:
            parent._modules[name] = component.original_component
        with _fused_attention(model.original_model) if fused else contextlib.nullcontext():
            yield
    finally:
        for parent, name, component in places:
            parent._modules[name] = component


@contextlib.contextmanager
def _fused_attention(model: Any) -> Iterator[None]:
    """Attention in one operation, which the bridge does without as nobody could see its pattern.

    Not for a model that caps its attention's logits: the fused operation would leave that out.
    """
    config = model.config
    before = config._attn_implementation
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if before != "eager" or capped or not getattr(model, "_supports_sdpa", False):
        yield
        return
    try:
        config._attn_implementation = "sdpa"
        yield
    finally:
        config._attn_implementation = before


def _parts(model: TransformerBridge) -> list[_Part]:
    parts = _PARTS.get(model)
    if parts is None or any(
        p.parent._modules.get(p.name) is not p.component for part in parts for p in part.places
    ):
        parts = _PARTS[model] = list(_parts_of(model.original_model))
    return parts


def _parts_of(module: nn.Module) -> Iterator[_Part]:
    from transformer_lens.model_bridge.generalized_components import BlockBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for name, child in module.named_children():
        place = _Place(module, name, child)
        if not isinstance(child, GeneralizedComponent):
            yield from _parts_of(child)
        elif isinstance(child, BlockBridge):  # it runs the block under it part by part
            everything = _listening_posts(child)
            yield _Part([place], everything, child)
            ends = (child, child.hook_in, child.hook_out)
            inside = [m for m in everything if all(m is not end for end in ends)]
            yield _Part(list(_places(child.original_component)), inside, child, is_inside=True)
        elif child.original_component is not None:
            yield _Part([place, *_places(child.original_component)], _listening_posts(child))


def _places(module: Any) -> Iterator[_Place]:
    """The components inside a module, and inside those."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for name, child in module.named_children():
        if isinstance(child, GeneralizedComponent) and child.original_component is not None:
            yield _Place(module, name, child)
            yield from _places(child.original_component)
        else:
            yield from _places(child)


def _listening_posts(component: nn.Module) -> list[Any]:
    """What a hook can be on and be missed: the bridge's own modules. Hugging Face's run either way."""
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    return [m for m in component.modules() if isinstance(m, (GeneralizedComponent, HookPoint))]


def _listens(module: Any, ignored: set[int]) -> bool:
    if getattr(module, "fwd_hooks", None) or getattr(module, "bwd_hooks", None):
        return True
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return any(kind and not ignored.issuperset(kind) for kind in hooks)
