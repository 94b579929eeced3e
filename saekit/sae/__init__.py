"""Sparse autoencoders: the module, its kernels and objectives, and the files it lives in."""

from saekit.sae.model import SAE, Active, SAEConfig

__all__ = ["SAE", "Active", "SAEConfig"]
