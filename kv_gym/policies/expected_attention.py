"""Expected Attention: the attention that a Gaussian of future queries would pay on average, times the value's norm.

With queries q ~ N(mu, Sigma) the mean of exp(q.k * c) is
exp(c mu.k + c^2 k.Sigma.k / 2), c the scaling; it is softmaxed over the slots per query head, averaged over the
group and multiplied by the L2 norm of the value.
Differs from the paper in: mu and Sigma are those of the last `window` queries as they were used, rotary embedding
included. The paper takes the queries of the whole prompt before the embedding, and turns both by the mean rotation of
the next 512 positions, which needs the model's rotation; here the rotations of the window's own positions stand for
those of the future ones. Sinks take part in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView, group_mean
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Mean of the query heads' expected attention, plus `epsilon`, times the norm of the value.

    Not comparable: every head's values have a scale of their own.

    Attributes:
        window: queries whose statistics stand for the future's.
        covariance: with the second moment; else the mean alone.
        value_norm: multiply by the value's norm; do not under a policy that weighs values itself.
        epsilon: added before that, so that unattended tokens compare by their values.
    """

    paper = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
        "2510.00636",
    )
    sinks = 4
    window: int = 32
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        self._require(self.window >= 1 and self.epsilon >= 0, "window from 1 and epsilon from 0")

    @property
    def needs_queries(self) -> int:
        return self.window

    def score(self, view: CacheView) -> Tensor:
        if view.queries is None:
            raise ValueError("this view holds no queries, and expected_attention declares that it needs them")
        heads, d = view.keys.shape[1], view.keys.shape[-1]
        sample = view.queries[:, :, -self.window :].float().unflatten(1, (heads, -1))  # [B, H, g, m, d]
        sample = sample * (d**-0.5 if view.scaling is None else view.scaling)
        # the moments of a linear map of the queries are those of its values: no d x d matrix, no inverse
        products = (sample.flatten(2, 3) @ view.keys.float().transpose(-1, -2)).unflatten(2, sample.shape[2:4])
        # a row that has seen fewer tokens has fewer queries
        real = torch.arange(1 - sample.shape[3], 1, device=sample.device) + view.seen[:, None] > 0  # [B, m]
        weights = (real / real.sum(-1, keepdim=True).clamp(min=1))[:, None, None, None]  # [B, 1, 1, 1, m]
        mean = weights @ products  # [B, H, g, 1, n]
        exponent = mean[:, :, :, 0]
        if self.covariance:
            exponent = exponent + (weights @ products.sub_(mean).square_())[:, :, :, 0] / 2
        # every future query comes after every slot: nothing is hidden but padding
        exponent = exponent.masked_fill(~view.valid[:, :, None], float("-inf"))
        attention = group_mean(exponent.softmax(-1).nan_to_num(0.0).flatten(1, 2), heads)
        if not self.value_norm:
            return attention
        return (attention + self.epsilon) * torch.linalg.vector_norm(
            view.values, dim=-1, dtype=torch.promote_types(view.values.dtype, torch.float32)
        ).float()
