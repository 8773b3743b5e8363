"""The measuring loop: configurations on tasks give rows. `evaluate`, leaderboards and `fit` all measure here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kv_gym.budgets import Allocation, Budget, parse_allocation
from kv_gym.evaluation.configurations import Configuration, configurations_of
from kv_gym.evaluation.outcomes import measured_fields
from kv_gym.evaluation.rows import complete
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.replay import replay_tasks
from kv_gym.models.loading import refuse_too_long
from kv_gym.policies import Policy


def measure(
    model: Any,
    tasks: Iterable[Task],
    configurations: Sequence[Configuration],
    advance: Callable[[int], None] = lambda done: None,
    go_on: Callable[[int], bool] = lambda batch: True,
) -> list[dict[str, Any]]:
    """Measure every configuration on every task.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves; None for tasks that replay.
        tasks: what is asked, or replayed.
        configurations: what is compared; a context is read once for all of them.
        advance: called with the number of contexts done (progress).
        go_on: asked before each batch, with its number of contexts; a task ends at the first no.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), task by task in the order of the configurations.

    Raises:
        UserError: a configuration that cannot run on the model or the recording, or a context that is longer than the
            model's positions.
    """
    rows, tasks = [], list(tasks)
    for task in tasks if model is not None else ():
        refuse_too_long(model, task.longest, f"a context of task {task.name!r} with its question")
    for task in tasks:
        outcomes: list[list] = [[] for _ in configurations]
        for batch in task.batches():
            if not go_on(len(batch)):
                break
            for found, (_, new) in zip(outcomes, task.measure(model, batch, configurations), strict=True):
                found += new
            advance(len(batch))
        for configuration, found in zip(configurations, outcomes, strict=True):
            row = configuration.fields() | {"task": task.name, "trigger": task.trigger} | measured_fields(found)
            rows.append(complete(row, f"the row of {configuration.name}"))
    return rows


def replay(
    policies: Mapping[str, Policy],
    sequences: Any,
    budgets: Iterable[Budget],
    sinks: int | None = None,
    recent: int | None = None,
    allocations: Iterable[str | Allocation] = ("uniform",),
) -> list[dict[str, Any]]:
    """Measure policies on recorded contexts: one decision per context, at its end.

    Args:
        policies: by the name that rows carry.
        sequences: a trace set or a list of recorded contexts, with at least one continuation each.
        budgets: slots per head or shares.
        sinks, recent: protection; None means each policy's own.
        allocations: who gets the slots; every policy meets all that can use its scores.

    Returns:
        Rows with ``utility_kept`` and ``kept_share``, one for each configuration and task of the contexts.

    Raises:
        UserError: a context without continuations, or without the queries or statistics that a policy needs; or no
            allocation that can use a policy's scores.
    """
    rules = [parse_allocation(allocation) for allocation in allocations]
    configurations = configurations_of(policies, budgets, rules, sinks=sinks, recent=recent)
    return measure(None, replay_tasks(sequences), configurations)
