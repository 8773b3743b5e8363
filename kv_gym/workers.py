"""Many calls of one function, shared out: to this process, to processes of this machine, or to a Ray cluster.

    with WorkerPool(make_recorder, lambda: (model, settings), workers=4) as pool:
        for task, result in pool.run(tasks):
            ...

A worker calls ``make_recorder(model, settings)`` once, before its first task, and then what that returned with one task
after the other. A worker that dies is replaced and its task tried again. Every worker computes with one thread: sums
over several threads are rounded otherwise, and so results depend neither on the number of workers nor on the engine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from kv_gym import __version__
from kv_gym.errors import UserError, short_reason

MOST_WORKERS = 1024
MOST_TRIES = 3
"""Workers that may die at one task before the whole run is given up."""
LOCAL = "local"
"""Address that starts a Ray cluster on this machine."""
_SECONDS_TO_END = 5.0  # that a process has to remove what it has not finished

Task = TypeVar("Task")
Result = TypeVar("Result")
Make = Callable[..., Callable[[Any], Any]]


@dataclass(frozen=True)
class RayAddress:
    """Which Ray cluster to use, and what one worker takes of it.

    Attributes:
        address: as ``ray.init`` takes it: ``auto``, ``ray://HOST:PORT``, ``HOST:PORT``, or ``local`` to start a cluster
            on this machine.
        cpus, gpus: CPUs and GPUs of a worker; a GPU may be shared, such as 0.25.
    """

    address: str
    cpus: float = 1.0
    gpus: float = 0.0

    @classmethod
    def parse(cls, text: str) -> RayAddress:
        """Read ``ADDRESS``, ``ADDRESS:gpus=0.25``, ``ADDRESS:cpus=2:gpus=1``.

        Raises:
            UserError: another setting, or a number that is none.
        """
        address, settings = text, dict[str, float]()
        while "=" in (part := address.rpartition(":")[2]):
            name, _, number = part.partition("=")
            try:
                settings[name] = float(number)
            except ValueError:
                settings[name] = -1.0
            if name not in ("cpus", "gpus") or not 0 <= settings[name] < MOST_WORKERS:
                raise UserError(f"ray is {text!r}; expected ADDRESS, ADDRESS:gpus=0.25 or ADDRESS:cpus=2:gpus=1")
            address = address.rpartition(":")[0]
        if not address:
            raise UserError(f"ray is {text!r}; expected the address of a cluster, such as auto or {LOCAL}")
        return cls(address, **settings)


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
        self._engine: _Engine | None = None
        address = None if ray is None else RayAddress.parse(ray)
        if address is not None and tasks:
            self._engine = _RayActors(make, arguments(), min(workers or MOST_WORKERS, tasks), address)
        elif address is None and min(workers or 1, tasks) > 1:
            self._engine = _LocalProcesses(make, arguments(), min(workers or 1, tasks))
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


class _Function:
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
        self.prepare()
        assert self._function is not None
        return self._function(task)


def use_one_thread() -> None:
    """Let this process compute with one thread; torch is not imported for that."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class _WorkerDiedError(Exception):
    """A worker ended without a result; the text says how."""


class _Engine(ABC):
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
        """Wait for one of the workers: it, and its result or a :class:`_WorkerDiedError`; raises what a task raised."""

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
            if isinstance(result, _WorkerDiedError):
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
            if isinstance(result, _WorkerDiedError):
                if died + 1 == MOST_TRIES:
                    raise self._given_up(result)
                again.append((task, died + 1))
                continue
            self._idle.append(worker)
            yield task, result

    def _given_up(self, died: _WorkerDiedError) -> UserError:
        return UserError(
            f"a worker died ({died}), as did those that tried its task again: what is finished is kept; run the same "
            "again, with fewer workers if memory may be short"
        )


def _not_sent(error: Exception) -> UserError:
    return UserError(
        f"other processes cannot be sent what they need ({short_reason(error)}): define classes and functions in a "
        "module, or leave workers out"
    )


class _Process:
    """A worker process of this machine, and our end of the line to it."""

    def __init__(self, make: Make, arguments: tuple):
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, and their locks
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.line.send((make, arguments))
        except OSError:
            pass  # it died at once, as the end of its line says
        except Exception as error:  # of what pickle cannot send
            self.process.kill()
            raise _not_sent(error) from None


class _LocalProcesses(_Engine):
    def __init__(self, make: Make, arguments: tuple, count: int):
        super().__init__()
        self.count = count
        self._make, self._arguments = make, arguments
        self._workers: set[_Process] = set()

    def start(self) -> _Process:
        worker = _Process(self._make, self._arguments)
        self._workers.add(worker)
        return worker

    def send(self, worker: _Process, task: Any) -> None:
        with suppress(OSError):  # it is dead, as the end of its line says
            worker.line.send(task)

    def receive(self, busy: Iterable[_Process]) -> tuple[_Process, Any]:
        by_line = {worker.line: worker for worker in busy}
        worker = by_line[wait(list(by_line))[0]]  # type: ignore[index]
        try:
            error, result = worker.line.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            worker.process.join(_SECONDS_TO_END)
            code = worker.process.exitcode
            unguarded = "; a script that asks for workers does so below `if __name__ == '__main__':`"
            return worker, _WorkerDiedError(f"exit code {code}{unguarded if code == 1 else ''}")
        if error is not None:
            raise error
        return worker, result

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            worker.process.kill()
            worker.line.close()
        self._workers.clear()
        self._idle.clear()


def _serve(line: Any) -> None:
    """A worker process: takes tasks until its parent ends it, or has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that unfinished files are removed
    end_with_parent()
    use_one_thread()  # before what is received imports torch
    try:
        function = _Function(*line.recv())
    except EOFError:
        return
    while True:
        try:
            task = line.recv()
        except EOFError:
            return
        try:
            result = None
            if task is None:
                function.prepare()
            else:
                result = function(task[0])
            line.send((None, result))
        except Exception as error:
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            try:
                line.send((error, None))
            except Exception:  # an error, or a result, that cannot be sent
                line.send((RuntimeError(f"{type(error).__name__}: {error}"), None))


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, however that came about.

    A worker waits for tasks forever when its parent is killed. What is under way is lost, and every file is whole or
    not there.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _RayWorker:
    """What runs as an actor of Ray.

    Args:
        given: reference of what a worker's function is made with, in a list, so that it is not read before modules are
            found as in the process that sent it.
        version, folder, paths: of that process: of kv_gym, its working folder, and where it looks for modules.
    """

    def __init__(self, given: list, version: str, folder: str, paths: list[str]):
        self._given, self._version = given, version
        self._function: _Function | None = None
        if os.path.isdir(folder):
            os.chdir(folder)
        sys.path += [path for path in paths if path not in sys.path]

    def prepare(self) -> None:
        """Make the function."""
        import ray

        if self._version != __version__:
            raise UserError(
                f"a machine of the cluster has kv_gym {__version__} and this one {self._version}: install the same"
            )
        if self._function is None:
            use_one_thread()
            try:
                self._function = _Function(*ray.get(self._given[0]))
            except ImportError as error:
                raise UserError(f"a machine of the cluster lacks a module ({error}): install it there") from None
        self._function.prepare()

    def run(self, task: Any) -> Any:
        """The result of a task."""
        self.prepare()
        assert self._function is not None
        return self._function(task)


class _RayActors(_Engine):
    """One actor per worker. A cluster that this process has not joined yet is joined, and left at the end."""

    def __init__(self, make: Make, arguments: tuple, most: int, where: RayAddress):
        super().__init__()
        try:
            import ray
        except ImportError:
            raise UserError("workers on a Ray cluster need the package ray: pip install 'kv-gym[ray]'") from None
        self._ray = ray
        self._joined = not ray.is_initialized()
        if self._joined:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            try:
                ray.init(address=where.address)
            except Exception as error:  # of many kinds, by how the address is reached
                raise UserError(
                    f"cannot join the Ray cluster {where.address!r} ({short_reason(error)}): start one with `ray start "
                    f"--head`, or give {LOCAL}"
                ) from None
        try:
            room = _room(ray.cluster_resources(), where)
            if not room:
                raise UserError(
                    f"no machine of the Ray cluster has room for a worker of {where.cpus:g} CPUs and {where.gpus:g} "
                    "GPUs: ask for less, such as auto:cpus=1"
                )
        except BaseException:
            self.close()
            raise
        self.count = min(most, room)
        self._actor = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus, max_restarts=0)(_RayWorker)
        try:
            self._given = [ray.put((make, arguments))], __version__, os.getcwd(), sys.path
        except Exception as error:  # of what cannot be sent
            self.close()
            raise _not_sent(error) from None
        self._pending: dict[Any, Any] = {}  # worker -> reference of its result

    def start(self) -> Any:
        return self._actor.remote(*self._given)

    def send(self, worker: Any, task: Any) -> None:
        self._pending[worker] = worker.prepare.remote() if task is None else worker.run.remote(task[0])

    def receive(self, busy: Iterable[Any]) -> tuple[Any, Any]:
        by_reference = {self._pending[worker]: worker for worker in busy}
        (reference, *_), _ = self._ray.wait(list(by_reference), num_returns=1)
        worker = by_reference[reference]
        del self._pending[worker]
        try:
            return worker, self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:  # the actor, its machine or its memory is gone
            return worker, _WorkerDiedError(type(error).__name__)

    def close(self) -> None:
        if self._joined:
            self._ray.shutdown()
            return
        for worker in (*self._idle, *getattr(self, "_pending", ())):
            self._ray.kill(worker)
        self._idle.clear()


def _room(resources: dict[str, float], where: RayAddress) -> int:
    """How many workers a cluster has room for now."""
    asked = {"CPU": where.cpus, "GPU": where.gpus}
    return min([int(resources.get(name, 0) / share) for name, share in asked.items() if share] + [MOST_WORKERS])
