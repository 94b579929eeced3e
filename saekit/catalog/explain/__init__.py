"""What features mean, by whom it is said, and how well that predicts them."""

from saekit.catalog.explain.answers import Answer, Client, Prompt
from saekit.catalog.explain.endpoint import Endpoint
from saekit.catalog.explain.local import Local
from saekit.catalog.explain.protocol import Cost, Explained, Plan, explain, plan, strongest
from saekit.catalog.explain.rules import Tally, without_llm
from saekit.catalog.explain.saying import note

__all__ = [
    "Answer",
    "Client",
    "Cost",
    "Endpoint",
    "Explained",
    "Local",
    "Plan",
    "Prompt",
    "Tally",
    "explain",
    "note",
    "plan",
    "strongest",
    "without_llm",
]
