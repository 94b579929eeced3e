"""How well an SAE reconstructs activations, and how faithful the model stays to itself with it spliced in."""

from saekit.evaluation.measure import evaluate

__all__ = ["evaluate"]
