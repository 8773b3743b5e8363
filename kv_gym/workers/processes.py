"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from kv_gym.workers.engine import Engine, Make, WorkerDiedError, WorkerFunction, not_sent, use_one_thread

_SECONDS_TO_END = 5.0  # that a process has to remove what it has not finished


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
            raise not_sent(error) from None


class LocalProcesses(Engine):
    """One process of this machine per worker.

    Args:
        make, arguments: as of :class:`WorkerFunction`.
        count: how many workers, at most.
    """

    def __init__(self, make: Make, arguments: tuple, count: int):
        super().__init__()
        self.count = count
        self._make, self._arguments = make, arguments
        self._workers: set[_Process] = set()

    def start(self) -> _Process:
        """See :meth:`Engine.start`."""
        worker = _Process(self._make, self._arguments)
        self._workers.add(worker)
        return worker

    def send(self, worker: _Process, task: Any) -> None:
        """See :meth:`Engine.send`."""
        with suppress(OSError):  # it is dead, as the end of its line says
            worker.line.send(task)

    def receive(self, busy: Iterable[_Process]) -> tuple[_Process, Any]:
        """See :meth:`Engine.receive`."""
        by_line = {worker.line: worker for worker in busy}
        worker = by_line[wait(list(by_line))[0]]  # type: ignore[index]
        try:
            error, result = worker.line.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            worker.process.join(_SECONDS_TO_END)
            code = worker.process.exitcode
            unguarded = "; a script that asks for workers does so below `if __name__ == '__main__':`"
            return worker, WorkerDiedError(f"exit code {code}{unguarded if code == 1 else ''}")
        if error is not None:
            raise error
        return worker, result

    def close(self) -> None:
        """See :meth:`Engine.close`."""
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
        function = WorkerFunction(*line.recv())
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
