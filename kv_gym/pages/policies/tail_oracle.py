"""The tail oracle: Belady among the K least recently used pages. It bounds every policy that is shown these K.

No paper; the bound of the design of Cold-RL (arXiv 2508.12485), whose agent chooses among the LRU tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.cache import Candidates
from kv_gym.pages.policies.base import PageRankingPolicy


@dataclass(eq=False)
class TailOracle(PageRankingPolicy):
    """Farthest next use among the candidates.

    Attributes:
        candidates: how many pages it chooses among.
        drawn: how many of these are drawn at random from all that may leave; the others are the least recently used.
    """

    needs_future = True
    candidates: int = 16
    drawn: int = 0

    def rank(self, candidates: Candidates) -> np.ndarray:
        return -candidates.next_use.astype(float)
