"""From scores to kept slots, written once for replay, the environment and the live cache.

Order: protected slots first, then by score, ties to the newer token; invalid slots last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy


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
    room = view.budget // 2
    kept_sinks = room.clamp(max=sinks)[..., None]
    kept_recent = (room - kept_sinks[..., 0]).clamp(min=0, max=recent)[..., None]
    return view.valid & ((view.positions < kept_sinks) | (view.age < kept_recent))


def keep_order(scores: Tensor, view: CacheView, shield: Tensor | None = None) -> Tensor:
    """Slot indices `[batch, kv_heads, tokens]` in the order in which they deserve to stay.

    Args:
        scores: `[batch, kv_heads, tokens]`, higher = keep.
        view: the slots.
        shield: `[batch, kv_heads, tokens]` bool, protected slots.

    Raises:
        UserError: a score is NaN.
    """
    scores = scores.masked_fill(~view.valid, float("-inf"))
    if bool(scores.isnan().any()):
        raise UserError(f"a policy scored NaN in layer {view.layer}; expected finite scores (are the keys finite?)")
    if shield is not None:
        scores = scores.masked_fill(shield, float("inf"))
    by_position = view.positions.argsort(-1, descending=True)  # newest first, invalid (-1) last
    return by_position.gather(-1, scores.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True))


def select(policy: Policy, view: CacheView, sinks: int, recent: int) -> Tensor:
    """The slots that a policy keeps within ``view.budget``: `[batch, kv_heads, tokens]` bool."""
    order = keep_order(policy.score(view), view, protected(view, sinks, recent))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return view.valid & (rank < view.budget[..., None])
