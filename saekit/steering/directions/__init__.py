"""Directions: vectors [D] at a site, where they come from, and what they are made of.

states ─▶ sources ─▶ direction ─▶ parts (in an SAE's features)
             └─▶ probe      └─▶ files, prefix
"""

from saekit.steering.directions.direction import Direction as Direction
from saekit.steering.directions.prefix import Prefix as Prefix
