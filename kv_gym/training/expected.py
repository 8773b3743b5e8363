"""The agent `expected`: each head ranks its own slots, by the exact gradient of the expected rank cost.

What KVP (arXiv 2602.10238) optimises, with its sampled gradient (RLOO) replaced by the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_gym.training.learner import LossLearner, Told
from kv_gym.training.plackett_luce import expected_rank_cost


def expected_loss(scores: Tensor, utility: Tensor, compared: int = 128) -> Tensor:
    """Mean expected rank cost over contexts and heads.

    Args:
        scores: `[contexts, heads, n]`.
        utility: same shape, non-negative.
        compared: slots that each slot is compared with, drawn anew at every step (an unbiased estimate).
    """
    n = scores.shape[-1]
    against = torch.randperm(n)[:compared] if n > compared else None
    return expected_rank_cost(scores, utility, against).mean()


class Expected(LossLearner):
    """Descends :func:`expected_loss`."""

    def loss(self, scores: Tensor, worth: Tensor) -> tuple[Tensor, Told]:
        """Every head's rank cost."""
        return expected_loss(scores, worth), {}
