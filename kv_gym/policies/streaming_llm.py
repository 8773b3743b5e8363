"""StreamingLLM: the first tokens (attention sinks) and a sliding window of recent ones.

Differs from the paper in: keys keep their original rotary positions; the paper counts positions inside the
cache, as `streaming_llm_reindexed` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Recency with the first four tokens protected."""

    paper = Paper(
        "Efficient Streaming Language Models with Attention Sinks", "2309.17453", "section 3", venue="ICLR 2024"
    )
    sinks = 4
    comparable = True
    static = True

    def score(self, view: CacheView) -> Tensor:
        return view.positions.float()
