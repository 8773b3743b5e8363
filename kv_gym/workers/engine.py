"""What all workers share: the function that each makes once, and how tasks are handed to workers that may die."""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kv_gym.errors import UserError, short_reason

MOST_WORKERS = 1024
MOST_TRIES = 3
"""Workers that may die at one task before the whole run is given up."""

Make = Callable[..., Callable[[Any], Any]]


class WorkerFunction:
    """The function of a worker, made before its first task; in a process of its own.

    Args:
        make, arguments: as of :class:`WorkerPool`.
    """

    def __init__(self, make: Make, arguments: tuple):
        self._make, self._arguments = make, arguments
        self._function: Callable[[Any], Any] | None = None

    def prepare(self) -> None:
        """Make the function."""
        if self._function is None:
            use_one_thread()
            self._function = self._make(*self._arguments)
            use_one_thread()  # of a torch that was imported just now

    def __call__(self, task: Any) -> Any:
        """The result of a task."""
        self.prepare()
        assert self._function is not None
        return self._function(task)


def use_one_thread() -> None:
    """Let this process compute with one thread; torch is not imported for that."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class WorkerDiedError(Exception):
    """A worker ended without a result; the text says how."""


class Engine(ABC):
    """Workers by number, each with one task at a time.

    Attributes:
        count: how many workers there are at most.
    """

    count: int

    def __init__(self) -> None:
        self._idle: list[Any] = []

    @abstractmethod
    def start(self) -> Any:
        """A new worker."""

    @abstractmethod
    def send(self, worker: Any, task: Any) -> None:
        """Give a worker a task; None lets it prepare. A worker that is dead says so in :meth:`receive`."""

    @abstractmethod
    def receive(self, busy: Iterable[Any]) -> tuple[Any, Any]:
        """Wait for one of the workers: it, and its result or a :class:`WorkerDiedError`; raises what a task raised."""

    @abstractmethod
    def close(self) -> None:
        """End all workers."""

    def start_all(self) -> None:
        """Start all workers and wait until each has made its function."""
        workers = [self.start() for _ in range(self.count - len(self._idle))]
        for worker in workers:
            self.send(worker, None)
        waiting = set(workers)
        while waiting:
            worker, result = self.receive(waiting)
            waiting.remove(worker)
            if isinstance(result, WorkerDiedError):
                raise self._given_up(result)
            self._idle.append(worker)

    def run(self, tasks: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """See :meth:`WorkerPool.run`."""
        fresh, again = iter(tasks), deque[tuple[Any, int]]()
        busy: dict[Any, tuple[Any, int]] = {}  # worker -> task, workers that died at it
        more = True
        while True:
            while len(busy) < self.count and (again or more):
                if again:
                    task, died = again.popleft()
                else:
                    try:
                        task, died = next(fresh), 0
                    except StopIteration:
                        more = False
                        continue
                worker = self._idle.pop() if self._idle else self.start()
                busy[worker] = task, died
                self.send(worker, (task,))
            if not busy:
                return
            worker, result = self.receive(busy)
            task, died = busy.pop(worker)
            if isinstance(result, WorkerDiedError):
                if died + 1 == MOST_TRIES:
                    raise self._given_up(result)
                again.append((task, died + 1))
                continue
            self._idle.append(worker)
            yield task, result

    def _given_up(self, died: WorkerDiedError) -> UserError:
        return UserError(
            f"a worker died ({died}), as did those that tried its task again: what is finished is kept; run the same "
            "again, with fewer workers if memory may be short"
        )


def not_sent(error: Exception) -> UserError:
    """The error for a function, arguments or a class that pickle cannot send."""
    return UserError(
        f"other processes cannot be sent what they need ({short_reason(error)}): define classes and functions in a "
        "module, or leave workers out"
    )
