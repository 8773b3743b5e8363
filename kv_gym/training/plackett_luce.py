"""The Plackett-Luce ranking model: slots are drawn one after another, each with odds e^score among those left.

Exact expectations where they have a closed form, else samples and the probabilities of each stage of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_SCORE = -1e4  # score of a slot that does not exist: its exponential and the gradient of that are zero


@dataclass(frozen=True)
class RankingStages:
    """The stages of rankings `[..., n]`; stage t draws the slot of rank t from the slots that are left.

    Attributes:
        ranked_scores: `[..., n]`, scores in the order of the ranking.
        log_normalizer: `[..., n]`, log of the sum of e^score over the slots left at each stage.
        length: m, the number of first stages that are looked at.
    """

    ranked_scores: Tensor
    log_normalizer: Tensor
    length: int

    @classmethod
    def of(cls, scores: Tensor, order: Tensor, length: int | None = None) -> RankingStages:
        """Stages of rankings under scores.

        Args:
            scores: `[..., n]`.
            order: `[..., n]`, slot indices, best first.
            length: number of first stages to look at, behind which the order does not matter; None means all n.
        """
        ranked = scores.gather(-1, order)
        return cls(ranked, ranked.flip(-1).logcumsumexp(-1).flip(-1), length or order.shape[-1])

    @property
    def log_prob(self) -> Tensor:
        """`[..., m]`, log-probability of each draw; their sum is that of the prefix."""
        return (self.ranked_scores - self.log_normalizer)[..., : self.length]

    @property
    def entropy(self) -> Tensor:
        """`[..., m]`, exact entropy of each draw, in nats."""
        return self.log_normalizer[..., : self.length] - self._expectation(self.ranked_scores)

    def divergence(self, other: RankingStages) -> Tensor:
        """`[..., m]`, exact Kullback-Leibler divergence of each draw from that under `other`, for the same order."""
        difference = self._expectation(self.ranked_scores - other.ranked_scores)
        return difference - (self.log_normalizer - other.log_normalizer)[..., : self.length]

    def _expectation(self, values: Tensor) -> Tensor:
        """Expectation of ranked `values` over the next draw, at every stage."""
        weight = (self.ranked_scores - self.ranked_scores.amax(-1, keepdim=True).detach()).clamp(min=-60).exp()
        total = weight.flip(-1).cumsum(-1).flip(-1)
        return ((weight * values).flip(-1).cumsum(-1).flip(-1) / total)[..., : self.length]


def sample_rankings(scores: Tensor, count: int) -> Tensor:
    """`count` independent rankings of scores `[..., n]` by Gumbel-sort: slot indices `[count, ..., n]`, best first."""
    noise = -torch.empty(count, *scores.shape, dtype=scores.dtype, device=scores.device).exponential_().log()
    return (scores + noise).argsort(-1, descending=True)


def expected_rank_cost(scores: Tensor, utility: Tensor, compared: Tensor | None = None) -> Tensor:
    """Expected cost of a ranking drawn by Plackett-Luce scores: the utility-weighted mean rank, in [0, 1].

    Slot j is drawn before slot i with probability sigmoid(f_j - f_i), and the rank of i counts the slots before it:

        E[sum_i u_i rank_i] = sum_i u_i sum_{j != i} sigmoid(f_j - f_i)

    Its gradient is the one that KVP (arXiv 2602.10238, section 4) estimates from samples, exactly.

    Args:
        scores: `[..., n]`, f.
        utility: `[..., n]`, u, non-negative; each row is divided by its own sum (rows without utility cost nothing).
        compared: `[m]`, indices of the slots j, a random subset for long rows (unbiased); None means all.

    Returns:
        Cost `[...]`: the utility-weighted mean of (E[rank_i] + 1/2) / n, near 0 when all utility comes first and
        near 1 when it comes last. The half stems from counting j = i, which is cheap and has no gradient.
    """
    others = scores if compared is None else scores[..., compared]
    share = utility / utility.sum(-1, keepdim=True).clamp(min=1e-12)
    rows = _RankCost.apply(*(x.reshape(-1, x.shape[-1]) for x in (scores, others, share)))
    return rows.view(scores.shape[:-1])


class _RankCost(torch.autograd.Function):
    """Sum over i of share_i times the mean over j of sigmoid(g_j - f_i), for rows of f `[B, n]` and g `[B, m]`.

    Value and gradient are computed together, a few rows at a time: the n x m pairs of a tile stay in the processor's
    cache, and no tensor of all pairs is ever written to memory.
    """

    TILE = 1 << 17  # pairs

    @staticmethod
    def forward(ctx, scores: Tensor, others: Tensor, share: Tensor) -> Tensor:
        m, rows = others.shape[-1], max(1, _RankCost.TILE // (scores.shape[-1] * others.shape[-1]))
        mean_before, grad_scores, grad_others = (torch.empty_like(x) for x in (scores, scores, others))
        for first in range(0, len(scores), rows):
            tile = slice(first, first + rows)
            pairs = (others[tile, None, :] - scores[tile, :, None]).sigmoid_()
            mean_before[tile] = pairs.mean(-1)
            pairs.addcmul_(pairs, pairs, value=-1)  # the slope of the sigmoid
            grad_scores[tile] = pairs.sum(-1)
            grad_others[tile] = (share[tile, None, :] @ pairs)[:, 0]
        ctx.save_for_backward(grad_scores.mul_(share).div_(-m), grad_others.div_(m))
        return (share * mean_before).sum(-1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        grad_scores, grad_others = ctx.saved_tensors
        return grad_scores * upstream[:, None], grad_others * upstream[:, None], None
