"""A model's linear layers by kernels for a few rows, which is what a step of generation gives them: a token of each text.

The modules stay where they are, with the hooks on them; it is their `forward` that is another one for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saekit.sae import kernels, native

Forward = Callable[[Tensor], Tensor]


class FewRows:
    """While open, `nn.Linear` and GPT-2's `Conv1D` take up to `kernels.FEW` rows by kernels of our own, on the CPU, in inference mode.

    Products of more rows, other layers, quantized or parametrized ones, and layers whose `forward` somebody has replaced go as
    before. A context manager for one thread at a time, which can be opened again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(_layers(model))
        self._changed: list[nn.Module] = []

    def __enter__(self) -> None:
        if torch.is_autocast_enabled("cpu") or native.library() is None:
            return
        try:
            for module, forward in self._layers:
                if "forward" not in module.__dict__:
                    self._changed.append(module)
                    module.__dict__["forward"] = forward
        except BaseException:  # Ctrl-C: nobody else would put back what has been changed by now
            self.__exit__()
            raise

    def __exit__(self, *_: Any) -> None:
        while self._changed:
            self._changed[-1].__dict__.pop("forward", None)
            self._changed.pop()


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    from transformers.pytorch_utils import Conv1D

    products: dict[Any, Any] = {nn.Linear: kernels.linear, Conv1D: kernels.conv1d}
    for module in model.modules():
        product = products.get(type(module))
        if product and module._parameters.get("weight") is not None:
            yield module, _forward(module, product)


def _forward(module: nn.Module, product: Callable[..., Tensor]) -> Forward:
    given = module._parameters  # asked at each call: the weights may be others by then
    return lambda x: product(x, given["weight"], given["bias"])
