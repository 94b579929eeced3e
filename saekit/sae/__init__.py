"""Sparse autoencoders: the module, its kernels and objectives, and the files it lives in.

The names are imported when first used: `releases`, beside them, needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.sae.model import SAE as SAE
    from saekit.sae.model import Active as Active
    from saekit.sae.model import SAEConfig as SAEConfig

__all__ = ["SAE", "Active", "SAEConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'saekit.sae' has no attribute {name!r}")
    from saekit.sae import model

    return getattr(model, name)
