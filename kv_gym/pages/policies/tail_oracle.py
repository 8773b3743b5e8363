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
        drawn: how many of these are drawn at random from all that may leave; the others are the first of the `order`.
        noise: deviation of what is added to the logarithm of every time to the next use, to learn how exact a
            prediction must be; pages that are not used again count as used after twice the trace.
        order: what shows the candidates that are not drawn: lru, or a policy with queues, see
            :class:`~kv_gym.pages.order.PolicyOrder`.
    """

    needs_future = True
    candidates: int = 16
    drawn: int = 0
    noise: float = 0.0
    order: str = "lru"

    def reset(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def rank(self, candidates: Candidates) -> np.ndarray:
        if not self.noise:
            return -candidates.next_use.astype(float)
        distance = np.minimum(candidates.next_use - candidates.access, 2 * len(candidates.cache.trace))
        return -np.log(distance) - self.noise * self._random.standard_normal(len(candidates))
