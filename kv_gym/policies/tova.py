"""TOVA: drop what the newest token ignores; one set of tokens for all heads of a layer.

Paper: arXiv 2401.06104 (EMNLP 2024), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class TOVA(Policy):
    """Attention of the last query, averaged over all query heads of the layer."""

    @property
    def needs_queries(self) -> int:
        return 1

    def score(self, view: CacheView) -> Tensor:
        return view.attention(1).mean((1, 2))[:, None].expand(-1, view.keys.shape[1], -1)
