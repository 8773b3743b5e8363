"""CriticalKV: half the budget by the base's scores, the rest by those times the projected value's norm.

Constants are those of kvpress. Stage 1 takes the best floor(budget / 2) tokens of the
base, those that the base protects first, so that a window as large as that leaves the rest to stage 2. Stage 2 orders
the others by (score + 1e-4) * |v W|, the L1 norm of what the value adds to the layer's output, averaged over the query
heads of the KV head.
Differs from the paper in: a protection that the caller sets in place of the base's own is not known here; a base with
negative scores gives the softmax of its scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper, Policy
from kv_gym.policies.scoring.neighbours import rank
from kv_gym.policies.wrapper import PolicyWrapper

CHUNK = 2**22  # numbers of projected values held at once


@dataclass(frozen=True)
class CriticalKV(PolicyWrapper):
    """Stage 1 scores from 2 to 3, in the base's order; stage 2 from 0 to 1.

    Not comparable: both stages are divided by the head's own largest score.

    Attributes:
        over: the base; without a value norm of its own.
        first_stage: share of the budget that the base alone decides.
        epsilon: added to scores before they are multiplied.
    """

    paper = Paper(
        "CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective",
        "2502.03805",
        venue="ICML 2026",
    )
    needs_output = True
    prompt_only = True
    over: str | Policy = "snapkv"
    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.first_stage <= 1 and self.epsilon >= 0, "first_stage from 0 to 1 and epsilon from 0")

    def score(self, view: CacheView) -> Tensor:
        if view.output is None:
            raise UserError(
                "policy 'critical_kv' weighs values by the output projection, which is not kept here: choose a policy "
                "without it, such as 'caote'"
            )
        scores = self.base_scores(view)
        # protected slots first: the bases of the paper's code put their own windows on top
        ranks = rank(scores.masked_fill(view.protected(*self.protection), float("inf")), view)
        first = ranks < (view.budget * self.first_stage).long()[..., None]
        second = (scores + self.epsilon) * projected_norm(view.values, view.output)
        return torch.where(first, 2 + _scaled(scores), _scaled(second.masked_fill(~view.valid, 0.0)))


def projected_norm(values: Tensor, output: Tensor) -> Tensor:
    """Mean over the query heads of each KV head of the L1 norm of ``values @ output``, `[B, H, n]` float32.

    Args:
        values: `[B, H, n, d]`.
        output: `[Hq, d, D]`, the query heads of one KV head next to each other.
    """
    batch, heads, n, _ = values.shape
    grouped = output.float().unflatten(0, (heads, -1))  # [H, g, d, D]
    norms = torch.zeros(batch, heads, n, device=values.device)
    step = max(1, CHUNK // (batch * heads * output.shape[-1]))
    for start in range(0, n, step):
        chunk = values[:, :, start : start + step].float()
        for projection in grouped.unbind(1):
            norms[:, :, start : start + step] += torch.linalg.vector_norm(chunk @ projection, ord=1, dim=-1)
    return norms / grouped.shape[1]


def _scaled(scores: Tensor) -> Tensor:
    return scores / scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
