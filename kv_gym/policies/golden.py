"""Golden Eviction: the most attention that any later block of queries pays.

The oracle that ForesightKV's scorer is distilled from: before block t of the
text that follows, a token's score is the maximum over the blocks from t on of the mean attention per query and query
head. `block` is that t; the default, 0, ranks once for the whole future, and counting it up while blocks go by is the
sequential oracle as published (blocks of 256 queries, the newest 256 tokens always kept).
Differs from the paper in: the maximum runs over the blocks of every recorded continuation; blocks are as long as they
were recorded; the newest tokens are protected only if the caller says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy, recorded_future


@dataclass(frozen=True)
class Golden(Policy):
    """Maximum over blocks of the mean attention per query and query head.

    Attributes:
        block: the first block of each continuation that counts; past the last one every score is 0.
    """

    paper = Paper(
        "ForesightKV: Optimizing KV Cache Eviction for Reasoning Models by Learning Long-Term Contribution",
        "2602.03203",
        venue="ICML 2026",
    )
    needs_future = True
    comparable = True
    block: int = 0

    def __post_init__(self) -> None:
        self._require(self.block >= 0, "block from 0")

    def score(self, view: CacheView) -> Tensor:
        future = recorded_future(self, view)
        # attention is never negative
        return future.attention[..., 1].masked_fill(future.block_numbers < self.block, 0.0).amax(-1)
