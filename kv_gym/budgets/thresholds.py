"""What rules share that set one threshold over several heads: scores made comparable, and the exact cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kv_gym.budgets.allocation import Allocation
from kv_gym.budgets.order import LOWEST, inverse_permutation, keep_order
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


def _raw(scores: Tensor, view: CacheView) -> Tensor:
    """As they are, on the caller's word."""
    return scores


def _rank(scores: Tensor, view: CacheView) -> Tensor:
    """The share of the head's slots that go earlier, in [0, 1): heads of equal length get equal budgets."""
    slots = view.valid.sum(-1, keepdim=True)
    return ((slots - 1 - inverse_permutation(keep_order(scores, view))).double() / slots.clamp(min=1)).float()


def _softmax(scores: Tensor, view: CacheView) -> Tensor:
    """Logarithm of the softmax over the head's slots: what a slot holds of its head's mass."""
    return scores.double().masked_fill(~view.valid, float("-inf")).log_softmax(-1).float()


def _zscore(scores: Tensor, view: CacheView) -> Tensor:
    """Standard deviations above the head's mean; a head of equal scores gets zeros."""
    # in double precision, so that ties between heads do not hang on the order in which slots are summed
    scores, valid = scores.double(), view.valid.double()
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    centred = scores.masked_fill(~view.valid, 0.0)
    centred = (centred - centred.sum(-1, keepdim=True) / count) * valid
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return (centred / deviation.clamp(min=1e-12)).float()


NORMALISATIONS: dict[str, Callable[[Tensor, CacheView], Tensor]] = {
    "raw": _raw, "rank": _rank, "softmax": _softmax, "zscore": _zscore,
}  # fmt: skip
"""Ways to make scores of different heads comparable: each takes scores and a view, and keeps the order in a head."""


@dataclass(frozen=True)
class ThresholdAllocation(Allocation):
    """A rule that sets one threshold over several heads.

    Attributes:
        normalisation: how scores are made comparable across heads, or "" to compare them as they are.
    """

    syntax = f"[:{'|'.join(NORMALISATIONS)}]"
    normalisation: str = ""

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return cls(setting) if setting in ("", *NORMALISATIONS) else None

    @property
    @abstractmethod
    def rule(self) -> str:
        """The rule's name without its normalisation."""

    @property
    def name(self) -> str:
        return f"{self.rule}:{self.normalisation}" if self.normalisation else self.rule

    def refuse_unfit(self, policy: Policy) -> None:
        if not self.normalisation and not policy.comparable:
            listed = ", ".join(f"{self.rule}:{name}" for name in NORMALISATIONS)
            raise UserError(
                f"scores of policy {policy.name!r} are not comparable across heads, and allocation {self.rule!r} sets "
                f"one threshold over them: name a normalisation ({listed}), or use uniform"
            )

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        return NORMALISATIONS[self.normalisation](scores, view) if self.normalisation else scores


def highest(priorities: Tensor, counts: Tensor) -> Tensor:
    """Exactly the highest priorities of every row, or all valid ones; ties go to the first.

    Args:
        priorities: `[rows, n]` int64.
        counts: `[rows]` int64, how many; no host is asked.

    Returns:
        `[rows, n]` bool.
    """
    n = priorities.shape[1]
    counts = counts.clamp(0, n)[:, None]
    edge = priorities.sort(descending=True).values.gather(1, (counts - 1).clamp(min=0))
    above, tied = priorities > edge, priorities == edge
    best = above | (tied & (tied.cumsum(1) <= counts - above.sum(1, keepdim=True)))
    return best & (counts > 0) & (priorities > LOWEST)
