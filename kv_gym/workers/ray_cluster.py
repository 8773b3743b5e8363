"""Workers that are actors of a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kv_gym import __version__
from kv_gym.errors import UserError, short_reason
from kv_gym.workers.engine import MOST_WORKERS, Engine, Make, WorkerDiedError, WorkerFunction, not_sent, use_one_thread

LOCAL = "local"
"""Address that starts a Ray cluster on this machine."""


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


class _RayWorker:
    """What runs as an actor of Ray.

    Args:
        given: reference of what a worker's function is made with, in a list, so that it is not read before modules are
            found as in the process that sent it.
        version, folder, paths: of that process: of kv_gym, its working folder, and where it looks for modules.
    """

    def __init__(self, given: list, version: str, folder: str, paths: list[str]):
        self._given, self._version = given, version
        self._function: WorkerFunction | None = None
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
                self._function = WorkerFunction(*ray.get(self._given[0]))
            except ImportError as error:
                raise UserError(f"a machine of the cluster lacks a module ({error}): install it there") from None
        self._function.prepare()

    def run(self, task: Any) -> Any:
        """The result of a task."""
        self.prepare()
        assert self._function is not None
        return self._function(task)


class RayActors(Engine):
    """One actor per worker. A cluster that this process has not joined yet is joined, and left at the end.

    Args:
        make, arguments: as of :class:`WorkerFunction`.
        most: how many workers, at most.
        where: the cluster, and what a worker takes of it.

    Raises:
        UserError: no ray, a cluster that cannot be joined or has no room, or arguments that cannot be sent.
    """

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
            raise not_sent(error) from None
        self._pending: dict[Any, Any] = {}  # worker -> reference of its result

    def start(self) -> Any:
        """See :meth:`Engine.start`."""
        return self._actor.remote(*self._given)

    def send(self, worker: Any, task: Any) -> None:
        """See :meth:`Engine.send`."""
        self._pending[worker] = worker.prepare.remote() if task is None else worker.run.remote(task[0])

    def receive(self, busy: Iterable[Any]) -> tuple[Any, Any]:
        """See :meth:`Engine.receive`."""
        by_reference = {self._pending[worker]: worker for worker in busy}
        (reference, *_), _ = self._ray.wait(list(by_reference), num_returns=1)
        worker = by_reference[reference]
        del self._pending[worker]
        try:
            return worker, self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:  # the actor, its machine or its memory is gone
            return worker, WorkerDiedError(type(error).__name__)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
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
