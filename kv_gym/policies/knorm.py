"""Knorm: keys with a small norm attract attention, so the smallest norms stay.

Differs from the paper in: every layer evicts (the paper leaves the first ones full).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class Knorm(Policy):
    """Minus the L2 norm of the key. Not comparable: every head's projection has a scale of its own."""

    paper = Paper("A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", "2406.11430", "section 3")
    static = True

    def score(self, view: CacheView) -> Tensor:
        return -torch.linalg.vector_norm(
            view.keys, dim=-1, dtype=torch.promote_types(view.keys.dtype, torch.float32)
        ).float()
