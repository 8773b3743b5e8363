"""Judging policies on a decoding model: every configuration on every task, and rows of what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from kv_gym.budgets import Allocation, parse_allocation
from kv_gym.budgets.budget import Budget
from kv_gym.evaluation.configurations import FULL, Configuration, every_configuration
from kv_gym.evaluation.outcomes import Outcome, per_context
from kv_gym.evaluation.tasks import Task, TaskContext
from kv_gym.evaluation.tasks.asked import by_label, unseen_questions
from kv_gym.live.tiers import Tier, parse_tier
from kv_gym.policies import Policy

__all__ = ["FULL", "answer", "judge"]


def answer(
    model,
    contexts: Sequence[TaskContext],
    policies: Mapping[str, Policy],
    budgets: Iterable[Budget],
    sinks: int | None = None,
    recent: int | None = None,
    rows_at_once: int = 8,
    advance: Callable[[int], None] = lambda _: None,
    allocations: Iterable[str | Allocation] = ("uniform",),
    evicted: Iterable[str | Tier] = ("drop",),
) -> list[dict]:
    """One prefill per context, forked for every policy, budget and question; questions are unseen when it is cut.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
        contexts: what to ask; contexts of equal length are prefilled together.
        policies: by the name that rows carry.
        budgets: slots per head or shares.
        sinks, recent: protection; None means each policy's own.
        rows_at_once: contexts per prefill.
        advance: called with the number of contexts done (progress).
        allocations: who gets the slots; every policy meets all that can use its scores.
        evicted: what becomes of evicted pairs, see :func:`kv_gym.live.tiers.parse_tier`; every policy meets every one.

    Returns:
        Rows as in :func:`judge`; their task is the contexts' own.
    """
    rules, tiers = [parse_allocation(rule) for rule in allocations], [parse_tier(tier) for tier in evicted]
    configurations = every_configuration(policies, budgets, rules, tiers, sinks, recent)
    tasks = [unseen_questions(same, label, rows_at_once) for label, same in by_label(contexts).items()]
    return judge(model, tasks, configurations, advance)


def judge(
    model, tasks: Iterable[Task], configurations: Sequence[Configuration], advance: Callable[[int], None] = lambda _:
        None
) -> list[dict]:  # fmt: skip
    """Measure every configuration on every task.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves.
        tasks: what is asked.
        configurations: who is compared.
        advance: called with the number of contexts done (progress).

    Returns:
        Rows, see :class:`kv_gym.evaluation.rows.Row`; the full cache is the row named ``full_cache``.

    Raises:
        UserError: a configuration that cannot run live, or does not fit the model.
    """
    rows = []
    for task in tasks:
        found: list[list[Outcome]] = [[] for _ in configurations]
        for batch in task.batches():
            for place, (_, outcomes) in enumerate(task.measure(model, batch, configurations)):
                found[place] += outcomes
            advance(len(batch))
        rows += [
            _row(task, configuration, outcomes) for configuration, outcomes in zip(configurations, found, strict=True)
        ]
    return rows


def _row(task: Task, configuration: Configuration, outcomes: Sequence[Outcome]) -> dict:
    contexts = per_context(outcomes)
    questions = sum(outcome.questions for outcome in contexts)
    nll = math.fsum(outcome.nll for outcome in contexts) / questions
    row = {
        "policy": configuration.name,
        "budget": configuration.budget,
        "allocation": configuration.allocation.name,
        "evicted": configuration.evicted.name,
        "task": task.name,
        "trigger": task.trigger,
        "accuracy": math.fsum(outcome.correct for outcome in contexts) / questions,
        "nll": None if math.isnan(nll) else nll,
        "cache_bytes": sum(outcome.cache_bytes for outcome in contexts) / len(contexts),
        "milliseconds": 1e3 * math.fsum(outcome.seconds for outcome in contexts) / len(contexts),
        "policy_bytes": getattr(configuration.policy, "nbytes", int)(),
        "n": len(contexts),
        "questions": questions,
    }
    parts: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        part = parts.setdefault(outcome.part, {"questions": 0, "correct": 0.0})
        part["questions"] += outcome.questions
        part["correct"] += outcome.correct
    return row | ({"parts": parts} if set(parts) != {""} else {})
