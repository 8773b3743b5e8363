"""The contract that every policy keeps, as a test for policies of your own: ``check_policy(MyPolicy())``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kv_gym.cache_view import CacheView, Future, attention_weights
from kv_gym.policies.base import Policy, StatefulPolicy

_HIDDEN_SIZE = 16  # of the model: the layer's input and output
_BLOCKS = 3


def check_policy(
    policy: Policy,
    *,
    kv_heads: int = 2,
    query_heads: int = 4,
    head_dim: int = 8,
    layers: Sequence[int] = (0,),
    tokens: int = 40,
    seed: int = 0,
) -> None:
    """Check a policy on small random views: whole caches, one token, heads of different lengths, padded rows.

    Scores are `[batch, kv_heads, tokens]`, floating, finite and on the view's device; the same view gets the same
    scores and is not modified; rows do not influence one another; invalid slots influence nothing, whatever they
    hold; the order in which slots lie does not matter (neighbours are found by `positions`); a static policy gives a
    slot the same score whatever else is cached and whenever it is asked. A policy with memory
    gives state of shape `[batch, kv_heads, tokens, ...]`, the same names, shapes and types after every `observe`.

    Args:
        policy: the object to check. It is given only what it declares (queries, hidden states, the future).
        kv_heads: KV heads of one layer; of the model, for a learned policy.
        query_heads: query heads of one layer.
        head_dim: channels of one head.
        layers: indices of the layers to try.
        tokens: slots in the largest view.
        seed: of the random views.

    Raises:
        AssertionError: in one sentence, the first part of the contract that does not hold.
        UserError: what the policy itself refuses, such as head sizes it was not trained for.
    """
    _require(isinstance(policy, Policy), f"{policy!r} is no kv_gym.Policy")
    _check_declarations(policy)
    for layer in layers:
        factory = _ViewFactory(policy, kv_heads, query_heads, head_dim, layer, torch.Generator().manual_seed(seed))
        for case, plain in (
            ("a whole cache", factory.whole(2, tokens)),
            ("one token", factory.whole(1, 1)),
            ("ragged heads after evictions", factory.ragged(2, tokens)),
        ):
            _check_view(factory, plain, f"policy {policy.name!r} on {case}, layer {layer}")


def _check_declarations(policy: Policy) -> None:
    protection = policy.protection
    _require(
        len(protection) == 2 and all(isinstance(count, int) and count >= 0 for count in protection),
        f"policy {policy.name!r} declares protection {protection!r}; expected (sinks, recent), two integers from 0",
    )
    _require(
        isinstance(policy.needs_queries, int) and policy.needs_queries >= 0,
        f"policy {policy.name!r} declares needs_queries {policy.needs_queries!r}; expected an integer from 0",
    )


def _check_view(factory: _ViewFactory, plain: CacheView, subject: str) -> None:
    view = factory.observed(plain, subject)
    before = _snapshot(view)
    scores = factory.policy.score(view)
    for name, tensor in _snapshot(view).items():
        _require(
            torch.equal(tensor, before[name]), f"{subject} changed the view's {name} in place; expected a pure score"
        )

    _check_scores(scores, view, subject)
    again = factory.policy.score(view)
    _require(torch.equal(again[view.valid], scores[view.valid]), f"{subject} scored the same view differently twice")

    for row in range(len(view.keys)):
        alone = factory.policy.score(factory.observed(_single_row(plain, row), subject))
        _compare(
            alone, scores[row : row + 1], view.valid[row : row + 1], f"{subject} lets batch rows change one another"
        )

    padded = factory.policy.score(factory.observed(factory.padded(plain, extra=5), subject))
    n = view.keys.shape[2]
    _compare(padded[..., :n], scores, view.valid, f"{subject} lets invalid slots change the scores of valid ones")

    order = factory.shuffle(plain)
    shuffled = factory.policy.score(factory.observed(_reorder(plain, order), subject))
    _compare(
        shuffled,
        scores.gather(-1, order),
        view.valid.gather(-1, order),
        f"{subject} depends on the order in which slots lie; sort by view.positions where neighbours matter",
    )

    if factory.policy.static:
        part = order[..., : -(-n // 2)]
        later = _reorder(replace(plain, seen=plain.seen + 100, budget=plain.budget + 1), part)
        _compare(
            factory.policy.score(factory.observed(later, subject)),
            scores.gather(-1, part),
            later.valid,
            f"{subject} says it is static, and scores change with the other slots or with the tokens seen",
        )

    half = replace(plain, **{name: getattr(plain, name).bfloat16() for name in ("keys", "values")})
    half = replace(half, queries=None if plain.queries is None else plain.queries.bfloat16())
    _check_scores(factory.policy.score(factory.observed(half, subject)), half, f"{subject} in bfloat16")


@dataclass
class _ViewFactory:
    """Makes random views that hold what the policy declares."""

    policy: Policy
    kv_heads: int
    query_heads: int
    head_dim: int
    layer: int
    generator: torch.Generator

    def whole(self, batch: int, n: int) -> CacheView:
        positions = torch.arange(n).expand(batch, self.kv_heads, n)
        return self._view(positions, torch.full((batch,), n))

    def ragged(self, batch: int, n: int) -> CacheView:
        """Every head has kept other tokens and another number of them; rows have seen different lengths."""
        seen = torch.tensor([2 * n + 7 * row for row in range(batch)])
        positions = torch.full((batch, self.kv_heads, n), -1)
        for row in range(batch):
            for head in range(self.kv_heads):
                kept = max(1, n - 3 * row - 2 * head)
                older = torch.randperm(int(seen[row]) - 1, generator=self.generator)[: kept - 1]
                newest = seen[row : row + 1] - 1
                positions[row, head, :kept] = torch.cat((older, newest)).sort().values
        return self._view(positions, seen)

    def _view(self, positions: Tensor, seen: Tensor) -> CacheView:
        batch, heads, n = positions.shape
        m = min(self.policy.needs_queries, int(seen.min()))
        return CacheView(
            keys=self._randn(batch, heads, n, self.head_dim),
            values=self._randn(batch, heads, n, self.head_dim),
            positions=positions,
            valid=positions >= 0,
            seen=seen,
            budget=torch.full((batch, heads), max(1, n // 4)),
            layer=self.layer,
            queries=self._randn(batch, self.query_heads, m, self.head_dim) if m else None,
            hidden=self._randn(batch, n, _HIDDEN_SIZE) if self.policy.needs_hidden else None,
            future=self._future(batch, n) if self.policy.needs_future else None,
            output=self._randn(self.query_heads, self.head_dim, _HIDDEN_SIZE) if self.policy.needs_output else None,
        )

    def _future(self, batch: int, n: int) -> Future:
        attention = torch.rand(batch, self.kv_heads, n, _BLOCKS, 2, generator=self.generator)
        return Future(attention, torch.full((_BLOCKS,), 1 / _BLOCKS))

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def observed(self, view: CacheView, subject: str) -> CacheView:
        """The view with the policy's state after two blocks of queries; the same queries for the same view sizes."""
        if not isinstance(self.policy, StatefulPolicy):
            return view
        state = self.policy.initial_state(view)
        for block in range(2):
            _check_state(state, view, subject)
            after = self.policy.observe(view, self._attention(view, block), dict(state))
            same = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
                name: (tensor.shape, tensor.dtype) for name, tensor in after.items()
            }
            _require(same, f"{subject} changed names, shapes or types of its state in observe")
            state = after
        return replace(view, state=state)

    def _attention(self, view: CacheView, block: int, m: int = 4) -> Tensor:
        queries = torch.randn(1, self.query_heads, m, self.head_dim, generator=torch.Generator().manual_seed(block))
        queries = queries.expand(len(view.keys), -1, -1, -1).to(view.keys.dtype)
        positions = (view.seen[:, None] - m + torch.arange(m)).clamp(min=0)
        return attention_weights(queries, view.keys, positions, view.positions, view.valid, view.scaling)

    def padded(self, view: CacheView, extra: int) -> CacheView:
        """The view with `extra` invalid slots at the end, which hold large random numbers."""
        batch, heads, _, d = view.keys.shape
        noise = lambda *shape: 30 * self._randn(*shape)  # noqa: E731
        future = view.future
        if future is not None:
            more = noise(batch, heads, extra, *future.attention.shape[3:]).abs()
            future = replace(future, attention=torch.cat((future.attention, more), 2))
        return replace(
            view,
            keys=torch.cat((view.keys, noise(batch, heads, extra, d)), 2),
            values=torch.cat((view.values, noise(batch, heads, extra, d)), 2),
            positions=torch.cat((view.positions, torch.full((batch, heads, extra), -1)), 2),
            valid=torch.cat((view.valid, torch.zeros(batch, heads, extra, dtype=torch.bool)), 2),
            hidden=None if view.hidden is None else torch.cat((view.hidden, noise(batch, extra, _HIDDEN_SIZE)), 1),
            future=future,
        )

    def shuffle(self, view: CacheView) -> Tensor:
        """Slot indices `[B, H, n]` in random order, invalid ones last; one order for all heads if hidden is needed."""
        keys = torch.rand(view.positions.shape, generator=self.generator)
        if view.hidden is not None:  # one hidden state per slot serves all heads
            keys = keys[:, :1].expand_as(keys)
            return keys.argsort(-1)
        return (keys + 2 * ~view.valid).argsort(-1)


def _check_scores(scores: Tensor, view: CacheView, subject: str) -> None:
    shape = list(view.positions.shape)
    _require(isinstance(scores, Tensor), f"{subject} returned {type(scores).__name__}; expected a tensor {shape}")
    _require(list(scores.shape) == shape, f"{subject} returned scores {list(scores.shape)}; expected {shape}")
    _require(scores.is_floating_point(), f"{subject} returned {scores.dtype} scores; expected a floating type")
    _require(
        scores.device == view.keys.device, f"{subject} returned scores on {scores.device}; expected {view.keys.device}"
    )
    _require(bool(scores[view.valid].isfinite().all()), f"{subject} returned scores that are not finite")


def _check_state(state: dict[str, Tensor], view: CacheView, subject: str) -> None:
    slots = list(view.positions.shape)
    for name, tensor in state.items():
        shape = list(tensor.shape)
        _require(shape[:3] == slots, f"{subject} has state {name!r} of shape {shape}; expected {slots} and more axes")


def _compare(got: Tensor, expected: Tensor, where: Tensor, message: str) -> None:
    got, expected = got[where].double(), expected[where].double()
    tolerance = 1e-4 * max(1e-6, float(expected.abs().max()))
    worst = float((got - expected).abs().max())
    _require(worst <= tolerance, f"{message} (a score differs by {worst:.3g})")


def _single_row(view: CacheView, row: int) -> CacheView:
    only = slice(row, row + 1)
    changes: dict[str, Any] = {
        f.name: value[only]
        for f in fields(view)
        if isinstance(value := getattr(view, f.name), Tensor) and f.name != "output"  # one for all rows
    }
    future = view.future
    if future is not None:
        changes["future"] = replace(future, attention=future.attention[only])
    return replace(view, **changes)


def _reorder(view: CacheView, order: Tensor) -> CacheView:
    """The slots `order` `[B, H, n]` of a view without state."""
    wide = lambda tensor: tensor.gather(2, _as_wide(order, tensor))  # noqa: E731
    future, hidden = view.future, view.hidden
    return replace(
        view,
        keys=wide(view.keys),
        values=wide(view.values),
        positions=wide(view.positions),
        valid=wide(view.valid),
        hidden=None if hidden is None else hidden.gather(1, _as_wide(order[:, 0], hidden)),
        future=None if future is None else replace(future, attention=wide(future.attention)),
    )


def _as_wide(order: Tensor, tensor: Tensor) -> Tensor:
    trailing = tensor.shape[order.dim() :]
    return order.reshape(*order.shape, *[1] * len(trailing)).expand(*order.shape, *trailing)


def _snapshot(view: CacheView) -> dict[str, Tensor]:
    tensors = {f.name: value for f in fields(view) if isinstance(value := getattr(view, f.name), Tensor)}
    tensors.update({f"state {name!r}": tensor for name, tensor in view.state.items()})
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _require(condition: bool, message: str) -> None:
    # not the assert statement: python -O would skip the whole check
    if not condition:
        raise AssertionError(message)
