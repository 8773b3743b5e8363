"""`kv-gym pages`: what a request trace holds, and how page policies do on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kv_gym.errors import UserError
from kv_gym.pages.policies.base import PagePolicy
from kv_gym.pages.policies.registry import make_page_policy
from kv_gym.pages.readers import read_requests
from kv_gym.pages.requests import RequestTrace
from kv_gym.pages.simulator import simulate
from kv_gym.workers import WorkerPool

MOST_SEEDS = 10_000


def summarise_requests(path: str | Path, format: str = "auto") -> dict[str, float | int | str | None]:
    """Say what a trace of cache requests holds: requests, footprint, reuse distances, and the best possible hit rate.

    Args:
        path: mooncake JSON lines, a list of keys, `time id size` lines, libCacheSim's csv, an NGINX access log, or
            cache2k's binary keys; also compressed with gzip or xz.
        format: auto, mooncake, keys, times, csv, nginx or cache2k.

    Returns:
        See :meth:`~kv_gym.pages.RequestTrace.summary`.

    Raises:
        UserError: a file that cannot be read; the message names the line.
    """
    return read_requests(path, format).summary()


def compare_page_policies(
    requests: str | Path | RequestTrace,
    policies: Sequence[str | PagePolicy] = ("lru", "fifo", "lfu", "sieve", "s3_fifo", "arc", "random_page", "belady"),
    capacities: Sequence[int] = (1000,),
    semantics: str = "objects",
    oversize: str = "refuse",
    format: str = "auto",
    seeds: int = 3,
    warm_up: float = 0.0,
    workers: int | None = None,
    ray: str | None = None,
) -> list[dict]:
    """Run page policies over a trace of cache requests and count their hits.

    Args:
        requests: a trace, or the file of one.
        policies: names, with settings after colons (`s3_fifo:small=0.2`), class paths, or folders of trained ones.
        capacities: pages, or bytes where the trace has sizes.
        semantics: objects: every page stands alone; prefix: requests are chains of which only the ends may leave.
        oversize: what becomes of an object that is larger than the cache: refuse the trace, or pass it by.
        format: of the file: auto, mooncake, keys, times, csv, nginx or cache2k.
        seeds: how often a policy that draws at random is run.
        warm_up: share of the requests that only fill the cache; hits are counted after them.
        workers: processes that share the simulations. By default this process.
        ray: address of a Ray cluster whose machines simulate in place of processes here, such as ``auto``.

    Returns:
        Rows with `policy`, `capacity`, `semantics`, `trace`, `accesses`, `hits`, `hit_rate`, `byte_hit_rate` (None
        without sizes), `evictions`, `late_share` (None without a time limit), `shadow_share` (None without a shadow
        LRU) and `seed` (None where nothing is drawn).

    Raises:
        UserError: a file that cannot be read, an unknown policy, or a capacity that some object does not fit into.
    """
    trace = requests if isinstance(requests, RequestTrace) else read_requests(requests, format)
    numbers = [_whole_number(capacity) for capacity in capacities]
    if not numbers or not policies:
        raise UserError("nothing to compare; expected at least one policy and one capacity")
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"seeds is {seeds}; expected a number from 1 to {MOST_SEEDS}")
    chosen = [(str(policy), make_page_policy(policy)) for policy in policies]  # refused before anything runs
    runs = [
        (seeded, capacity, {"policy": name, "seed": seed})
        for capacity in numbers
        for name, policy in chosen
        for seed, seeded in _seeded(policy, seeds)
    ]
    served = semantics, oversize, warm_up
    pool: WorkerPool[int, dict] = WorkerPool(_simulator, lambda: (trace, runs, served), workers, ray, tasks=len(runs))
    with pool:
        rows = dict(pool.run(range(len(runs))))
    return [rows[number] for number in range(len(runs))]


def _simulator(
    trace: RequestTrace, runs: Sequence[tuple[PagePolicy, int, dict]], served: tuple[str, str, float]
) -> Callable[[int], dict]:
    """Gives the row of a run by its number."""
    semantics, oversize, warm_up = served

    def simulated(number: int) -> dict:
        policy, capacity, about = runs[number]
        return simulate(trace, policy, capacity, semantics, oversize, warm_up=warm_up).row() | about

    return simulated


def _seeded(policy: PagePolicy, seeds: int) -> Iterator[tuple[int | None, PagePolicy]]:
    if not policy.stochastic:
        yield None, policy
        return
    first = policy.seed  # type: ignore[attr-defined]
    for seed in range(first, first + seeds):
        yield seed, replace(policy, seed=seed)  # type: ignore[type-var]


def _whole_number(capacity: int | str) -> int:
    try:
        number = int(capacity)
        if isinstance(capacity, bool) or (not isinstance(capacity, str) and number != capacity):
            raise ValueError
        return number
    except (ValueError, TypeError, OverflowError):
        raise UserError(
            f"capacity {capacity!r} is no whole number; expected pages, or bytes where there are sizes"
        ) from None
