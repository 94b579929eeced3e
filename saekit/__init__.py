"""saekit: train sparse autoencoders on language models, read their features, and steer with them.

The public names are imported when first used, so that `import saekit` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saekit.activations import Activations as Activations
    from saekit.catalog import Catalog as Catalog
    from saekit.errors import SaekitError as SaekitError
    from saekit.evaluation import evaluate as evaluate
    from saekit.lm import load_model as load_model
    from saekit.sae import SAE as SAE
    from saekit.sae.releases import releases as releases
    from saekit.steering.compare import compare as compare
    from saekit.steering.directions import Direction as Direction
    from saekit.steering.edits import Edit as Edit
    from saekit.steering.steer import steer as steer
    from saekit.tokens import tokenize as tokenize
    from saekit.training.run import train as train
    from saekit.training.trainer import Trainer as Trainer

_PLACES = {
    "load_model": "saekit.lm",
    "tokenize": "saekit.tokens",
    "Activations": "saekit.activations",
    "SAE": "saekit.sae",
    "releases": "saekit.sae.releases",
    "Trainer": "saekit.training.trainer",
    "train": "saekit.training.run",
    "evaluate": "saekit.evaluation",
    "Catalog": "saekit.catalog",
    "Direction": "saekit.steering.directions",
    "Edit": "saekit.steering.edits",
    "steer": "saekit.steering.steer",
    "compare": "saekit.steering.compare",
    "SaekitError": "saekit.errors",
}

__all__ = [*_PLACES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
