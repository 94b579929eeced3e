"""The kinds of sparse autoencoder, each a file that reads like its paper."""

from saekit.sae.architectures.base import Architecture, Objective, Terms
from saekit.sae.architectures.batchtopk import BatchTopK
from saekit.sae.architectures.gated import Gated
from saekit.sae.architectures.jumprelu import JumpReLU
from saekit.sae.architectures.matryoshka import Matryoshka
from saekit.sae.architectures.standard import Standard
from saekit.sae.architectures.topk import TopK

ARCHITECTURES: dict[str, Architecture] = {
    kind.name: kind for kind in (Standard(), TopK(), BatchTopK(), Matryoshka(), JumpReLU(), Gated())
}

__all__ = ["ARCHITECTURES", "Architecture", "Objective", "Terms"]
