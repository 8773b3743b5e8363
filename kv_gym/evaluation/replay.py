"""Judging policies on recorded traces: how much of the future attention would their cuts have kept?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from kv_gym.budgets import protection_for, select, uniform
from kv_gym.budgets.budget import Budget
from kv_gym.errors import UserError
from kv_gym.policies import Policy
from kv_gym.traces.sequence import Sequence


@torch.no_grad()
def replay(
    policies: Mapping[str, Policy],
    sequences: Iterable[Sequence],
    budgets: Iterable[Budget],
    sinks: int | None = None,
    recent: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """One decision per context, at its end; equal budgets for all heads.

    Args:
        policies: by the name that rows carry.
        sequences: recorded contexts with at least one continuation each.
        budgets: slots per head or shares.
        sinks, recent: protection; None means each policy's own.
        advance: called after every context and policy (progress).

    Returns:
        Rows of policy, budget, task, ``utility_kept`` (ratio of sums over layers, heads and contexts, protected
        slots included) and ``n`` (contexts).

    Raises:
        UserError: a context without continuations, or without the queries or statistics that a policy needs.
    """
    budgets = list(budgets)
    kept: dict[tuple, float] = defaultdict(float)
    total: dict[tuple, float] = defaultdict(float)
    contexts: dict[tuple, int] = defaultdict(int)
    for sequence in sequences:
        if not sequence.continuations:
            raise UserError(f"context {sequence.id} has no continuations, so nothing tells what was worth keeping")
        utility = torch.from_numpy(sequence.utility())
        for name, policy in policies.items():
            _refuse_unrecorded(policy, sequence)
            first, last = protection_for(policy, sinks, recent)
            for layer in range(len(sequence.layers)):
                view = sequence.view(layer, policy=policy.statistics, oracle=policy.needs_future)
                for budget in budgets:
                    cut = view.with_budget(uniform(budget, view.seen, view.keys.shape[1]))
                    keep = select(policy, cut, first, last)[0]
                    kept[name, budget, sequence.task] += float(utility[layer][keep].sum(dtype=torch.float64))
                    total[name, budget, sequence.task] += float(utility[layer].sum(dtype=torch.float64))
            for budget in budgets:
                contexts[name, budget, sequence.task] += 1
            advance()
    return [
        {"policy": name, "budget": budget, "allocation": "uniform", "task": task,
         "utility_kept": kept[name, budget, task] / max(total[name, budget, task], 1e-12), "n": n}
        for (name, budget, task), n in contexts.items()
    ]  # fmt: skip


def _refuse_unrecorded(policy: Policy, sequence: Sequence) -> None:
    if policy.needs_queries > sequence.queries.shape[2]:
        raise UserError(
            f"policy {policy.name!r} needs the last {policy.needs_queries} queries and context {sequence.id} has "
            f"{sequence.queries.shape[2]}: record with --window {policy.needs_queries}"
        )
    needed = policy.statistics
    if needed and needed not in sequence.stats:
        raise UserError(f"context {sequence.id} holds no statistics of policy {needed!r}: record with --stats {needed}")
