"""vLLM's prefix cache: the block that became free first leaves; a request frees its blocks from the tail to the head.

Source: vLLM v1, `vllm/v1/core/block_pool.py`, as read in 2026. Differs from it in: equal blocks are one block, and a
request may hit all of its blocks, where vLLM computes at least the last token anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kv_gym.pages.cache import Candidates
from kv_gym.pages.policies.base import PageRankingPolicy


@dataclass(eq=False)
class VLLMPrefixLRU(PageRankingPolicy):
    """The first of the free queue."""

    candidates: int = 1

    def rank(self, candidates: Candidates) -> np.ndarray:
        return np.arange(len(candidates), dtype=float)
