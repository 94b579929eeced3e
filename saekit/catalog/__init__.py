"""The feature catalog: what each latent fires on, how strongly, what it makes the model say, what is near it."""

from saekit.catalog.feature import Context, Feature
from saekit.catalog.parts import merge
from saekit.catalog.store import Catalog

__all__ = ["Catalog", "Context", "Feature", "merge"]
