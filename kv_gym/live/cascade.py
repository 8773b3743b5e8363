"""CAKE's cascade: layers are cut while later ones are still to be read, so that no forward is held whole.

Paper: CAKE, arXiv 2503.12491 (cascading cache management). When a layer has been read, the budget of the whole model is
divided anew among the layers so far, and earlier ones give up what they lose. Shares only fall as layers come, for what
a full layer cannot take goes to the others in proportion to their weights, and slots keep the scores of their layer's
first cut. So the last division leaves just what one cut of all layers would. (The paper's code spreads that excess
equally, with which a share may rise again.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kv_gym.budgets import UNSEEN, ScoredLayer, top_mask
from kv_gym.budgets.cake import Cake
from kv_gym.budgets.order import LOWEST
from kv_gym.live.layer_state import LayerState


class Cascade:
    """The layers that were read in one forward so far, each cut to its share among them.

    Until the last layer a head may hold one slot more than its share, which the rounding of later shares may need.

    Args:
        allocation: divides the budget.
    """

    def __init__(self, allocation: Cake):
        self.allocation = allocation
        self._states: list[LayerState] = []
        self._layers: list[ScoredLayer] = []
        self._weights: list[Tensor] = []  # [batch] float64 of each layer
        self._held: list[Tensor] = []  # [batch] int64, slots per head when the layer had been read

    def cut(self, state: LayerState, rows_to_evict: list[bool]) -> None:
        """Take in a layer that has been read, and cut it and those before it to their shares."""
        layer = state.score_slots(rows_to_evict)
        self._states.append(state)
        self._weights.append(self.allocation.preference(layer))
        self._held.append(layer.view.valid.sum((1, 2)) // layer.view.valid.shape[1])
        nothing = layer.view.keys[..., :0]  # keys, values and queries have been weighed: they are held no longer
        self._layers.append(replace(layer, view=replace(layer.view, keys=nothing, values=nothing, queries=None)))
        held = torch.stack(self._held, 1)
        shares = self.allocation.divide(layer.row_counts, layer.layer_count, torch.stack(self._weights, 1), held)
        if len(self._layers) < layer.layer_count:
            shares = torch.minimum(shares + 1, held)
        for i, (cut_state, scored) in enumerate(zip(self._states, self._layers, strict=True)):
            kept = top_mask(scored.priorities, self.allocation.slots_within(scored, shares[:, i]))
            if kept.device.type == "cpu" and bool((kept == scored.view.valid).all()):
                continue
            cut_state.keep_slots(kept)
            self._layers[i] = _after_cut(scored, kept, cut_state)


def _after_cut(layer: ScoredLayer, kept: Tensor, state: LayerState) -> ScoredLayer:
    """The layer as its slots lie after a cut to `kept [batch, kv_heads, tokens]` bool, with their former priorities."""
    filled, valid = state.slots.padded(("positions",))
    before = layer.view.positions.masked_fill(~kept, UNSEEN).argsort(-1)
    after = filled["positions"].masked_fill(~valid, UNSEEN).argsort(-1)
    ordered = layer.priorities.masked_fill(~kept, LOWEST).gather(-1, before)[..., : after.shape[-1]]
    priorities = torch.empty_like(ordered).scatter_(-1, after, ordered)
    return replace(layer, priorities=priorities, view=replace(layer.view, positions=filled["positions"], valid=valid))
