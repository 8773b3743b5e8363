"""Golden Eviction: the most attention that any later block of queries pays.

Paper: ForesightKV, arXiv 2602.03203 (ICML 2026), the oracle that its scorer is distilled from: before block t of the
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
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Golden(Policy):
    """Maximum over blocks of the mean attention per query and query head.

    Attributes:
        block: the first block of each continuation that counts; past the last one every score is 0.
    """

    needs_future = True
    comparable = True
    block: int = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise UserError(f"golden got block={self.block}; expected a number from 0")

    def score(self, view: CacheView) -> Tensor:
        if view.future is None:
            raise UserError("policy 'golden' sees the future and none is recorded here: evaluate it on traces")
        # attention is never negative
        return view.future.attention[..., 1].masked_fill(view.future.numbers < self.block, 0.0).amax(-1)
