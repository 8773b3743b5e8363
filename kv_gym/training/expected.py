"""The agent `expected`: each head ranks its own slots, by the exact gradient of the expected rank cost.

What KVP (arXiv 2602.10238) optimises, with its sampled gradient (RLOO) replaced by the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_gym.devices import to_device
from kv_gym.training.learner import LossLearner, Metrics
from kv_gym.training.losses import COMPARED_SLOTS
from kv_gym.training.plackett_luce import expected_rank_cost


class Expected(LossLearner):
    """Each head ranks its own slots, by the exact gradient of the expected rank cost.

    Every slot is compared with at most 128 others, drawn anew at every step (an unbiased estimate).
    """

    def loss(self, scores: Tensor, utility: Tensor) -> tuple[Tensor, Metrics]:
        """Every head's rank cost."""
        n = scores.shape[-1]
        compared = torch.randperm(n)[:COMPARED_SLOTS] if n > COMPARED_SLOTS else None
        compared = None if compared is None else to_device(compared, scores.device)
        return expected_rank_cost(scores, utility, compared).mean(), {}
