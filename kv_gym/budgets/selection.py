"""From scores to kept slots, written once for replay, the environment and the live cache.

Order: protected slots first, then by score, ties to the newer token; invalid slots last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy

LOWEST = -(2**63)  # the merit of an invalid slot
UNSEEN = 2**62  # above every position


def protection_for(policy: Policy, sinks: int | None, recent: int | None) -> tuple[int, int]:
    """First and last tokens to protect: the caller's numbers, or the policy's own where None."""
    own_sinks, own_recent = policy.protection
    chosen = own_sinks if sinks is None else sinks, own_recent if recent is None else recent
    if min(chosen) < 0:
        raise UserError(f"sinks and recent are {chosen[0]} and {chosen[1]}; expected numbers from 0")
    return chosen


def protected(view: CacheView, sinks: int, recent: int) -> Tensor:
    """Slots that stay whatever their score, `[batch, kv_heads, tokens]` bool.

    Where protection exceeds half a head's budget it shrinks, recent tokens first.
    """
    kept_sinks, kept_recent = (part[..., None] for part in protection_within(view.budget, sinks, recent))
    return view.valid & ((view.positions < kept_sinks) | (view.age < kept_recent))


def protection_within(budget: Tensor, sinks: int, recent: int) -> tuple[Tensor, Tensor]:
    """How many of the first and last tokens a head protects that has `budget` slots, shaped as `budget`."""
    room = budget // 2
    kept_sinks = room.clamp(max=sinks)
    return kept_sinks, (room - kept_sinks).clamp(min=0, max=recent)


def merit(scores: Tensor, view: CacheView, shield: Tensor | None = None) -> Tensor:
    """What slots are kept by: one integer each, `[batch, kv_heads, tokens]` int64, higher = keep.

    The score in its upper half and the position in its lower one, so that two slots of a head are never equal and
    any sort, `topk` or threshold gives the same choice on every machine. Merits of different heads compare as their
    scores do.

    Args:
        scores: `[batch, kv_heads, tokens]`, compared as float32.
        view: the slots; at most 2^31 positions.
        shield: `[batch, kv_heads, tokens]` bool, protected slots.

    Raises:
        UserError: a score of a valid slot is NaN. On an accelerator that would have to be waited for: there such a
            slot goes first.
    """
    # adding zero makes -0.0 the same as 0.0
    scores = scores.detach().float().masked_fill(~view.valid, 0.0) + 0.0
    _refuse_nan(scores, view.layer)
    if scores.device.type != "cpu":
        scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    upper = ordered(scores)
    if shield is not None:
        upper.masked_fill_(shield, 0x7FFFFFFF)
    return ((upper << 31) + view.positions).masked_fill_(~view.valid, LOWEST)


def ordered(scores: Tensor) -> Tensor:
    """Integers, int64, that compare as the float32 `scores` do: the upper half of a :func:`merit`."""
    bits = scores.contiguous().view(torch.int32)
    # negative floats count down as their bits count up: mirror them, and the order is that of signed integers
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def weakest(scores: Tensor, positions: Tensor, first: int, last: int, layer: int = 0) -> Tensor:
    """The one slot of every head that goes first by its :func:`merit`, `[batch, kv_heads, 1]` int64.

    The same choice in a fraction of the operations, for caches that evict one token after another.

    Args:
        scores: `[batch, kv_heads, tokens]` of slots that are all real.
        positions: of the slots, the same shape.
        first, last: positions below `first` and from `last` on are protected.
        layer: named in the error.

    Raises:
        UserError: a score is NaN; as for :func:`merit`.
    """
    scores = scores.detach().float()
    if first or last < UNSEEN:
        scores = scores.masked_fill((positions < first) | (positions >= last), float("inf"))
    lowest = scores.amin(-1, keepdim=True)
    _refuse_nan(lowest, layer)
    return torch.where(scores == lowest, positions, UNSEEN).argmin(-1, keepdim=True)


def _refuse_nan(scores: Tensor, layer: int) -> None:
    """Refuse NaN on a CPU; a device would have to be waited for."""
    if scores.device.type == "cpu" and bool(scores.isnan().any()):
        raise UserError(f"a policy scored NaN in layer {layer}; expected finite scores (are the keys finite?)")


def keep_order(scores: Tensor, view: CacheView, shield: Tensor | None = None) -> Tensor:
    """Slot indices `[batch, kv_heads, tokens]` in the order in which they deserve to stay.

    Args:
        scores: `[batch, kv_heads, tokens]`, higher = keep.
        view: the slots.
        shield: `[batch, kv_heads, tokens]` bool, protected slots.

    Raises:
        UserError: a score is NaN.
    """
    return merit(scores, view, shield).argsort(dim=-1, descending=True, stable=True)


def top(merits: Tensor, counts: Tensor) -> Tensor:
    """The `counts [batch, kv_heads]` best slots of each head by their :func:`merit`: bool, shaped as `merits`."""
    order = merits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < counts[..., None]) & (merits > LOWEST)


def select(policy: Policy, view: CacheView, sinks: int, recent: int) -> Tensor:
    """The slots that a policy keeps within ``view.budget``: `[batch, kv_heads, tokens]` bool."""
    return top(merit(policy.score(view), view, protected(view, sinks, recent)), view.budget)
