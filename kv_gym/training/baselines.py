"""What a policy in training is held against: the oracle, and heuristics that need no training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from kv_gym.budgets import format_budget
from kv_gym.evaluation.replay import replay
from kv_gym.policies import StatefulPolicy, make_policy
from kv_gym.traces.sequence import Sequence

VALIDATION_BUDGETS = (1 / 4, 1 / 8, 1 / 16)
HEURISTICS = ("recency", "keydiff", "random", "h2o")


def by_budget(rows: Iterable[dict]) -> dict[str, dict[str, float]]:
    """Rows of :func:`replay` as policy -> budget (as text) -> utility kept, tasks weighed by their contexts."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        entry = sums[row["policy"], format_budget(row["budget"])]
        entry[0] += row["utility_kept"] * row["n"]
        entry[1] += row["n"]
    kept: dict[str, dict[str, float]] = defaultdict(dict)
    for (policy, budget), (total, contexts) in sums.items():
        kept[policy][budget] = total / contexts
    return dict(kept)


def yardsticks(sequences: list[Sequence]) -> dict[str, dict[str, float]]:
    """Utility kept at the validation budgets by the expected oracle and by heuristics, each with its own protection.

    A heuristic whose statistics were not recorded is left out.
    """
    policies = {name: make_policy(name) for name in ("oracle", *HEURISTICS)}
    usable = {
        name: policy
        for name, policy in policies.items()
        if not isinstance(policy, StatefulPolicy) or all(policy.name in s.stats for s in sequences)
    }
    return by_budget(replay(usable, sequences, VALIDATION_BUDGETS))
