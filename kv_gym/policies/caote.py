"""CAOTE: how far the attention output would move if this one token were gone.

Paper: arXiv 2504.14051, section 3. With weights a that sum to one over the slots and output o = sum a_j v_j,
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
from kv_gym.policies.base import Policy
from kv_gym.policies.wrapper import Over

LEAST_REST = 1e-6  # the weight of all other slots, which a single attended slot leaves nothing


@dataclass(frozen=True)
class CAOTE(Over):
    """Change of the KV head's output, L2. Not comparable: every head's values have a scale of their own."""

    over: str | Policy = "snapkv"

    def score(self, view: CacheView) -> Tensor:
        scores = self.base_scores(view)
        weights = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        values = view.values.float()
        centre = self.centre(values, weights, view.valid)
        # differences one by one: expanding the square would lose the small ones, and this needs no copy either
        moved = torch.cdist(values, centre, compute_mode="donot_use_mm_for_euclid_dist")[..., 0]
        return weights / (1 - weights).clamp(min=LEAST_REST) * moved

    def centre(self, values: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """What values are compared with, `[B, H, 1, d]`: the attention output."""
        return weights[:, :, None] @ values
