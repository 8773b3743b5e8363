"""LagKV: a token stays if its key and value vary much on the scale of the tokens that come right after it.

After the sinks the cache is cut into chunks of `lag` tokens. Every channel of a
chunk is normalised by the minimum and maximum that it has in the next chunk; a token's deviation over channels,
softmaxed over its chunk, is its score, keys and values summed. Every chunk keeps the same share of its tokens, so the
score is the rank in the chunk. The last full chunk and what comes after it have no reference yet and stay.
Defaults are those of kvpress (4 sinks, chunks of 128). The authors' code has 16 and 1024: contexts below 2,064 tokens
would have no scored token at all.
Differs from the paper in: nothing is remembered, so tokens that survived a cut are cut into chunks and scored again;
a channel that is constant in the reference does not divide by zero; at a fixed budget what stays unscored fills it
first, newest first, so a budget below twice the chunk is a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class LagKV(Policy):
    """Rank within the chunk, from 0 to below 1; unscored tokens have 1.

    Not comparable: ranks of different heads have no common scale.

    Attributes:
        lag: tokens per chunk, and the recent tokens that are protected.
        first: sinks, which belong to no chunk.
    """

    paper = Paper("LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", "2504.04704")
    lag: int = 128
    first: int = 4

    def __post_init__(self) -> None:
        self._require(self.lag >= 1 and self.first >= 0, "lag from 1 and first from 0")

    @property
    def protection(self) -> tuple[int, int]:
        return self.first, self.lag

    def score(self, view: CacheView) -> Tensor:
        batch, heads, n, _ = view.keys.shape
        scores = torch.ones(batch, heads, n, device=view.keys.device)
        chunks = n // self.lag
        if chunks < 2:
            return scores
        body = view.valid & (view.positions >= self.first)
        order = view.positions.masked_fill(~body, torch.iinfo(torch.int64).max).argsort(-1)
        order = order[..., : chunks * self.lag]
        deviation = self._deviation(view.keys, order) + self._deviation(view.values, order)
        # of two equal tokens the newer has the higher rank
        rank = deviation.argsort(dim=-1, stable=True).argsort(-1) / self.lag  # [B, H, chunks - 1, lag]
        # a head with fewer tokens has fewer chunks, and the last full one is only a reference
        full = torch.arange(2, chunks + 1, device=rank.device) * self.lag <= body.sum(-1, keepdim=True)
        rank = torch.where(full[..., None], rank, 1.0)
        return scores.scatter_(-1, order[..., : (chunks - 1) * self.lag], rank.flatten(2))

    def _deviation(self, states: Tensor, order: Tensor) -> Tensor:
        """`[B, H, chunks - 1, lag]`: softmax over the chunk of the deviation over normalised channels."""
        d = states.shape[-1]
        chunked = states.gather(2, order[..., None].expand(-1, -1, -1, d)).float().unflatten(2, (-1, self.lag))
        low, high = chunked[:, :, 1:].amin(3, keepdim=True), chunked[:, :, 1:].amax(3, keepdim=True)
        normalised = (chunked[:, :, :-1] - low).div_((high - low).clamp_(min=1e-6))
        # the standard deviation in two passes: torch's own takes five times as long
        centred = normalised.sub_(normalised.mean(-1, keepdim=True))
        return (torch.linalg.vector_norm(centred, dim=-1) / max(1, d - 1) ** 0.5).softmax(-1)
