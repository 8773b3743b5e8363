"""Ways to make scores of different heads comparable, for rules that set one threshold over several heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView


def raw(scores: Tensor, view: CacheView) -> Tensor:
    """As they are, on the caller's word."""
    return scores


def rank(scores: Tensor, view: CacheView) -> Tensor:
    """The share of the head's slots that deserve less, in [0, 1): heads of equal length get equal budgets."""
    from kv_gym.budgets.selection import keep_order

    order = keep_order(scores, view)
    n = order.shape[-1]
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=order.device).expand_as(order))
    held = view.valid.sum(-1, keepdim=True)
    return ((held - 1 - place).double() / held.clamp(min=1)).float()


def softmax(scores: Tensor, view: CacheView) -> Tensor:
    """Logarithm of the softmax over the head's slots: what a slot holds of its head's mass."""
    return scores.double().masked_fill(~view.valid, float("-inf")).log_softmax(-1).float()


def zscore(scores: Tensor, view: CacheView) -> Tensor:
    """Standard deviations above the head's mean; a head of equal scores gets zeros."""
    # in double precision, so that ties between heads do not hang on the order in which slots are summed
    scores, there = scores.double(), view.valid.double()
    held = there.sum(-1, keepdim=True).clamp(min=1)
    centred = scores.masked_fill(~view.valid, 0.0)
    centred = (centred - centred.sum(-1, keepdim=True) / held) * there
    spread = (centred.square().sum(-1, keepdim=True) / held).sqrt()
    return (centred / spread.clamp(min=1e-12)).float()


NORMALISATIONS: dict[str, Callable[[Tensor, CacheView], Tensor]] = {
    "raw": raw, "rank": rank, "softmax": softmax, "zscore": zscore,
}  # fmt: skip
