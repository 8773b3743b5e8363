"""CAOTE: how far the attention output would move without this token.

With weights a that sum to one over the slots and output o = sum a_j v_j,
dropping slot j and renormalising moves the output by exactly a_j / (1 - a_j) * |o - v_j|. The weights are any
attention-like scores divided by their sum.
Differs from the paper in: one set of weights per KV head, the base's own scores (for grouped queries the paper does
not say which); a base with negative scores, which is no attention, gives the softmax of its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.wrapper import PolicyWrapper

LEAST_REST = 1e-6  # the weight of all other slots, at least: a head may attend to one slot alone


@dataclass(frozen=True)
class CAOTE(PolicyWrapper):
    """Change of the KV head's output, L2. Not comparable: every head's values have a scale of their own."""

    paper = Paper(
        "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction", "2504.14051", "section 3"
    )
    over: str | Policy = "snapkv"

    def score(self, view: CacheView) -> Tensor:
        scores = self.base_scores(view)
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        values = view.values.float()
        centre = self.centre(values, weights, view.valid)
        # differences one by one: expanding the square would lose the small ones, and this needs no copy either
        distance = torch.cdist(values, centre, compute_mode="donot_use_mm_for_euclid_dist")[..., 0]
        return weights / (1 - weights).clamp(min=LEAST_REST) * distance

    def centre(self, values: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """What values are compared with, `[B, H, 1, d]`: the attention output."""
        return weights[:, :, None] @ values
