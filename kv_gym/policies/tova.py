"""TOVA: drop what the newest token ignores; one set of tokens for all heads of a layer.

Paper: arXiv 2401.06104 (EMNLP 2024), section 3.2.
Differs from the paper in: where heads hold different tokens, a token's absence from a head counts as no attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the last query, averaged over all query heads of the layer."""

    @property
    def needs_queries(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        heads = view.keys.shape[1]
        received = group_mean(view.attention(1)[:, :, 0], heads)
        # by token, not by slot: heads may hold different tokens; in double, so that the order of the sum is no matter
        token = view.positions.clamp(min=0).flatten(1)
        total = received.new_zeros(len(token), int(view.seen.max()) + 1).double()
        total.scatter_add_(1, token, received.flatten(1).double())
        return (total.gather(1, token).view_as(received) / heads).float()
