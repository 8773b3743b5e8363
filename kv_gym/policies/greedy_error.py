"""Greedy output error: drop tokens one by one, each time the one whose loss moves the later outputs least.

The set form of CAOTE's error, |sum over E of a_j (y - v_j)| / (1 - sum over E of a_j) for
an evicted set E, minimised greedily backwards over the recorded future.
Limits: a trace holds the mean attention of each block of later queries, not every query's, so the error is
that of a block's mean output and bounds the mean error of its queries from below; and it does not hold the values of
the continuation's own tokens, so the attention that goes to them counts as if it read the block's mean over the
context. Protection is not known while scoring: what it saves is scored as if it could go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy, recorded_future

LEAST_REMAINING = 1e-6  # attention of the slots that stay, at least
ROUNDING = 1e-12  # of the largest squared value; errors below it are rounding


@dataclass(frozen=True)
class GreedyError(Policy):
    """Minus the number of slots of the head that outlast this one. Not comparable: ranks of heads have no common scale.

    Quadratic in tokens: n rounds of n * blocks * head_dim products per head.
    """

    paper = Paper(
        "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction", "2504.14051", "section 3"
    )
    needs_future = True

    def score(self, view: CacheView) -> Tensor:
        future = recorded_future(self, view)
        # oldest first, padding last: of equal tokens the older goes first, wherever it lies
        order = view.positions.masked_fill(~view.valid, torch.iinfo(torch.int64).max).argsort(-1)
        valid = view.valid.gather(-1, order)
        values = view.values.float().gather(2, order[..., None].expand_as(view.values))
        received = future.attention[..., 1].float().gather(2, order[..., None].expand(-1, -1, -1, len(future.weights)))
        attention = received.masked_fill(~valid[..., None], 0.0).transpose(-1, -2)  # [B, H, K, n]
        context_attention = attention.sum(-1, keepdim=True).clamp(min=LEAST_REMAINING)  # [B, H, K, 1]
        output = attention @ values / context_attention  # [B, H, K, d], the mean over the context
        distance = torch.cdist(output, values, compute_mode="donot_use_mm_for_euclid_dist").square_()
        largest = values.square().sum(-1).masked_fill(~valid, 0.0).amax(-1)[..., None, None]
        shift = torch.zeros_like(output)
        evicted = torch.zeros_like(context_attention)
        remaining = torch.ones_like(valid)
        scores = torch.zeros(valid.shape, device=values.device)
        for outlasting in range(values.shape[2] - 1, -1, -1):
            # |shift + a (y - v)|^2 with the square expanded: nothing of the size blocks x tokens x channels
            alignment = (shift * output).sum(-1, keepdim=True) - shift @ values.transpose(-1, -2)
            error = shift.square().sum(-1, keepdim=True) + attention * (2 * alignment + attention * distance)
            error.masked_fill_(error <= ROUNDING * largest, 0.0)
            error /= (1 - evicted - attention).clamp_(min=LEAST_REMAINING).square_()
            cost = (future.weights[:, None] * error).sum(2)
            cost = cost.masked_fill(~valid, float("-inf")).masked_fill(~remaining, float("inf"))  # padding goes at once
            victim = cost.argmin(-1, keepdim=True)  # [B, H, 1]
            scores.scatter_(-1, victim, -float(outlasting))
            remaining.scatter_(-1, victim, False)
            weight = attention.gather(-1, victim[:, :, None].expand(-1, -1, attention.shape[2], -1))  # [B, H, K, 1]
            value = values.gather(2, victim[..., None].expand(-1, -1, -1, values.shape[-1]))  # [B, H, 1, d]
            shift += weight * (output - value)
            evicted += weight
        return torch.empty_like(scores).scatter_(-1, order, scores)
