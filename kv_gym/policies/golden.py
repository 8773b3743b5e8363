"""Golden Eviction: the most attention that any later block of queries pays.

Paper: ForesightKV, arXiv 2602.03203 (ICML 2026), the oracle that its scorer is distilled from.
Differs from the paper in: the maximum runs over the blocks of every recorded continuation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Golden(Policy):
    """Maximum over blocks of the mean attention per query and query head."""

    needs_future = True
    comparable = True

    def score(self, view: CacheView) -> Tensor:
        if view.future is None:
            raise UserError("policy 'golden' sees the future and none is recorded here: evaluate it on traces")
        return view.future.attention[..., 1].amax(-1)
