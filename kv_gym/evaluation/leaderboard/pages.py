"""Page policies in a leaderboard: policies x capacities x seeds on traces of requests, each cell simulated once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard.identity import RESULTS, digest, page_policy_hash, requests_hash
from kv_gym.evaluation.leaderboard.plan import trained
from kv_gym.evaluation.leaderboard.spec import PageSpec
from kv_gym.evaluation.rows import page_task
from kv_gym.pages import PagePolicy, RequestTrace, make_page_policy, read_requests, simulate


@dataclass(frozen=True)
class PageCell:
    """One policy at one capacity.

    Attributes:
        name: what rows call the policy.
        policy, seed: the policy, and its training run or what its draws begin with; None where nothing is drawn.
        capacity: of the cache.
        trace, trace_hash: the requests.
        spec: how they are served.
    """

    name: str
    policy: PagePolicy
    seed: int | None
    capacity: int
    trace: RequestTrace
    trace_hash: str
    spec: PageSpec

    @cached_property
    def policy_hash(self) -> str:
        """Of the policy's settings and code, or weights."""
        return page_policy_hash(self.policy)

    @cached_property
    def id(self) -> str:
        """SHA-256 of all that the result depends on, and of the name and seed that the row will bear."""
        served = self.capacity, self.spec.semantics, self.spec.oversize, self.spec.warm_up
        return digest([RESULTS, "pages", self.policy_hash, self.name, self.seed, *served, self.trace_hash])

    def measure(self) -> dict[str, Any]:
        """The fields of its row."""
        spec = self.spec
        row: dict[str, Any] = {
            "cell": self.id, "policy": self.name, "seed": self.seed, "policy_hash": self.policy_hash,
            "budget": self.capacity, "task": page_task(self.trace.name, spec.semantics, spec.warm_up),
            "tasks_hash": self.trace_hash,
        }  # fmt: skip
        try:
            found = simulate(
                self.trace, self.policy, self.capacity, spec.semantics, spec.oversize, warm_up=spec.warm_up
            )
        except UserError as error:
            return row | {"refused": str(error)}
        kept = ("hit_rate", "byte_hit_rate", "evictions", "late_share", "shadow_share")
        return row | {"n": found.accesses} | {name: getattr(found, name) for name in kept}


def page_cells(spec: PageSpec, seeds: Sequence[int]) -> Iterator[PageCell]:
    """All cells of one trace.

    Raises:
        UserError: an unknown policy, a folder that is not there, or a trace that cannot be read.
    """
    policies: list[tuple[str, PagePolicy, int | None]] = []
    for name in dict.fromkeys(spec.policies):
        policy: Any = make_page_policy(name)
        policies += (
            [(name, replace(policy, seed=seed), seed) for seed in seeds]
            if policy.stochastic
            else [(name, policy, None)]
        )
    policies += [(name, make_page_policy(folder), seed) for name, seed, folder in trained(spec.learned, seeds)]
    trace = read_requests(spec.requests, spec.format)
    known = requests_hash(trace)
    for capacity in dict.fromkeys(spec.capacities):
        for name, policy, seed in policies:
            yield PageCell(name, policy, seed, capacity, trace, known, spec)
