"""What more workers give: ``python benchmarks/workers.py --json benchmarks/results/workers.json``.

Recording: contexts of 1,024 tokens with a continuation of 128, by the bundled model, one and two processes in turn;
the seconds are those behind the start of the workers, which load the model first. Where other work keeps the cores
busy, two processes get hardly more of them than one; the processor time per context, also given, tells what sharing
itself costs: nothing where it is equal.

Simulation: Ray on this machine with 64 CPUs that it does not have, and tasks that sleep, 2 seconds each, 5 for each
worker. Efficiency is the time that as many sleepers would take without anything between them, divided by the time
measured. Workers are started first; the start is given by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kv_gym.workers import WorkerPool

TOKENS, CONTINUATION, CONTEXTS, SHARD = 1024, 128, 32, 2
SECONDS, TASKS_EACH = 2.0, 5
COUNTS = (1, 8, 64)
TARGET = 0.9


def sleeper(seconds: float) -> Callable[[int], None]:
    """The function of a worker that does nothing."""
    return lambda _: time.sleep(seconds)


def timed_recorder(*arguments: Any) -> Callable[[Any], float]:
    """The function of a worker that records a shard and returns the processor seconds that it took."""
    from kv_gym.traces.recorder import shard_recorder

    recorder = shard_recorder(*arguments)

    def timed(group: Any) -> float:
        began = time.process_time()
        recorder(group)
        return time.process_time() - began

    return timed


def recording_seconds(counts: tuple[int, ...], rounds: int) -> dict[int, list[tuple[float, float]]]:
    """Seconds and processor seconds of a recording by each number of workers, which have loaded the model before."""
    from kv_gym.files import MODEL
    from kv_gym.models import load_model
    from kv_gym.models.model_source import ModelSource
    from kv_gym.traces import Prompt
    from kv_gym.traces.recorder import RecordingPlan, make_manifest

    model, _ = load_model(MODEL, "cpu")
    vocabulary = model.config.vocab_size
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(0, vocabulary, n).tolist()  # noqa: E731
    prompts = [Prompt(f"p{i}", draw(TOKENS), [draw(CONTINUATION)]) for i in range(CONTEXTS)]
    groups = [list(enumerate(prompts))[start : start + SHARD] for start in range(0, CONTEXTS, SHARD)]
    plan = RecordingPlan(32, {}, 32, False, None, 0)
    manifest = make_manifest(model, None, "auto", {"window": 32, "stats": [], "blocks": 32}, None)
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        pools = {
            count: WorkerPool(
                timed_recorder, lambda: (ModelSource.of(model), Path(folder) / "set", manifest, plan), count
            )
            for count in counts
        }
        for count, pool in pools.items():
            pool.start()
            list(pool.run(groups[:count]))  # the first forward is slower
        for _ in range(rounds):
            for count, pool in pools.items():
                began = time.perf_counter()
                spent = sum(seconds for _, seconds in pool.run(groups))
                found[count].append((time.perf_counter() - began, spent))
                print(f"recording, {count} workers: {found[count][-1]} s", flush=True)
        for pool in pools.values():
            pool.__exit__()
    return found


def simulated(counts: tuple[int, ...]) -> Iterator[dict[str, float]]:
    """Sleeping tasks on a Ray cluster of this machine that says it had as many CPUs as workers."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers of a busy machine wait for all others
    import ray

    ray.init("local", num_cpus=max(counts), include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        for count in counts:
            with WorkerPool(sleeper, lambda: (SECONDS,), count, "auto") as pool:
                began = time.perf_counter()
                pool.start()
                started = time.perf_counter()
                done = len(list(pool.run(range(TASKS_EACH * count))))
                seconds = time.perf_counter() - started
            assert done == TASKS_EACH * count
            row = {
                "workers": count, "tasks": done, "task_seconds": SECONDS, "start_seconds": round(started - began, 2),
                "seconds": round(seconds, 3), "efficiency": round(TASKS_EACH * SECONDS / seconds, 4),
            }  # fmt: skip
            print(row, flush=True)
            yield row
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--rounds", type=int, default=2, help="of recording")
    parser.add_argument("--part", choices=("recording", "simulation"), help="only one of the two; the other stays")
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    if arguments.part != "simulation":
        seconds = recording_seconds((1, 2), arguments.rounds)
        walls = {str(count): [round(wall, 2) for wall, _ in each] for count, each in seconds.items()}
        best = {str(count): round(CONTEXTS / min(each)[0], 3) for count, each in seconds.items()}
        spent = {str(count): round(min(cpu for _, cpu in each) / CONTEXTS, 3) for count, each in seconds.items()}
        known["recording"] = {
            "contexts": CONTEXTS, "tokens": TOKENS, "continuation_tokens": CONTINUATION, "cpus": os.cpu_count(),
            "load_average": round(os.getloadavg()[1], 1), "seconds": walls, "processor_seconds_per_context": spent,
            "contexts_per_second": best, "ratio": round(best["2"] / best["1"], 3),
        }  # fmt: skip
    if arguments.part != "recording":
        known["simulation"] = list(simulated(COUNTS))
    if arguments.json:
        arguments.json.write_text(json.dumps(known, indent=1) + "\n")
    table = Table("workers", "efficiency", "seconds", title="Ray, sleeping tasks (target: 0.9)")
    for row in known.get("simulation", ()):
        table.add_row(str(row["workers"]), f"{row['efficiency']:.3f}", f"{row['seconds']:.2f}")
    console = Console()
    console.print(table)
    if "recording" in known:
        recording = known["recording"]
        console.print(
            f"recording: two processes do {recording['ratio']} times the contexts of one per second, at a load of "
            f"{recording['load_average']} (above 2, other work ran beside it and the ratio says little); processor "
            f"seconds per context: {recording['processor_seconds_per_context']}"
        )


if __name__ == "__main__":
    main()
