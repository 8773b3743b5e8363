"""What one layer of an evicting cache holds: slots, rows, queries, state; how it comes in, and how policies see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.live.config import UNLIMITED, Eviction
from kv_gym.live.observing import observed
from kv_gym.live.queries import last_queries
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers import joined
from kv_gym.live.tiers.tier import ragged
from kv_gym.models.attention import output_projection

SLOT = ("keys", "values", "positions")  # what every slot has; then scores, and `<place>/<name>` for policies' state
SHORT = 64  # the queries of so many tokens may wait: see observe


class Holding:
    """The tokens of one layer and all that belongs to them.

    Attributes:
        index: the layer's index in the model.
        place: which of the evicting layers it is, from 0.
        eviction: what to do, shared with the other layers.
        slots: keys, values, positions; scores that are computed once; state of watched policies.
        tier: what becomes of evicted pairs, and what is held of them.
        rows: real tokens seen, per row.
        loose: how many of the newest tokens lie at the end of every head, in the order in which they came.
        recording: drafts come, which may be taken back.
        fired: `rows` when the trigger last fired, per row, or None.
        queries: the last `[batch, query_heads, m, d]` queries that a watched policy needs, or None.
        scaling: factor on query-key products.
        unread: `[batch, t, 2]` int64, tokens that a policy's second reading has yet to repeat, and the model's own
            positions of them; -1 where they are padding. In the first evicting layer alone, None where nobody reads.
        output: slices of the output projection `[query_heads, d, D]`, where the policy needs them; the model's own
            memory.
    """

    def __init__(self, index: int, place: int, eviction: Eviction):
        self.index, self.place, self.eviction = index, place, eviction
        self.slots: EqualSlots | RaggedSlots = EqualSlots()
        self.tier = eviction.evicted.begin()
        self.rows: list[int] = []
        self.fired: list[int | None] = []
        self.loose, self.recording = 0, False
        self._waiting: Tensor | None = None  # queries of the last forward that nobody was shown yet
        self.queries: Tensor | None = None
        self.unread: Tensor | None = None
        self.scaling: float | None = None
        self.output: Tensor | None = None

    # taking in

    def append(self, keys: Tensor, values: Tensor, fresh: Tensor | None, hidden: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            keys, values: `[batch, kv_heads, m, d]`.
            fresh: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
            hidden: `[batch, m, D]` their hidden states, where a policy needs them; looked at and not kept.
        """
        self.settle()
        if not self.rows:
            self.rows, self.fired = [0] * len(keys), [None] * len(keys)
        batch, heads, m, _ = keys.shape
        if fresh is None:
            counts, self.loose = [m] * batch, self.loose + m
        else:
            counts, self.loose = fresh.sum(1).tolist(), 0
        positions = self._next(m, fresh, keys.device).expand(batch, heads, m)
        self.rows = [seen + count for seen, count in zip(self.rows, counts, strict=True)]
        new = dict(zip(SLOT, (keys, values, positions), strict=True))
        new |= self.beside(keys, values, positions, fresh, hidden)
        if fresh is not None and isinstance(self.slots, EqualSlots):
            self.slots = ragged(self.slots, new)
        if isinstance(self.slots, RaggedSlots):
            self.slots.append(new, self._slack(), fresh)
        else:
            self.slots.append(new, self._slack())

    def _next(self, m: int, fresh: Tensor | None, device: torch.device) -> Tensor:
        """Positions of new tokens, `[batch or 1, 1, m]`."""
        if fresh is None and len(set(self.rows)) == 1:
            return torch.arange(self.rows[0], self.rows[0] + m, device=device)[None, None]
        ahead = torch.arange(m) if fresh is None else fresh.cumsum(1) - 1
        return (_on(self.rows, device)[:, None] + ahead.to(device))[:, None]

    def remember(self, ids: Tensor | None, positions: Tensor | None, fresh: Tensor | None, seen: int) -> None:
        """Hold new tokens until they are read again.

        Args:
            ids: `[batch, m]` int64; None where the model was given embeddings.
            positions: the model's own, `[batch or 1, m]` int64; None where it counts on from `seen`.
            fresh: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
            seen: tokens that came before, padding included.

        Raises:
            UserError: there are no ids to repeat.
        """
        if ids is None:
            raise UserError(
                f"policy {self.eviction.policy.name!r} has the context read again, and embeddings cannot be repeated: "
                "give input_ids"
            )
        if positions is None:
            positions = torch.arange(seen, seen + ids.shape[1])[None]
        new = torch.stack((ids, positions.to(ids.device).expand_as(ids)), -1)
        if fresh is not None:
            new.masked_fill_(~fresh.to(ids.device)[..., None], -1)
        self.unread = new if self.unread is None else torch.cat((self.unread, new), 1)

    def adopt_output(self, module: nn.Module, query_heads: int, d: int) -> None:
        """Hold the output projection of the attention module, where the policy needs it."""
        if any(policy.needs_output for policy in self.eviction.watched):
            self.output = output_projection(module, query_heads, d)

    def observe(self, query: Tensor, fresh: Tensor | None) -> None:
        """Show the queries `[batch, query_heads, m, d]` of the newest tokens to whoever watches.

        Where the tokens may still be taken back that waits until it is clear that they stay: see :meth:`settle`.
        """
        self.tier.watch(query, fresh, self.slots, self.scaling, self.fired)
        if self.eviction.remembers:
            may_wait = self.recording or query.shape[2] <= SHORT
            if fresh is None and self.eviction.trigger.every is None and may_wait:
                self._waiting = query.detach()
            else:
                self._show(query, fresh)

    @torch.no_grad()
    def settle(self) -> None:
        """Show the queries that wait: before more tokens come, or anybody looks at state or queries."""
        if self._waiting is not None:
            query, self._waiting = self._waiting, None
            self._show(query, None)

    def _show(self, query: Tensor, fresh: Tensor | None) -> None:
        self.tier.observe(query, fresh)
        if wanted := self.eviction.queries:
            self.queries = last_queries(self.queries, query, wanted, fresh)
        if not self.eviction.stateful:
            return
        view, filled = self._view(None)
        view = replace(view, queries=None, state={})
        for place, policy in self.eviction.stateful:
            state = {name: filled[own] for name, own in self._state_names(place)}
            for name, tensor in observed(policy, view, query, state, fresh).items():
                self.slots.write(f"{place}/{name}", tensor)

    def visible(self) -> EqualSlots | RaggedSlots:
        """Keys and values that the newest queries see: what the tier shows of evicted pairs, then the slots."""
        if self.eviction.turn is not None:
            return self.eviction.turn.slots(self.slots, self.rows)
        shown = self.tier.visible(self.slots.buffers["keys"].dtype)
        return self.slots if shown is None else joined(shown, self.slots)

    @property
    def retractable(self) -> int:
        """How many of the newest tokens can be taken back so that nothing remembers them."""
        if not self.eviction.remembers:
            return self.loose
        return 0 if self._waiting is None else min(self.loose, self._waiting.shape[2])

    def take_back(self, count: int) -> None:
        """Forget the newest `count` tokens of every row, at most `retractable`, as if they had never come."""
        if self._waiting is not None:
            left = self._waiting.shape[2] - count
            self._waiting = self._waiting[:, :, :left] if left else None
        self.unread = None if self.unread is None else self.unread[:, : self.unread.shape[1] - count].clone()
        self.slots.drop_newest(count)
        self.rows, self.loose = [seen - count for seen in self.rows], self.loose - count
        before = zip(self.fired, self.rows, strict=True)
        self.fired = [None if at is None or not seen else min(at, seen) for at, seen in before]

    # seen by policies

    def view(self, due: Sequence[bool] | None = None) -> CacheView:
        """The layer as the policy may see it now; rows that are not `due` have budget for everything."""
        return self._view(due)[0]

    def write_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the policy's state, tensors `[batch, kv_heads, longest, ...]`."""
        for name, tensor in state.items():
            self.slots.write(f"0/{name}", tensor)

    def _view(self, due: Sequence[bool] | None) -> tuple[CacheView, dict[str, Tensor]]:
        self.settle()
        filled, valid = self.slots.padded()
        if self.eviction.turn is not None:  # policies see what attention sees
            filled["keys"] = self.eviction.turn.read(self.slots, self.rows)
        wanted = max(self.eviction.policy.needs_queries, self.eviction.allocation.needs_queries)
        view = CacheView(
            filled["keys"],
            filled["values"],
            filled["positions"],
            valid,
            seen=_on(self.rows, valid.device),
            budget=self._budget(due, valid),
            layer=self.index,
            scaling=self.scaling,
            queries=self.queries[:, :, -wanted:] if wanted and self.queries is not None else None,
            # the policy's own: it is the only one watched, unless it is a panel
            state={name: filled[own] for name, own in self._state_names(0)},
            output=self.output,
        )
        return view, filled

    def _scored(self, due: Sequence[bool] | None) -> tuple[CacheView, Tensor]:
        """A view without keys and values, which nobody reads where scores are stored, and the scores."""
        filled, valid = self.slots.padded(("positions", "scores"))
        nothing = filled["scores"][..., None][..., :0]
        seen, budget = _on(self.rows, valid.device), self._budget(due, valid)
        return CacheView(nothing, nothing, filled["positions"], valid, seen, budget, self.index), filled["scores"]

    def beside(
        self, keys: Tensor, values: Tensor, positions: Tensor, fresh: Tensor | None, hidden: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is stored beside new tokens: initial state, and scores that never change."""
        scored = self.eviction.scored
        if not self.eviction.stateful and not scored:
            return {}
        valid = torch.ones_like(positions, dtype=torch.bool)
        if fresh is not None:
            valid &= fresh[:, None].to(valid.device)
        seen = _on(self.rows, keys.device)
        budget = self._budget(None, valid)
        view = CacheView(keys, values, positions, valid, seen, budget, self.index, self.scaling, hidden=hidden)
        new = {
            f"{place}/{name}": tensor
            for place, policy in self.eviction.stateful
            for name, tensor in policy.initial_state(view).items()
        }
        return new | {name: policy.score(view).float() for name, policy in scored.items()}

    def _budget(self, due: Sequence[bool] | None, like: Tensor) -> Tensor:
        return _on(self._rooms(due), like.device)[:, None].expand(-1, like.shape[1])

    def _rooms(self, due: Sequence[bool] | None) -> list[int]:
        due = [True] * len(self.rows) if due is None else due
        room = {seen: self.eviction.room(seen) for seen in set(self.rows)}
        return [room[seen] if now else UNLIMITED for seen, now in zip(self.rows, due, strict=True)]

    def _slack(self) -> int:
        return self.eviction.slack(self.slots.mean)

    def _state_names(self, place: int) -> list[tuple[str, str]]:
        """Names of a watched policy's state: its own, and the buffer's."""
        prefix, scored = f"{place}/", self.eviction.scored
        named = (name for name in self.slots.buffers if name.startswith(prefix) and name not in scored)
        return [(name.removeprefix(prefix), name) for name in named]

    # copies and batches

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        yield from self.slots.buffers.values()
        yield from (tensor for tensor in (self.queries, self._waiting, self.unread) if tensor is not None)
        yield from self.tier.tensors()

    def select_rows(self, indices: Tensor) -> None:
        """Keep the rows `indices [rows]` of the batch, in that order."""
        if not self.rows:
            return
        self.settle()
        self.slots.select_rows(indices)
        self.tier.select_rows(indices)
        chosen = indices.tolist()
        self.rows, self.fired = [self.rows[i] for i in chosen], [self.fired[i] for i in chosen]
        if self.unread is not None:
            self.unread = self.unread.index_select(0, indices.to(self.unread.device))
        if self.queries is not None:
            self.queries = self.queries.index_select(0, indices.to(self.queries.device))


def _on(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers per row as int64 `[batch]`; alike ones reach a device without a wait."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], device=device)
    return torch.tensor(numbers, device=device)
