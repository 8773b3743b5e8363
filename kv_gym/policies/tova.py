"""TOVA: drop what the newest token ignores; one set of tokens for all heads of a layer.

Differs from the paper in: where heads hold different tokens, a token's absence from a head counts as no attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.scoring.neighbours import mean_over_heads


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the last query, averaged over all query heads of the layer."""

    paper = Paper("Transformers are Multi-State RNNs", "2401.06104", "section 3.2", venue="EMNLP 2024")
    comparable = True

    @property
    def needs_queries(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        return mean_over_heads(group_mean(view.attention(1), view.keys.shape[1]), view)[:, :, 0]
