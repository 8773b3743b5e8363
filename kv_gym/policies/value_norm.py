"""Value norm: tokens with a large value change the attention output most when they are attended to, so they stay.

VATP, the paper, multiplies attention scores by the L1 norm of the value.
Differs from the paper in: the norm alone, without the attention, to see what it is worth. Sign: largest first.
Attention sinks have small values, so the first four tokens are protected (the paper protects sinks too).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class ValueNorm(Policy):
    """L1 norm of the value. Not comparable: every head's projection has a scale of its own."""

    paper = Paper(
        "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also Matters",
        "2406.12335",
        venue="EMNLP 2024",
    )
    sinks = 4
    static = True

    def score(self, view: CacheView) -> Tensor:
        return torch.linalg.vector_norm(
            view.values, ord=1, dim=-1, dtype=torch.promote_types(view.values.dtype, torch.float32)
        ).float()
