"""The measuring loop: configurations on tasks give rows. `evaluate`, leaderboards and `fit` all measure here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kv_gym.budgets import Allocation, Budget, parse_allocation
from kv_gym.evaluation.configurations import Configuration, configurations_of
from kv_gym.evaluation.outcomes import from_json, measured_fields, to_json
from kv_gym.evaluation.rows import complete
from kv_gym.evaluation.tasks.base import Task
from kv_gym.evaluation.tasks.replay import replay_tasks
from kv_gym.models.loading import refuse_too_long
from kv_gym.models.model_source import ModelSource
from kv_gym.policies import Policy
from kv_gym.workers import WorkerPool


def measure(
    model: Any,
    tasks: Iterable[Task],
    configurations: Sequence[Configuration],
    advance: Callable[[int], None] = lambda done: None,
    go_on: Callable[[int], bool] = lambda batch: True,
    workers: int | None = None,
    ray: str | None = None,
) -> list[dict[str, Any]]:
    """Measure every configuration on every task.

    Args:
        model: a transformers decoder that :class:`~kv_gym.live.EvictingCache` serves; None for tasks that replay.
        tasks: what is asked, or replayed.
        configurations: what is compared; a context is read once for all of them.
        advance: called with the number of contexts done (progress).
        go_on: asked before each batch, with its number of contexts; a task ends at the first no.
        workers, ray: processes, or machines of a Ray cluster, that share the batches, see
            :class:`kv_gym.workers.WorkerPool`.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), task by task in the order of the configurations.

    Raises:
        UserError: a configuration that cannot run on the model or the recording, or a context that is longer than the
            model's positions.
    """
    rows, tasks = [], list(tasks)
    for task in tasks if model is not None else ():
        refuse_too_long(model, task.longest, f"a context of task {task.name!r} with its question")
    batches = [task.batches() for task in tasks]

    def places() -> Iterator[tuple[int, int]]:
        for number, of_task in enumerate(batches):
            for place, batch in enumerate(of_task):
                if not go_on(len(batch)):
                    break
                yield number, place

    measured: dict[tuple[int, int], list] = {}
    pool = WorkerPool(
        _batch_measurer,
        lambda: (None if model is None else ModelSource.of(model), tasks, configurations),
        workers, ray, _BatchMeasurer(model, tasks, configurations), sum(map(len, batches)),
    )  # fmt: skip
    with pool:
        for place, found in pool.run(places()):
            measured[place] = [list(map(from_json, each)) for each in found] if pool.elsewhere else found
            advance(len(batches[place[0]][place[1]]))
    for number, task in enumerate(tasks):
        by_batch = [measured[place] for place in sorted(measured) if place[0] == number]
        for i, configuration in enumerate(configurations):
            outcomes = [outcome for batch in by_batch for outcome in batch[i]]
            row = configuration.fields() | {"task": task.name, "trigger": task.trigger} | measured_fields(outcomes)
            rows.append(complete(row, f"the row of {configuration.name}"))
    return rows


class _BatchMeasurer:
    """Gives the outcomes of every configuration on one batch, named by its task's number and its own."""

    def __init__(self, model: Any, tasks: Sequence[Task], configurations: Sequence[Configuration]):
        self._model, self._tasks, self._configurations = model, tasks, configurations
        self._batches = [task.batches() for task in tasks]

    def __call__(self, place: tuple[int, int]) -> list[list]:
        number, batch = place
        measured = self._tasks[number].measure(self._model, self._batches[number][batch], self._configurations)
        return [outcomes for _, outcomes in measured]


def _batch_measurer(
    source: ModelSource | None, tasks: Sequence[Task], configurations: Sequence[Configuration]
) -> Callable[[tuple[int, int]], list[list[dict]]]:
    """The measurer of a worker process, whose outcomes are plain data."""
    measure_batch = _BatchMeasurer(None if source is None else source.load(), tasks, configurations)
    return lambda place: [list(map(to_json, outcomes)) for outcomes in measure_batch(place)]


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
