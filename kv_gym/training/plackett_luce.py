"""The Plackett-Luce ranking model: slots are drawn one after another, each with odds e^f among those that are left.

Exact expectations where there are any, else samples and what every stage of a sample says of the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = -1e4  # the score of a slot that is not there: exp of it is zero, its gradient too


@dataclass(frozen=True)
class Stages:
    """The stages of rankings `[..., n]` under scores f; stage t draws the slot of rank t from those that are left.

    Attributes:
        ranked: f in the order of the ranking.
        left: log of the sum of e^f over the slots that are left at each stage.
        length: m, how many of the first draws are looked at.
    """

    ranked: Tensor
    left: Tensor
    length: int

    @classmethod
    def of(cls, scores: Tensor, order: Tensor, length: int | None = None) -> Stages:
        """Stages of `order`, slot indices `[..., n]`, under scores `[..., n]`; None keeps all n of them.

        Only the first `length` draws are looked at, and behind them the order does not matter.
        """
        ranked = scores.gather(-1, order)
        return cls(ranked, ranked.flip(-1).logcumsumexp(-1).flip(-1), length or order.shape[-1])

    @property
    def log_prob(self) -> Tensor:
        """`[..., m]`, log-probability of each draw; their sum is that of the prefix."""
        return (self.ranked - self.left)[..., : self.length]

    @property
    def entropy(self) -> Tensor:
        """`[..., m]`, exact entropy of each draw, in nats."""
        return self.left[..., : self.length] - self._mean_of_left(self.ranked)

    def divergence(self, other: Stages) -> Tensor:
        """Exact Kullback-Leibler divergence `[..., m]` of each draw from that under `other`, for the same order."""
        gap = self._mean_of_left(self.ranked - other.ranked)
        return gap - (self.left - other.left)[..., : self.length]

    def _mean_of_left(self, values: Tensor) -> Tensor:
        """Expectation of `values` (ranked) over the next draw, at every stage."""
        weight = (self.ranked - self.ranked.amax(-1, keepdim=True).detach()).clamp(min=-60).exp()
        total = weight.flip(-1).cumsum(-1).flip(-1)
        return ((weight * values).flip(-1).cumsum(-1).flip(-1) / total)[..., : self.length]


def sample_rankings(scores: Tensor, count: int) -> Tensor:
    """`count` independent rankings, slot indices `[count, ..., n]`, best first, by sorting f plus Gumbel noise."""
    noise = -torch.empty(count, *scores.shape, dtype=scores.dtype, device=scores.device).exponential_().log()
    return (scores + noise).argsort(-1, descending=True)


def expected_rank_cost(scores: Tensor, worth: Tensor, against: Tensor | None = None) -> Tensor:
    """Expected cost of a ranking drawn with Plackett-Luce scores: the mean rank of the worth, in [0, 1].

    A slot's rank counts the slots drawn before it, and j is drawn before i with probability sigmoid(f_j - f_i),
    so that E[sum_i w_i rank_i] = sum_i w_i sum_{j != i} sigmoid(f_j - f_i): the gradient that KVP (arXiv
    2602.10238) estimates with RLOO samples, exactly.

    Args:
        scores: `[..., n]`, f.
        worth: `[..., n]` non-negative, w; each row is weighed by its own sum (rows without worth cost nothing).
        against: indices `[m]` of the slots to count, a random subset for long rows (unbiased); None counts all.

    Returns:
        Cost `[...]`: the worth-weighted mean of (E[rank_i] + 1/2) / n, so about 0 when all worth comes first and
        about 1 when it comes last; the half is the slot itself, which costs nothing to count and moves no gradient.
    """
    others = scores if against is None else scores[..., against]
    share = worth / worth.sum(-1, keepdim=True).clamp(min=1e-12)
    rows = _RankCost.apply(*(x.reshape(-1, x.shape[-1]) for x in (scores, others, share)))
    return rows.view(scores.shape[:-1])


class _RankCost(torch.autograd.Function):
    """Sum over i of share_i times the mean over j of sigmoid(g_j - f_i), for rows of f `[B, n]` and g `[B, m]`.

    The gradient is taken along with the value, a few rows at a time: the n x m pairs of a tile stay in the processor's
    cache, and no tensor of all pairs is ever written to memory.
    """

    TILE = 1 << 17  # pairs

    @staticmethod
    def forward(ctx, scores: Tensor, others: Tensor, share: Tensor) -> Tensor:
        m, rows = others.shape[-1], max(1, _RankCost.TILE // (scores.shape[-1] * others.shape[-1]))
        before, slope_scores, slope_others = (
            torch.empty_like(scores),
            torch.empty_like(scores),
            torch.empty_like(others),
        )
        for first in range(0, len(scores), rows):
            tile = slice(first, first + rows)
            pairs = (others[tile, None, :] - scores[tile, :, None]).sigmoid_()
            before[tile] = pairs.mean(-1)
            pairs.addcmul_(pairs, pairs, value=-1)  # the slope of the sigmoid
            slope_scores[tile] = pairs.sum(-1)
            slope_others[tile] = (share[tile, None, :] @ pairs)[:, 0]
        ctx.save_for_backward(slope_scores.mul_(share).div_(-m), slope_others.div_(m))
        return (share * before).sum(-1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        of_scores, of_others = ctx.saved_tensors
        return of_scores * upstream[:, None], of_others * upstream[:, None], None
