"""Run work in forked processes with limits on time and memory, for `hardening.py`.

A fork of a process that has imported everything costs milliseconds, where a new interpreter costs seconds.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError

MOST_CPU_SECONDS = 20
MOST_SECONDS = 300
MOST_BYTES = 2**31
"""Limits on one piece of work: what takes longer hangs, what takes more memory than this above its parent fails."""
SLACK = 2**24
"""Bytes that reading may take whatever the file's size: pages of the allocator, messages, lazy imports."""
LONGEST_SENTENCE = 1500


def fork(body: Callable[[], int]) -> int:
    """Run `body` in a forked process that ends with its result as exit code; the process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_fork(work: Callable[[], Any]) -> None:
    """Run work in a forked process, so that this one keeps no threads or caches of it.

    Raises:
        RuntimeError: the work failed.
    """

    def body() -> int:
        work()
        return 0

    _, status = os.waitpid(fork(body), 0)
    if status:
        raise RuntimeError(f"a forked process ended with status {status}")


def attempt(work: Callable[[], Any], expected: Any, most_bytes: int) -> dict[str, Any]:
    """What comes of one reading, in the process that does it.

    Args:
        work: returns the digest of what was read.
        expected: the digest of the unchanged file.
        most_bytes: memory that it may take.

    Returns:
        ``outcome``: refused, unchanged, changed, traceback or memory; and ``detail``.
    """
    gc.collect()
    before = _peak_reset()
    try:
        found = work()
        outcome, detail = ("unchanged", "") if found == expected else ("changed", "")
    except UserError as error:
        outcome, detail = "refused", str(error)
        if "\n" in detail.strip() or len(detail) > LONGEST_SENTENCE or not detail.isprintable():
            outcome, detail = "traceback", f"no plain sentence: {detail[:200]!r}"
    except MemoryError:
        outcome, detail = "memory", "MemoryError"
    except BaseException:
        outcome, detail = "traceback", "".join(traceback.format_exc().splitlines(keepends=True)[-7:])[-900:]
    taken = _peak() - before
    if taken > most_bytes and outcome != "traceback":
        outcome, detail = "memory", f"{taken:,} bytes, {most_bytes:,} allowed; {outcome} {detail}"[:400]
    return {"outcome": outcome, "detail": detail, "bytes": taken}


def limit_memory(most_bytes: int = MOST_BYTES) -> None:
    """Refuse this process more memory than it has now and `most_bytes`."""
    size = _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + most_bytes, size + most_bytes))


def work_off(
    jobs: Sequence[dict[str, Any]], run: Callable[[Iterable[dict]], Iterable[tuple[dict, dict]]]
) -> list[dict[str, Any]]:
    """Work off jobs in a forked process, and the rest in another one where it dies or hangs.

    Args:
        jobs: plain JSON data.
        run: begins the work and yields each job with what came of it; called in the forked process.

    Returns:
        The jobs, each with what came of it.
    """
    done: list[dict[str, Any]] = []
    while len(done) < len(jobs):
        rest = jobs[len(done) :]
        reader, writer = os.pipe()
        process = fork(lambda rest=rest, writer=writer: _report(rest, run, writer))  # type: ignore[misc]
        os.close(writer)
        lines, hung = _lines(reader, process)
        os.close(reader)
        if hung:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        done += [json.loads(line) for line in lines]
        if len(lines) < len(rest):
            job, ended = rest[len(lines)], os.waitstatus_to_exitcode(status)
            how = signal.Signals(-ended).name if ended < 0 else f"exit code {ended}"
            done.append(job | {"outcome": "hang" if hung else "signal", "detail": how, "bytes": 0})
    return done


def _report(jobs: Iterable[dict], run: Callable[[Iterable[dict]], Iterable[tuple[dict, dict]]], writer: int) -> int:
    silence()
    for job, result in run(jobs):
        os.write(writer, (json.dumps(job | result) + "\n").encode())
    return 0


def silence(file: Path | None = None) -> None:
    """Send what this process prints into a file, or nowhere."""
    target = os.open(file or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def _lines(reader: int, process: int) -> tuple[list[bytes], bool]:
    """Lines that a process writes until it ends, and whether one of them took too long to come."""
    data, began, cpu = b"", time.monotonic(), 0.0
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            more = os.read(reader, 1 << 16)
            if not more:
                return data.split(b"\n")[:-1], False
            data, began, cpu = data + more, time.monotonic(), cpu_seconds(process)
        elif cpu_seconds(process) - cpu > MOST_CPU_SECONDS or time.monotonic() - began > MOST_SECONDS:
            return data.split(b"\n")[:-1], True


def cpu_seconds(process: int) -> float:
    """CPU time that a process has spent."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def _peak_reset() -> int:
    """Forget the highest memory so far; memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")
