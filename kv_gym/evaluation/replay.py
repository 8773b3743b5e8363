"""Judging policies on recorded traces: how much of the future attention would their cuts have kept?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch

from kv_gym.budgets import Allocation, cut, fitting, parse_allocation, protection_for, uniform
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
    allocations: Iterable[str | Allocation] = ("uniform",),
) -> list[dict]:
    """One decision per context, at its end.

    Args:
        policies: by the name that rows carry.
        sequences: recorded contexts with at least one continuation each.
        budgets: slots per head or shares.
        sinks, recent: protection; None means each policy's own.
        advance: called after every context and policy (progress).
        allocations: who gets the slots; every policy meets all that can use its scores.

    Returns:
        Rows of policy, budget, allocation, task, ``utility_kept`` (ratio of sums over layers, heads and contexts,
        protected slots included), ``kept_share`` (of the slots, mean over contexts) and ``n`` (contexts).

    Raises:
        UserError: a context without continuations, or without the queries or statistics that a policy needs; or no
            allocation that can use a policy's scores.
    """
    budgets, given = list(budgets), [parse_allocation(allocation) for allocation in allocations]
    rules = {name: fitting(policy, given)[0] for name, policy in policies.items()}
    kept: dict[tuple, float] = defaultdict(float)
    total: dict[tuple, float] = defaultdict(float)
    slots: dict[tuple, float] = defaultdict(float)
    contexts: dict[tuple, int] = defaultdict(int)
    for sequence in sequences:
        if not sequence.continuations:
            raise UserError(f"context {sequence.id} has no continuations, so nothing tells what was worth keeping")
        utility = torch.from_numpy(sequence.utility())
        for name, policy in policies.items():
            first, last = protection_for(policy, sinks, recent)
            layers = range(len(sequence.layers))
            views = [sequence.view_for(policy, layer) for layer in layers]
            for which, budget in enumerate(budgets):  # 1 slot and a share of 1.0 are equal numbers
                room = uniform(budget, views[0].seen, utility.shape[1])
                for rule in rules[name]:
                    place = name, which, rule.name, sequence.task
                    masks = cut(policy, rule, [view.with_budget(room) for view in views], first, last)
                    for layer, keep in zip(layers, masks, strict=True):
                        kept[place] += float(utility[layer][keep[0]].sum(dtype=torch.float64))
                        total[place] += float(utility[layer].sum(dtype=torch.float64))
                    slots[place] += float(torch.stack(masks).double().mean())
                    contexts[place] += 1
            advance()
    return [
        {"policy": name, "budget": budgets[which], "allocation": rule, "task": task,
         "utility_kept": kept[name, which, rule, task] / max(total[name, which, rule, task], 1e-12),
         "kept_share": slots[name, which, rule, task] / n, "n": n}
        for (name, which, rule, task), n in contexts.items()
    ]  # fmt: skip
