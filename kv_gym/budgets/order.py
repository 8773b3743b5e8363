"""The order in which slots stay, written once for replay, the environments and the live cache.

Protected slots come first, then the others by score, ties to the newer token; invalid slots come last.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.base import Policy

LOWEST, HIGHEST = -(2**63), 2**63 - 1  # the priority of an invalid slot; above every priority
UNSEEN = 2**62  # above every position
_PROTECTED = 0x7FFFFFFF  # above every score


def protection_for(policy: Policy, sinks: int | None, recent: int | None) -> tuple[int, int]:
    """First and last tokens to protect.

    Args:
        policy: its own numbers hold where the caller gives None.
        sinks: first tokens to protect, or None.
        recent: last tokens to protect, or None.

    Raises:
        UserError: a number below 0, more than a position can count, or no whole number.
    """
    own_sinks, own_recent = policy.protection
    given = own_sinks if sinks is None else sinks, own_recent if recent is None else recent
    try:
        if any(isinstance(number, bool) for number in given):
            raise TypeError
        first, last = (operator.index(number) for number in given)
    except TypeError:
        raise UserError(f"sinks and recent are {given[0]!r} and {given[1]!r}; expected whole numbers from 0") from None
    if min(first, last) < 0 or max(first, last) >= 2**31:
        raise UserError(f"sinks and recent are {first} and {last}; expected numbers from 0 and below {2**31:,}")
    return first, last


def priorities(scores: Tensor, view: CacheView, protect: Tensor | None = None) -> Tensor:
    """One integer for each slot, `[batch, kv_heads, tokens]` int64, higher = keep.

    The score is the upper half and the position the lower one, so that two slots of a head are never equal and any
    sort, `topk` or threshold gives the same choice on every machine. Priorities of different heads compare as their
    scores do.

    Args:
        scores: `[batch, kv_heads, tokens]`, compared as float32.
        view: the slots; at most 2^31 positions.
        protect: `[batch, kv_heads, tokens]` bool, protected slots.

    Raises:
        UserError: a score of a valid slot is NaN. On an accelerator that check would wait for the device: there such a
            slot goes first.
    """
    return slot_priorities(scores, view.positions, view.valid, protect, view.layer)


def slot_priorities(
    scores: Tensor, positions: Tensor, valid: Tensor, protect: Tensor | None, layer: int | None
) -> Tensor:
    """:func:`priorities` of slots in tensors of any one shape.

    Args:
        scores: of the slots, compared as float32.
        positions: int64.
        valid: bool.
        protect: bool, protected slots.
        layer: named in the error; None: they are of several.
    """
    # adding zero makes -0.0 the same as 0.0
    scores = scores.detach().float().masked_fill(~valid, 0.0) + 0.0
    if _may_wait_for(scores):
        _refuse_nan(scores, layer)
    else:
        scores = _nan_as_lowest(scores)
    upper = sortable(scores)
    if protect is not None:
        upper.masked_fill_(protect, _PROTECTED)
    return ((upper << 31) + positions).masked_fill_(~valid, LOWEST)


def sortable(scores: Tensor) -> Tensor:
    """Integers, int64, that compare as the float32 `scores` do: the upper half of :func:`priorities`."""
    bits = scores.contiguous().view(torch.int32)
    # negative floats count down as their bits count up: mirror them, and the order is that of signed integers
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def keep_order(scores: Tensor, view: CacheView, protect: Tensor | None = None) -> Tensor:
    """Slot indices `[batch, kv_heads, tokens]`, those that stay longest first; arguments as of :func:`priorities`."""
    return priorities(scores, view, protect).argsort(dim=-1, descending=True, stable=True)


def inverse_permutation(order: Tensor) -> Tensor:
    """The place of every slot in an order of slots: the inverse permutation along the last axis, int64."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def top_mask(priorities: Tensor, counts: Tensor) -> Tensor:
    """The `counts [batch, kv_heads]` slots of highest priority in each head: bool, shaped as `priorities`."""
    order = priorities.argsort(dim=-1, descending=True, stable=True)
    return (inverse_permutation(order) < counts[..., None]) & (priorities > LOWEST)


def slot_to_evict(scores: Tensor, positions: Tensor, first: int, last: int, layer: int | None = 0) -> Tensor:
    """The slot of lowest priority in every head, `[batch, kv_heads, 1]` int64.

    The same choice in a fraction of the operations, for caches that evict one token after another.

    Args:
        scores: `[batch, kv_heads, tokens]` of slots that are all valid.
        positions: of the slots, the same shape.
        first: positions below it are protected.
        last: positions from it on are protected; :data:`UNSEEN` protects none.
        layer: named in the error; None: `scores` are of all layers, with one more axis in front.

    Raises:
        UserError: a score is NaN; as of :func:`priorities`.
    """
    scores = scores.detach().float()
    if not _may_wait_for(scores):
        scores = _nan_as_lowest(scores)
    if first or last < UNSEEN:
        scores = scores.masked_fill((positions < first) | (positions >= last), float("inf"))
    lowest = scores.amin(-1, keepdim=True)
    if _may_wait_for(lowest):
        _refuse_nan(lowest, layer)
    return torch.where(scores == lowest, positions, UNSEEN).argmin(-1, keepdim=True)


def _may_wait_for(scores: Tensor) -> bool:
    """Whether values may be looked at: on an accelerator that would wait for it."""
    return scores.device.type == "cpu"


def _refuse_nan(scores: Tensor, layer: int | None) -> None:
    if bool(scores.isnan().any()):
        where = "while decoding" if layer is None else f"in layer {layer}"
        raise UserError(f"a policy scored NaN {where}; expected finite scores (are the keys finite?)")


def _nan_as_lowest(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
