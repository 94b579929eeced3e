"""What one streaming pass keeps: state of O(S · contexts), never [tokens × S].

    unit of corpus rows ──▶ State ──▶ moments        how often and how strongly
                                  ├─▶ token_table    on which tokens
                                  ├─▶ contexts       where: the strongest, and some of each band
                                  ├─▶ firing         together with which other latents
                                  ├─▶ norms          residual norms: the median, sinks
                                  └─▶ rows           the rows referred to, and all activations on a few

All of it is exact or drawn by number (`draws`), so units may come in any order, in any number of states that are merged
in any order, saved and loaded in between: the results are the same to the bit.
"""

from saekit.catalog.accumulate.batch import UNIT_ROWS, Firings, Unit
from saekit.catalog.accumulate.contexts import Contexts, band_of
from saekit.catalog.accumulate.firing import Neighbours
from saekit.catalog.accumulate.grouping import rank_in_group
from saekit.catalog.accumulate.moments import Moments, bin_edges
from saekit.catalog.accumulate.rows import Corpus, Sample
from saekit.catalog.accumulate.state import SINK, State
from saekit.catalog.accumulate.token_table import Ranked

__all__ = [
    "SINK",
    "UNIT_ROWS",
    "Contexts",
    "Corpus",
    "Firings",
    "Moments",
    "Neighbours",
    "Ranked",
    "Sample",
    "State",
    "Unit",
    "band_of",
    "bin_edges",
    "rank_in_group",
]
