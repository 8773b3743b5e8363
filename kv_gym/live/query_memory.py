"""Attendre's memories: queries of a bidirectional layer wait until later keys have come, and then attend once.

For raw tensors of encoder-style layers. A causal decoder has never seen keys newer than its queries: there, what is
left of the idea is that a token is judged later (``EvictingCache(delay=W)``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies import Policy, StatefulPolicy, make_policy
from kv_gym.policies.base import Paper


class DelayedAttention:
    """One layer's memory of keys and values, and its memory of queries that wait.

    A chunk's keys and values enter the memory, and its queries the end of the waiting ones. All but the newest `delay`
    queries leave them, attend to everything in the memory, and are shown to the policy; then the memory is cut to
    `slots`, of which the newest `delay` tokens are never evicted. So a query sees `delay` tokens ahead, and as far back
    as the policy remembers. With ``delay=0`` and a memory for everything that is ordinary attention, chunk by chunk.

    Paper: Attendre. Its text beyond the introduction was not available: the order of these steps, that hits count
    before the cut, and the protection of the newest tokens are our own specification. The policies ``lra`` and ``lfa``
    are the paper's by name; any policy serves that needs keys, values and attention alone.

        layer = DelayedAttention("lra", slots=64, delay=16)
        outputs = [layer.feed(queries, keys, values) for queries, keys, values in chunks]
        outputs.append(layer.flush())

    Args:
        policy: name or object.
        slots: of the memory, for each KV head.
        delay: tokens that a query waits for.
        scaling: factor on the products; None means d ** -0.5.

    Attributes:
        seen: tokens that came.

    Raises:
        UserError: a memory that is not larger than the delay, or a policy that needs more than the tensors.
    """

    paper = Paper(
        "Attendre: Wait To Attend By Retrieval With Evicted Queries in Memory-Based Transformers "
        "for Long Context Processing",
        "2401.04881",
    )

    def __init__(self, policy: str | Policy, slots: int, delay: int = 0, scaling: float | None = None):
        self.policy = make_policy(policy)
        for name, number in (("slots", slots), ("delay", delay)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise UserError(f"{name} is {number!r}; expected a whole number")
        if delay < 0 or slots <= delay:
            raise UserError(
                f"a memory of {slots} slots with a delay of {delay}: the newest {delay} tokens are never evicted, so "
                "expected a delay from 0 and more slots than that"
            )
        needs = self.policy.needs_future or self.policy.needs_hidden or self.policy.needs_queries
        if needs or self.policy.needs_output or self.policy.repetition is not None:
            raise UserError(
                f"policy {self.policy.name!r} needs more than keys, values and the attention of leaving queries: "
                "choose one such as lra, lfa, h2o or recency"
            )
        self.slots, self.delay, self.scaling = slots, delay, scaling
        self.seen = 0
        self._waiting: Tensor | None = None
        self._view: CacheView | None = None

    def feed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take a chunk in.

        Args:
            queries: `[batch, query_heads, m, d]`.
            keys, values: `[batch, kv_heads, m, d]`.

        Returns:
            `[batch, query_heads, p, d]`, outputs of the p oldest queries that waited; p may be 0.

        Raises:
            UserError: tensors whose shapes do not fit each other or the chunk before.
        """
        self._check(queries, keys, values)
        batch, heads, m, _ = keys.shape
        positions = torch.arange(self.seen, self.seen + m, device=keys.device).expand(batch, heads, m)
        self.seen += m
        seen = torch.full((batch,), self.seen, device=keys.device)
        budget = torch.full((batch, heads), self.slots, device=keys.device)
        valid = torch.ones_like(positions, dtype=torch.bool)
        new = CacheView(keys, values, positions, valid, seen, budget, 0, self.scaling)
        if isinstance(self.policy, StatefulPolicy):
            new = replace(new, state=self.policy.initial_state(new))
        self._view = new if self._view is None else _joined(self._view, new)
        self._waiting = queries if self._waiting is None else torch.cat((self._waiting, queries), 2)
        leaving = max(0, self._waiting.shape[2] - self.delay)
        out = self._attend(leaving)
        self._cut()
        return out

    def flush(self) -> Tensor:
        """Outputs `[batch, query_heads, p, d]` of the queries that still wait: no more tokens come.

        Raises:
            UserError: nothing came.
        """
        if self._waiting is None:
            raise UserError("no chunk came: feed queries, keys and values first")
        return self._attend(self._waiting.shape[2])

    def kept_positions(self) -> Tensor:
        """Positions of the tokens in the memory, `[batch, kv_heads, slots]` int64, ascending.

        Raises:
            UserError: nothing came.
        """
        if self._view is None:
            raise UserError("no chunk came: feed queries, keys and values first")
        return self._view.positions.sort(-1).values

    def _check(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        shapes = [tuple(tensor.shape) for tensor in (queries, keys, values)]
        expected = "expected queries [batch, query_heads, m, d], keys and values [batch, kv_heads, m, d]"
        found = ", ".join(map(str, shapes))
        if any(len(shape) != 4 for shape in shapes) or 0 in (*shapes[0], *shapes[1], *shapes[2]):
            raise UserError(f"queries, keys and values have the shapes {found}; {expected}, none of them empty")
        (batch, query_heads, m, d), (of_keys, kv_heads, *more), of_values = shapes
        if (of_keys, *more) != (batch, m, d) or of_values[:3] != shapes[1][:3] or query_heads % kv_heads:
            raise UserError(f"queries, keys and values have the shapes {found}, which do not fit; {expected}")
        if self._view is not None:
            view, waiting = self._view, self._waiting
            assert waiting is not None
            before = (waiting.shape[:2], view.keys.shape[:2], view.keys.shape[3], view.values.shape[3])
            if before != (queries.shape[:2], keys.shape[:2], d, of_values[3]):
                raise UserError(
                    f"queries, keys and values have the shapes {found}, and the chunk before had {before[0][0]} rows, "
                    f"{before[0][1]} query heads, {before[1][1]} KV heads and widths of {before[2]} and {before[3]}: "
                    "one memory serves one layer and batch"
                )

    def _attend(self, count: int) -> Tensor:
        """Let the `count` oldest queries attend to the whole memory."""
        assert self._waiting is not None and self._view is not None
        queries, self._waiting = self._waiting[:, :, :count], self._waiting[:, :, count:]
        view = self._view
        group = queries.shape[1] // view.keys.shape[1]
        scaling = queries.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        products = (queries * scaling) @ view.keys.repeat_interleave(group, 1).transpose(-1, -2)
        attention = products.softmax(-1)
        if count and isinstance(self.policy, StatefulPolicy):
            state = self.policy.observe(replace(view, state={}), attention.float(), view.state)
            self._view = replace(view, state=dict(state))
        return attention @ view.values.repeat_interleave(group, 1)

    def _cut(self) -> None:
        view = self._view
        assert view is not None
        if view.keys.shape[2] <= self.slots:
            return
        newest = view.positions >= self.seen - self.delay
        scores = self.policy.score(view).masked_fill(newest, torch.inf)
        # equal scores: the newer token stays
        order = view.positions.argsort(dim=-1, descending=True)
        best = scores.gather(2, order).argsort(dim=-1, descending=True, stable=True)[:, :, : self.slots]
        index = order.gather(2, best).sort(-1).values
        self._view = _mapped(view, lambda tensor: tensor.gather(2, _like(index, tensor)))


def _like(index: Tensor, tensor: Tensor) -> Tensor:
    return index if tensor.dim() == 3 else index[..., None].expand(*index.shape, tensor.shape[3])


def _mapped(view: CacheView, change) -> CacheView:
    """The view with every tensor `[batch, kv_heads, tokens, ...]` changed."""
    return replace(
        view,
        keys=change(view.keys),
        values=change(view.values),
        positions=change(view.positions),
        valid=change(view.valid),
        state={name: change(tensor) for name, tensor in view.state.items()},
    )


def _joined(view: CacheView, new: CacheView) -> CacheView:
    """The memory with a chunk behind it."""
    state = {name: torch.cat((view.state[name], new.state[name]), 2) for name in new.state}
    return replace(
        new,
        keys=torch.cat((view.keys, new.keys), 2),
        values=torch.cat((view.values, new.values), 2),
        positions=torch.cat((view.positions, new.positions), 2),
        valid=torch.cat((view.valid, new.valid), 2),
        state=state,
    )
