"""Exact expectations under the Plackett-Luce ranking model: no sampling, no baseline, no variance."""

from __future__ import annotations

from torch import Tensor


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
    before = (others[..., None, :] - scores[..., :, None]).sigmoid().mean(-1)  # [..., n], in [0, 1]
    total = worth.sum(-1, keepdim=True).clamp(min=1e-12)
    return (worth / total * before).sum(-1)
