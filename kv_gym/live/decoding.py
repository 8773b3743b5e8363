"""Decoding steps of an evicting cache: all layers score the new token together, and few slots go at a time.

What each layer would do for itself, done for all layers at once when the last one has attended: on small models and
caches the number of operations is what a decision costs. Only for scores that are computed once, when a token comes
(:attr:`~kv_gym.live.config.CacheConfig.scores_together`). No paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kv_gym.budgets import slot_to_evict
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.budgets.order import HIGHEST, slot_priorities
from kv_gym.cache_view import CacheView
from kv_gym.live.layer_state import LayerState
from kv_gym.live.slots import EqualSlots, RaggedSlots, Slots


@torch.no_grad()
def decide_together(states: Sequence[LayerState]) -> None:
    """Score the newest token of every layer; then evict where the trigger fires and every layer cuts for itself.

    Args:
        states: layers with the token of a decoding step appended, as `newest`, and no score of it yet.
    """
    for state, scores in zip(states, _newest_scores(states), strict=True):
        state.slots.write_newest("scores", scores.float())
        state.newest = None
    if not states[0].config.decides_together:
        return
    rows_to_evict = states[0].rows_to_evict()
    if not any(rows_to_evict):
        return
    budget, *others = set(states[0].row_budgets(rows_to_evict))
    if not others and all(state.can_remove_one(budget) for state in states):
        _remove_one_per_head(states, budget)
    else:
        for state in states:
            state.evict(rows_to_evict)


@torch.no_grad()
def remove_lowest(states: Sequence[LayerState]) -> bool:
    """Under one threshold over all layers, remove the slots of lowest priority in place, if they are few.

    The same slots as :meth:`GlobalThreshold.kept` leaves out, without a copy of those that stay. For one sequence on a
    CPU, with stored scores.

    Args:
        states: all layers, filled beyond the budget.

    Returns:
        Whether it was done; else nothing has changed.
    """
    config, parts = states[0].config, [state.slots for state in states]
    if len(states[0].tokens_seen) != 1 or config.allocation != GlobalThreshold() or not config.scores_together:
        return False
    if not all(isinstance(slots, RaggedSlots) and slots.can_remove() for slots in parts):
        return False
    lengths = torch.cat([slots.counts().flatten() for slots in parts])
    held, budget = int(lengths.sum()), states[0].row_budgets(None)[0]
    surplus = held - budget * len(lengths)
    if not 0 < surplus <= held // 8:  # more are copied faster than moved
        return False
    for state in states:
        state.begin_eviction(None)
    victims = _lowest(states, lengths, budget, surplus)
    sizes = torch.tensor([len(slots.data("scores")) for slots in parts])
    ends = sizes.cumsum(0)
    of_layers = victims.tensor_split(torch.searchsorted(victims, ends)[:-1])
    for slots, start, own in zip(parts, ends - sizes, of_layers, strict=True):
        if len(own):
            _ragged(slots).remove(own - start)
    return True


def _lowest(states: Sequence[LayerState], lengths: Tensor, budget: int, count: int) -> Tensor:
    """The `count` slots of lowest priority: where they lie in the joined buffers of all layers, `[count]` ascending."""
    scores, positions = (torch.cat([state.slots.data(name) for state in states]) for name in ("scores", "positions"))
    capacities = torch.cat([_ragged(state.slots).capacities.flatten() for state in states])
    starts, of_slots = capacities.cumsum(0) - capacities, torch.arange(len(scores))
    valid = of_slots < (starts + lengths).repeat_interleave(capacities)
    first, last = states[0].config.protected_range(budget, states[0].tokens_seen[0])
    order = slot_priorities(scores, positions, valid, (positions < first) | (positions >= last), None)
    order.masked_fill_(~valid, HIGHEST)
    edge = order.kthvalue(count).values
    below, tied = (found.nonzero()[:, 0] for found in (order < edge, order == edge))
    stay = len(below) + len(tied) - count  # of those at the edge, the first ones
    return torch.cat((below, tied[stay:])).sort().values


def _newest_scores(states: Sequence[LayerState]) -> list[Tensor]:
    """Scores `[batch, kv_heads, 1]` of the newest token, layer by layer."""
    views: list[CacheView] = []
    for state in states:
        assert state.newest is not None
        if views:
            about: dict[str, Any] = {"layer": state.index, "scaling": state.scaling, **state.newest}
            views.append(replace(views[0], **about))
        else:
            views.append(state.new_view(state.newest, torch.ones_like(state.newest["positions"], dtype=torch.bool)))
    return states[0].config.policy.score_layers(views)


def _remove_one_per_head(states: Sequence[LayerState], budget: int) -> None:
    scores, positions = (
        torch.stack([_equal(state.slots)[name] for state in states]) for name in ("scores", "positions")
    )
    first, last = states[0].config.protected_range(budget, states[0].tokens_seen[0])
    victims = slot_to_evict(scores, positions, first, last, layer=None)
    for state, evicted in zip(states, victims.unbind(), strict=True):
        state.begin_eviction(None)
        state.remove_one(evicted)


def _ragged(slots: Slots) -> RaggedSlots:
    assert isinstance(slots, RaggedSlots)
    return slots


def _equal(slots: Slots) -> EqualSlots:
    assert isinstance(slots, EqualSlots)  # other layers decide for themselves
    return slots
