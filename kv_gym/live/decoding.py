"""One decoding step of an evicting cache: the new token of every layer is scored, and one slot of every head goes.

What each layer would do for itself, done for all layers at once when the last one has attended: on small models and
caches the number of operations is what a decision costs. Only for scores that are computed once, when a token comes
(:attr:`~kv_gym.live.config.CacheConfig.decides_together`). No paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kv_gym.budgets import slot_to_evict
from kv_gym.cache_view import CacheView
from kv_gym.live.layer_state import LayerState
from kv_gym.live.slots import EqualSlots, Slots


@torch.no_grad()
def decide_together(states: Sequence[LayerState]) -> None:
    """Score the newest token of every layer, then evict where the trigger fires.

    Args:
        states: layers with the token of a decoding step appended, as `newest`, and no score of it yet.
    """
    for state, scores in zip(states, _newest_scores(states), strict=True):
        _equal(state.slots).write_newest("scores", scores.float())
        state.newest = None
    rows_to_evict = states[0].rows_to_evict()
    if not any(rows_to_evict):
        return
    budget, *others = set(states[0].row_budgets(rows_to_evict))
    if not others and all(state.can_remove_one(budget) for state in states):
        _remove_one_per_head(states, budget)
    else:
        for state in states:
            state.evict(rows_to_evict)


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


def _equal(slots: Slots) -> EqualSlots:
    assert isinstance(slots, EqualSlots)  # other layers decide for themselves
    return slots
