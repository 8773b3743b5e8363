"""Knorm: keys with a small norm attract attention, so the smallest norms stay.

Paper: arXiv 2406.11430, section 3.
Differs from the paper in: no layer is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Knorm(Policy):
    """Minus the L2 norm of the key."""

    def score(self, view: CacheView) -> Tensor:
        return -view.keys.float().norm(dim=-1)
