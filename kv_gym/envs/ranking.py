"""Ranking mode: one step, one ranking, judged over every budget at once."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from kv_gym.envs.render import Scene
from kv_gym.envs.rewards import (
    BudgetWeights,
    budget_weights,
    by_head,
    in_time_order,
    protected_positions,
    rank_weights,
    slots,
    worst_first,
)
from kv_gym.envs.slot_table import SlotTable
from kv_gym.traces.sequence import Sequence

CURVE = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # shares of the context's tokens


class Ranking:
    """Utility of every decision's slots, and the precomputed weights that make a reward one pass.

    Attributes:
        decision: `[E]` int64, the decision that each episode shows; those with nothing to gain are left out.
        lanes: rows of a picture.
    """

    lanes = len(CURVE)

    def __init__(
        self,
        sequences: Seq[Sequence],
        table: SlotTable,
        reduction: str,
        sinks: int,
        recent: int,
        weights: BudgetWeights,
    ) -> None:
        """Read the utility of the table's heads (`reduction`: "max" or "mean" over query heads)."""
        self._table = table
        self._lengths, self._layout = np.unique(table.length, return_inverse=True)
        self._lay_out(sinks, recent, weights)
        worth = np.zeros((len(table), table.size), np.float32)
        for i, sequence in enumerate(sequences):
            n = len(sequence.tokens)
            utility = np.zeros((len(table.chosen), table.tokens), np.float32)
            utility[:, :n] = sequence.utility(reduction).reshape(-1, n)[table.chosen]
            worth[table.sequence == i] = utility.reshape(-1, table.size)
        worth = in_time_order(worth, table.heads)
        open_slots = self._open[self._layout]
        self._total = worth.sum(-1, dtype=np.float64)
        self._worth = np.where(open_slots, worth, np.float32(0))
        self._shielded = self._total - self._worth.sum(-1, dtype=np.float64)
        best = np.sort(self._worth, axis=-1)
        self._best = (best * self._weights[self._layout]).sum(-1)
        self.decision = np.flatnonzero(self._best > 0)

    def _lay_out(self, sinks: int, recent: int, weights: BudgetWeights) -> None:
        """Everything that depends on a context's length alone, `[lengths, ...]`."""
        table, count = self._table, len(self._lengths)
        self._open = np.zeros((count, table.size), bool)  # time order
        self._weights = np.zeros((count, table.size))  # worst rank first
        self._weight_sum = np.zeros(count)
        self._curve_slots = np.zeros((count, len(CURVE)), np.int64)  # slots per head
        self._protected = np.zeros(count, np.int64)
        for row, n in enumerate(self._lengths.tolist()):
            by_budget, row_sinks, row_recent = budget_weights(weights, n, sinks, recent)
            protected = protected_positions(n, n, row_sinks, row_recent)
            self._protected[row] = protected.sum()
            self._open[row, : n * table.heads] = np.repeat(~protected, table.heads)
            falling = rank_weights(by_budget, int(protected.sum()), table.heads)
            self._weights[row, table.size - len(falling) :] = falling[::-1]
            self._weight_sum[row] = by_budget.sum()
            self._curve_slots[row] = [max(slots(share, n), int(protected.sum())) for share in CURVE]

    def rate(self, decisions: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[np.ndarray, dict]:
        """Rewards `[B]` float64 and what to tell about them, for scores `[B, N]` in the observation's order."""
        layout = self._layout[decisions]
        order = worst_first(in_time_order(scores, self._table.heads), self._open.take(layout, axis=0))
        order += decisions[:, None] * self._table.size
        ranked = self._worth.reshape(-1).take(order)
        gained = (ranked * self._weights.take(layout, axis=0)).sum(-1)
        total, shielded = self._total[decisions], self._shielded[decisions]
        curve_slots = self._curve_slots[layout]
        free = (curve_slots - self._protected[layout, None]) * self._table.heads
        kept = np.zeros((len(ranked), self._table.size + 1))
        np.cumsum(ranked[:, ::-1], axis=-1, out=kept[:, 1:])
        rows = np.arange(len(ranked))[:, None]
        weight_sum = self._weight_sum[layout]
        return gained / self._best[decisions], {
            "utility_kept": (gained / weight_sum + shielded) / total,
            "utility_total": total,
            "curve": (kept[rows, free] + shielded[:, None]) / total[:, None],
            "curve_slots": curve_slots,
        }

    def scene(self, decision: int, scores: NDArray[np.float32] | None) -> Scene:
        """What to show of a decision by scores `[N]` in the observation's order; None before there are any."""
        heads, layout = self._table.heads, self._layout[decision]
        worth = by_head(self._worth[decision][None], heads)[0]
        open_slots = by_head(self._open[layout][None], heads)[0]
        if scores is None:
            there = np.arange(self._table.size) < self._lengths[layout] * heads
            kept = best = by_head(there[None], heads)
            labels, shares = ["all"], [float("nan")]
        else:
            labels, kept = self.kept_at(decision, scores)
            best = self.kept_at(decision, worth)[1] & (worth > 0)
            best_worth = (best * worth).sum(-1, dtype=np.float64)
            gained = (kept * worth).sum(-1, dtype=np.float64)
            shares = np.divide(gained, best_worth, out=np.full_like(gained, np.nan), where=best_worth > 0).tolist()
        return Scene(labels, kept, best, open_slots, worth, shares, "of best")

    def kept_at(self, decision: int, scores: NDArray[np.float32]) -> tuple[list[str], NDArray[np.bool_]]:
        """Labels of the curve's budgets, and which slots stay at each: `[budgets, N]` in the observation's order."""
        layout = self._layout[decision]
        open_slots = self._open[layout]
        order = worst_first(in_time_order(scores[None], self._table.heads), open_slots[None])[0]
        there = np.arange(self._table.size) < self._lengths[layout] * self._table.heads
        kept = np.repeat((there & ~open_slots)[None], len(CURVE), axis=0)
        for row, budget in enumerate(self._curve_slots[layout]):
            free = (budget - self._protected[layout]) * self._table.heads
            kept[row, order[len(order) - free :]] = True
        labels = [
            f"1/{round(1 / share)} = {budget}" for share, budget in zip(CURVE, self._curve_slots[layout], strict=True)
        ]
        return labels, by_head(kept, self._table.heads)
