"""Show new queries to a policy with memory, in blocks: the one schedule that recording and the live cache share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView, attention_weights
from kv_gym.models.context_repetition import QUERY_BLOCK
from kv_gym.policies.base import StatefulPolicy


def observe_blocks(
    policy: StatefulPolicy,
    view: CacheView,
    queries: Tensor,
    state: Mapping[str, Tensor],
    block: int = QUERY_BLOCK,
    newest_last: bool | None = None,
) -> dict[str, Tensor]:
    """The policy's state after the last q queries, shown to it as if their tokens had arrived `block` at a time.

    For each block the policy sees the slots up to the block's last token and `seen` as it was then, so one prefill
    of 512 tokens and four of 128 give the same state. Memory is linear in n: one block's attention at a time.

    Args:
        policy: whose `observe` is called.
        view: the cached slots `[B, H, n]` with those of the q new tokens among them; `seen` counts the new ones.
        queries: `[B, Hq, q, d]`, those of the last q positions.
        state: tensors `[B, H, n, ...]`, with the initial state at the new slots.
        block: queries per call of `observe`.
        newest_last: whether all slots are valid and the new tokens' are the last ones, in the order of the text: it
            saves work. None: it is looked up where it matters, for which an accelerator is waited for.
    """
    if not state or policy.repetition:  # nothing to remember, or all of it comes from a second reading
        return dict(state)
    state = dict(state)
    q, n = queries.shape[2], view.keys.shape[2]
    offsets = torch.arange(q, device=queries.device) - q
    query_positions = view.seen[:, None] + offsets  # [B, q]
    if newest_last is None:  # one block cuts nothing off
        newest_last = q > block and bool(
            view.valid.all() & (view.positions[..., n - q :] == query_positions[:, None]).all()
        )
    for start in range(0, q, block):
        stop = min(start + block, q)
        cut = n - q + stop if newest_last else n  # later tokens' slots do not exist yet
        past = _view_at(view, view.seen - (q - stop), cut)
        attention = attention_weights(
            queries[:, :, start:stop],
            past.keys,
            query_positions[:, start:stop],
            past.positions,
            past.valid,
            view.scaling,
        )
        before = {name: tensor[:, :, :cut] for name, tensor in state.items()}
        after = policy.observe(past, attention, before)
        for name, tensor in after.items():
            if newest_last:
                state[name] = torch.cat([tensor, state[name][:, :, cut:]], 2) if cut < n else tensor
            else:  # a slot that does not exist yet keeps its initial state, whatever the policy wrote
                valid = past.valid.reshape(*past.valid.shape, *[1] * (tensor.dim() - 3))
                state[name] = torch.where(valid, tensor, state[name])
    return state


def _view_at(view: CacheView, seen: Tensor, cut: int) -> CacheView:
    """The first `cut` slots of a view, as they were when `seen` tokens had come."""
    positions = view.positions[:, :, :cut]
    valid = view.valid[:, :, :cut] & (positions < seen[:, None, None])
    return replace(
        view,
        keys=view.keys[:, :, :cut],
        values=view.values[:, :, :cut],
        positions=positions.masked_fill(~valid, -1),
        valid=valid,
        seen=seen,
        queries=None,
        hidden=None if view.hidden is None else view.hidden[:, :cut],
        state={},
    )
