"""The pool of workers: in this process, in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kv_gym.errors import UserError
from kv_gym.workers.engine import MOST_WORKERS, Engine, Make
from kv_gym.workers.processes import LocalProcesses
from kv_gym.workers.ray_cluster import RayActors, RayAddress

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerPool(Generic[Task, Result]):
    """Runs tasks in workers, which start when there is work for them.

    Args:
        make: called in each worker with its arguments; returns the function of a task. A function of a module, so that
            another process finds it.
        arguments: gives these arguments, which other processes can be sent; called where workers or `make` need them.
        workers: how many; None: this process with all its threads, or with `ray` as many as the cluster has room for.
        ray: address of a Ray cluster, see :meth:`RayAddress.parse`; None: processes of this machine.
        here: the function of a task for this process, where it is not to be made.
        tasks: how many there will be, where that is known: no more workers start, and for a single one none does.

    Attributes:
        elsewhere: tasks run in other processes.

    Raises:
        UserError: no such number of workers, or a cluster that cannot be used.
    """

    def __init__(
        self,
        make: Make,
        arguments: Callable[[], tuple] = tuple,
        workers: int | None = None,
        ray: str | None = None,
        here: Callable[[Task], Result] | None = None,
        tasks: int = MOST_WORKERS,
    ):
        if workers is not None and not (isinstance(workers, int) and 1 <= workers <= MOST_WORKERS):
            raise UserError(f"workers is {workers}; expected a number from 1 to {MOST_WORKERS}")
        self._make, self._arguments, self._here = make, arguments, here
        self._one_thread = workers is not None
        self._engine: Engine | None = None
        address = None if ray is None else RayAddress.parse(ray)
        if address is not None and tasks:
            self._engine = RayActors(make, arguments(), min(workers or MOST_WORKERS, tasks), address)
        elif address is None and min(workers or 1, tasks) > 1:
            self._engine = LocalProcesses(make, arguments(), min(workers or 1, tasks))
        self.elsewhere = self._engine is not None

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def count(self) -> int:
        """How many workers there are at most."""
        return 1 if self._engine is None else self._engine.count

    def start(self) -> None:
        """Start all workers and wait until they are ready, which otherwise the first tasks of each do."""
        if self._engine is not None:
            self._engine.start_all()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task with its result, in the order in which they end.

        A task is taken from `tasks` when a worker is free for it.

        Raises:
            UserError: workers died at one task again and again. What a task raises is raised here, and ends the run.
        """
        if self._engine is not None:
            yield from self._engine.run(tasks)
            return
        if self._here is None:
            self._here = self._make(*self._arguments())
        for task in tasks:
            if self._one_thread:
                with _one_thread():
                    result = self._here(task)
            else:
                result = self._here(task)
            yield task, result


@contextmanager
def _one_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:  # nothing here computes with it
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
