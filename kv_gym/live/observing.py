"""Forwards shown to a policy with memory; of padded ones every row as it would be shown alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.scoring.block_schedule import observe_blocks


def observed(
    policy: StatefulPolicy, view: CacheView, query: Tensor, state: dict[str, Tensor], fresh: Tensor | None
) -> dict[str, Tensor]:
    """The state after a forward's queries `[batch, query_heads, m, d]`; `fresh [batch, m]` bool: no padding."""
    if fresh is None:
        return observe_blocks(policy, view, query, state)
    return observe_rows(policy, view, query, state, fresh)


def observe_rows(
    policy: StatefulPolicy, view: CacheView, query: Tensor, state: dict[str, Tensor], fresh: Tensor
) -> dict[str, Tensor]:
    """The state after a padded forward: each row is observed in the blocks in which it would be read alone.

    Args:
        policy: the one with memory.
        view: all rows.
        query: `[batch, query_heads, m, d]`.
        state: before.
        fresh: `[batch, m]` bool on the CPU, which queries are tokens and not padding.
    """
    after = {name: tensor.clone() for name, tensor in state.items()}
    for row in range(len(fresh)):
        asked = fresh[row].nonzero()[:, 0].to(query.device)
        if not len(asked):
            continue
        one = slice(row, row + 1)
        alone = replace(
            view,
            keys=view.keys[one],
            values=view.values[one],
            positions=view.positions[one],
            valid=view.valid[one],
            seen=view.seen[one],
            budget=view.budget[one],
        )
        observed = observe_blocks(policy, alone, query[one][:, :, asked], {k: v[one] for k, v in state.items()})
        for name, tensor in observed.items():
            after[name][one] = tensor
    return after
