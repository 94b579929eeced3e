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
    from saekit.lens.direct import logit_attribution as logit_attribution
    from saekit.lens.logit_lens import logit_lens as logit_lens
    from saekit.lens.patching import feature_effects as feature_effects
    from saekit.lens.reading import read as read
    from saekit.lm import load_model as load_model
    from saekit.sae import SAE as SAE
    from saekit.sae.releases import releases as releases
    from saekit.steering.compare import compare as compare
    from saekit.steering.directions import Direction as Direction
    from saekit.steering.directions import Prefix as Prefix
    from saekit.steering.edits import Edit as Edit
    from saekit.steering.generate import generate as generate
    from saekit.steering.generate import stream as stream
    from saekit.steering.probes import fit_probe as fit_probe
    from saekit.steering.steer import edited as edited
    from saekit.steering.steer import steer as steer
    from saekit.steering.sweep import sweep as sweep
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
    "Prefix": "saekit.steering.directions",
    "fit_probe": "saekit.steering.probes",
    "Edit": "saekit.steering.edits",
    "steer": "saekit.steering.steer",
    "edited": "saekit.steering.steer",
    "compare": "saekit.steering.compare",
    "generate": "saekit.steering.generate",
    "stream": "saekit.steering.generate",
    "sweep": "saekit.steering.sweep",
    "read": "saekit.lens.reading",
    "logit_lens": "saekit.lens.logit_lens",
    "logit_attribution": "saekit.lens.direct",
    "feature_effects": "saekit.lens.patching",
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
