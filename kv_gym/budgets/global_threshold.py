"""One threshold over all slots of the model: a head may keep nothing, or all it has; the total is exact.

Source: kv_gym's own trials; with equal budgets per head the same scores need about three times the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, Layer
from kv_gym.budgets.normalisation import NORMALISATIONS
from kv_gym.budgets.selection import LOWEST
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


@dataclass(frozen=True)
class GlobalThreshold(Allocation):
    """The best slots of the whole model, wherever they are.

    Attributes:
        normalisation: how scores are made comparable across heads, or "" to compare them as they are.
    """

    normalisation: str = ""
    whole_model = True

    @property
    def name(self) -> str:
        return f"global:{self.normalisation}" if self.normalisation else "global"

    def refuse_unfit(self, policy: Policy) -> None:
        refuse_incomparable(policy, self.normalisation, self.name)

    def compared(self, scores: Tensor, view: CacheView) -> Tensor:
        return NORMALISATIONS[self.normalisation](scores, view) if self.normalisation else scores

    def slots(self, layers: Sequence[Layer]) -> list[Tensor]:
        return [kept.sum(-1) for kept in self.kept(layers)]

    def kept(self, layers: Sequence[Layer]) -> list[Tensor]:
        sizes = [layer.merits[0].numel() for layer in layers]
        merits = torch.cat([layer.merits.flatten(1) for layer in layers], 1)
        totals = torch.stack([layer.view.budget.sum(1) for layer in layers]).sum(0)
        kept = torch.stack([best(row, int(total)) for row, total in zip(merits, totals, strict=True)])
        return [part.view_as(layer.merits) for part, layer in zip(kept.split(sizes, 1), layers, strict=True)]


def best(merits: Tensor, count: int) -> Tensor:
    """Exactly the `count` highest merits of a row `[n]`, or all valid ones: bool `[n]`; ties go to the first."""
    held = int((merits > LOWEST).sum())
    if count >= held:
        return merits > LOWEST
    if count < 1:
        return torch.zeros_like(merits, dtype=torch.bool)
    edge = merits.kthvalue(len(merits) - count + 1).values
    above, tied = merits > edge, merits == edge
    return above | (tied & (tied.cumsum(0) <= count - above.sum()))


def refuse_incomparable(policy: Policy, normalisation: str, rule: str) -> None:
    """Raise a UserError where one threshold over several heads would compare scores that are not comparable."""
    if not normalisation and not policy.comparable:
        listed = ", ".join(f"{rule}:{name}" for name in NORMALISATIONS)
        raise UserError(
            f"scores of policy {policy.name!r} are not comparable across heads, and allocation {rule!r} sets one "
            f"threshold over them: name a normalisation ({listed}), or use uniform"
        )
