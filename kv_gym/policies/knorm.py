"""Knorm: keys with a small norm attract attention, so the smallest norms stay.

Paper: arXiv 2406.11430, section 3.
Differs from the paper in: no layer is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class Knorm(Policy):
    """Minus the L2 norm of the key. Not comparable: every head's projection has a scale of its own."""

    static = True

    def score(self, view: CacheView) -> Tensor:
        return -torch.linalg.vector_norm(
            view.keys, dim=-1, dtype=torch.promote_types(view.keys.dtype, torch.float32)
        ).float()
