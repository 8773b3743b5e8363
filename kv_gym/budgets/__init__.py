"""Who gets how many slots: budgets, allocations, protection, and the choice of the slots that stay."""

from __future__ import annotations

from kv_gym.budgets.allocation import Allocation, ScoredLayer, Uniform, fitting, unfit
from kv_gym.budgets.budget import Budget, budget_key, format_budget, parse_budget, slots_after, slots_per_head, uniform
from kv_gym.budgets.order import UNSEEN, keep_order, priorities, protection_for, slot_to_evict, sortable, top_mask
from kv_gym.budgets.registry import ALLOCATIONS, parse_allocation
from kv_gym.budgets.selection import Selection, select, select_context, select_slots

__all__ = [
    "ALLOCATIONS", "UNSEEN", "Allocation", "Budget", "ScoredLayer", "Selection", "Uniform", "budget_key", "fitting",
    "format_budget", "keep_order", "parse_allocation", "parse_budget", "priorities", "protection_for", "select",
    "select_context", "select_slots", "slot_to_evict", "slots_after", "slots_per_head", "sortable", "top_mask",
    "unfit", "uniform",
]  # fmt: skip
