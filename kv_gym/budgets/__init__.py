"""Who gets how many slots: budgets, protection, and the cut from scores to kept slots."""

from kv_gym.budgets.budget import format_budget, parse_budget, slots_per_head
from kv_gym.budgets.selection import keep_order, protected, protection_for, select
from kv_gym.budgets.uniform import uniform

__all__ = [
    "format_budget", "keep_order", "parse_budget", "protected", "protection_for", "select", "slots_per_head", "uniform",
]  # fmt: skip
