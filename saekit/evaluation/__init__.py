"""How well SAEs reconstruct activations, how faithful the model stays to itself with them, and what they separate."""

from saekit.evaluation.front import pareto, pareto_front, pareto_of_sweep
from saekit.evaluation.labelled import read_labelled
from saekit.evaluation.measure import Evaluation, assess, evaluate
from saekit.evaluation.probing import probe
from saekit.evaluation.synthetic import Superposition, recovery

__all__ = [
    "Evaluation",
    "Superposition",
    "assess",
    "evaluate",
    "pareto",
    "pareto_front",
    "pareto_of_sweep",
    "probe",
    "read_labelled",
    "recovery",
]
