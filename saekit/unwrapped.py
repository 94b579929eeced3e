"""The model without the bridge's wrappers, where nobody listens.

TransformerBridge puts a component with hook points around each module of the Hugging Face model. While nothing hangs on a
component's hook points, the module under it does the same by itself, and in a small model a token comes a third sooner. A
block that is hooked where it begins or ends meets those hooks on its way in and out; one that is hooked inside stays whole.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformer_lens.model_bridge import TransformerBridge


class _Place(NamedTuple):
    parent: nn.Module
    name: str
    component: Any


class _Part(NamedTuple):
    """Components that stand aside together, as soon as nothing listens."""

    places: list[_Place]
    hooks: list[Mapping[int, Any]]  # by their handles' numbers, of all modules whose hooks would be missed
    block: Any = None  # its bridge's own hooks, which only feed other hooks, do not count
    is_inside: bool = False  # of a block

    def is_free(self) -> bool:
        heard = [kind for kind in self.hooks if kind]
        if not heard:
            return True
        ours = {handle.id for handle in getattr(self.block, "_capture_hook_handles", ())}
        return all(ours.issuperset(kind) for kind in heard)

    def at_its_ends(self) -> list[RemovableHandle]:
        """What hangs on the points where a block begins and ends, put on the module that runs in its place."""
        if self.block is None or self.is_inside:
            return []
        block, (before, after) = self.block.original_component, (self.block.hook_in, self.block.hook_out)
        handles = []
        if any(_hooks_of(before)):
            handles.append(
                block.register_forward_pre_hook(partial(_begins, before), prepend=True, with_kwargs=True)
            )
        if any(_hooks_of(after)):
            handles.append(block.register_forward_hook(partial(_ends, after)))
        return handles


class _Bridge:
    """What TransformerLens has put around one model's modules, and what of it stands aside at the moment."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # there is one model for all threads
        self._parts: list[_Part] = []
        self._aside: list[_Part] = []
        self._at_ends: list[RemovableHandle] = []
        self._fused = False

    @contextlib.contextmanager
    def aside(self, model: TransformerBridge) -> Iterator[None]:
        """While open, what nobody listens to stands aside; then what stood aside before does again."""
        before, was_fused = self._aside, self._fused
        self._put([])  # one inside another judges the whole bridge anew: hooks may have come since
        parts = [] if _is_processed(model) else self._parts_of(model.original_model)
        free = [part.is_free() for part in parts]
        unseen = [is_free for is_free, part in zip(free, parts, strict=True) if part.is_inside]
        try:
            self._put([part for is_free, part in zip(free, parts, strict=True) if is_free])
            self._fuse(model.original_model, fused=bool(unseen) and all(unseen))
            yield
        finally:
            self._put(before)
            self._fuse(model.original_model, fused=was_fused)

    def _put(self, parts: list[_Part]) -> None:
        """Let these components stand aside, and no others."""
        for handle in self._at_ends:
            handle.remove()
        for part in self._aside:
            for parent, name, component in part.places:
                parent._modules[name] = component
        self._aside = parts
        for part in parts:
            for parent, name, component in part.places:
                parent._modules[name] = component.original_component
        self._at_ends = [handle for part in parts for handle in part.at_its_ends()]

    def _parts_of(self, model: nn.Module) -> list[_Part]:
        """The parts, while none of them stands aside."""
        places = [place for part in self._parts for place in part.places]
        if not places or any(p.parent._modules.get(p.name) is not p.component for p in places):
            self._parts = list(_parts_of(model))
        return self._parts

    def _fuse(self, model: Any, *, fused: bool) -> None:
        """Attention in one operation, which the bridge does without as nobody could see its pattern.

        Not for a model that caps its attention's logits: the fused operation would leave that out.
        """
        config = model.config
        capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        if fused == self._fused or (fused and (capped or not getattr(model, "_supports_sdpa", False))):
            return
        now, then = ("eager", "sdpa") if fused else ("sdpa", "eager")
        if config._attn_implementation == now:  # somebody's own choice stays
            config._attn_implementation, self._fused = then, fused


_BRIDGES: weakref.WeakKeyDictionary[Any, _Bridge] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unwrapped(model: TransformerBridge) -> Iterator[None]:
    """While open, forwards of `model.original_model` go through its own modules; hooks that are on now act as before.

    Hooks that come while it is open may be passed by, unless another one is opened inside, which sees them. Another
    thread waits with its own until this one is closed. A model whose weights the bridge has processed keeps its components.
    """
    bridge = _BRIDGES.setdefault(model, _Bridge())
    with bridge.lock, bridge.aside(model):
        yield


def _is_processed(model: Any) -> bool:
    """Whether the bridge's components compute with weights other than those of the modules under them."""
    return bool(model.compatibility_mode or getattr(model, "_weights_processed", False))


def _begins(point: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (point(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": point(kwargs["hidden_states"])}


def _ends(point: Any, module: Any, args: Any, output: Any) -> Any:
    return (point(output[0]), *output[1:]) if isinstance(output, tuple) else point(output)


def _parts_of(module: nn.Module) -> Iterator[_Part]:
    from transformer_lens.model_bridge.generalized_components import BlockBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    for name, child in module.named_children():
        place = _Place(module, name, child)
        if not isinstance(child, GeneralizedComponent):
            yield from _parts_of(child)
        elif isinstance(child, BlockBridge):  # it runs the block under it part by part
            everything = _listening_posts(child)
            ends = [child.hook_in, child.hook_out]
            missed = [m for m in everything if all(m is not end for end in ends)]
            is_plain = (
                type(child).forward is BlockBridge.forward
            )  # it does no more than `_begins` and `_ends`
            yield _Part([place], _hooks_of(*(missed if is_plain else everything)), child)
            inside = [m for m in missed if m is not child]
            yield _Part(list(_places(child.original_component)), _hooks_of(*inside), child, is_inside=True)
        elif child.original_component is not None:
            yield _Part([place, *_places(child.original_component)], _hooks_of(*_listening_posts(child)))


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


def _hooks_of(*modules: Any) -> list[Mapping[int, Any]]:
    """Where torch keeps the hooks of these; HookPoints and components keep theirs there too."""
    return [
        kind
        for module in modules
        for kind in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    ]
