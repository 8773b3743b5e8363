"""Who gets how many slots: budgets, allocations, protection, and the cut from scores to kept slots."""

from kv_gym.budgets.allocation import Allocation, Layer, fitting
from kv_gym.budgets.budget import budget_key, format_budget, parse_budget, slots_per_head
from kv_gym.budgets.cut import cut, judged
from kv_gym.budgets.registry import parse_allocation
from kv_gym.budgets.selection import UNSEEN, keep_order, merit, protected, protection_for, select, top, weakest
from kv_gym.budgets.uniform import uniform

__all__ = [
    "UNSEEN", "Allocation", "Layer", "budget_key", "cut", "fitting", "format_budget", "judged", "keep_order", "merit",
    "parse_allocation", "parse_budget", "protected", "protection_for", "select", "slots_per_head", "top", "uniform",
    "weakest",
]  # fmt: skip
