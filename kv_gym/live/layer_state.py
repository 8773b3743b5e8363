"""What one layer of an evicting cache holds: how tokens come in, how policies see them, and how they are evicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from kv_gym.budgets import ScoredLayer, slot_to_evict, top_mask
from kv_gym.cache_view import CacheView, attention_weights
from kv_gym.devices import HostCopy, number_tensor, to_device
from kv_gym.errors import UserError
from kv_gym.live.config import CacheConfig
from kv_gym.live.selection import LayerSelection
from kv_gym.live.slots import EqualSlots, RaggedSlots, Slots, concatenate
from kv_gym.live.tiers import EvictedPairs, TierRecorder
from kv_gym.live.tiers.base import select_rows
from kv_gym.models.attention import output_projection
from kv_gym.models.context_repetition import QUERY_BLOCK
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.scoring.block_schedule import observe_blocks

SLOT_BUFFERS = ("keys", "values", "positions")  # what every slot has; then scores, and `<index>/<name>` for state
MAX_PENDING = 64  # the queries of so many tokens may wait: see LayerState.observe
UNLIMITED = 2**40  # the budget of a row that is not to be cut now


class LayerState:
    """The tokens of one layer and all that belongs to them.

    Attributes:
        index: the layer's index in the model.
        ordinal: which of the evicting layers it is, from 0.
        config: shared with the other layers.
        slots: keys, values, positions; scores that are computed on arrival; state of tracked policies.
        tier: what becomes of evicted pairs, and what is stored of them.
        selection: which slots a query reads.
        tokens_seen: real tokens seen, per row.
        evicted_at: `tokens_seen` at the last eviction, per row, or None.
        appended: how many of the newest tokens lie at the end of every head, in the order in which they came.
        record_past: drafts come, which may be taken back.
        prefill_unfinished: the forward is a chunk of a prompt, and not the last one: nothing is evicted after it.
        queries: the last `[batch, query_heads, m, d]` queries that a tracked policy needs, or None.
        scaling: factor on query-key products.
        unread: `[batch, t, 2]` int64, tokens that a policy's second reading has yet to repeat, and the model's own
            positions of them; -1 where they are padding. In the first evicting layer alone, None where no policy asks.
        unread_is_padded: whether some of them are padding.
        output: slices of the output projection `[query_heads, d, D]`, where a policy needs them; the model's own
            memory.
        newest: keys, values and positions of a decoding step's token, until all layers have read it and are scored
            and cut together (:mod:`kv_gym.live.decoding`); else None.
        next_position: `[1, 1, 1]` int64, the position of the next token as the device knows it, while a decoding step
            or an eviction is captured (:mod:`kv_gym.live.captured_steps`); None: `tokens_seen` says it.
    """

    def __init__(self, index: int, ordinal: int, config: CacheConfig):
        self.index, self.ordinal, self.config = index, ordinal, config
        self.slots: Slots = EqualSlots()
        self.tier = config.layer_tier.begin(ordinal)
        self.selection = LayerSelection(config.select, ordinal)
        self.tokens_seen: list[int] = []
        self.evicted_at: list[int | None] = []
        self.appended, self.record_past, self.prefill_unfinished = 0, False, False
        self._pending_query: Tensor | None = None  # queries of the last forward that no policy was shown yet
        self.queries: Tensor | None = None
        self.unread: Tensor | None = None
        self.unread_is_padded = False
        self.scaling: float | None = None
        self.output: Tensor | None = None
        self.newest: dict[str, Tensor] | None = None
        self.next_position: Tensor | None = None

    # taking tokens in

    def append(self, keys: Tensor, values: Tensor, token_mask: Tensor | None, hidden: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            keys, values: `[batch, kv_heads, m, d]`.
            token_mask: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
            hidden: `[batch, m, D]` their hidden states, where a policy needs them; read here and not kept.

        Raises:
            UserError: keys that are not finite (on a CPU; an accelerator would have to be waited for).
        """
        self.observe_pending()
        if not self.tokens_seen:
            self.tokens_seen, self.evicted_at = [0] * len(keys), [None] * len(keys)
        batch, heads, m, _ = keys.shape
        if token_mask is None:
            counts, self.appended = [m] * batch, self.appended + m
        else:
            counts, self.appended = token_mask.sum(1).tolist(), 0
        positions = self._next_positions(m, token_mask, keys.device).expand(batch, heads, m)
        self.tokens_seen = [seen + count for seen, count in zip(self.tokens_seen, counts, strict=True)]
        pairs = {"keys": keys, "values": values, "positions": positions}
        if self.decides_with_others(m, token_mask):
            self.newest = pairs
            if not (isinstance(self.slots, EqualSlots) and self.slots.has_gap):  # room for the score to come
                pairs = pairs | {"scores": torch.zeros_like(positions, dtype=torch.float32)}
            self.slots = self.slots.append(pairs, self._slack())
            return
        self._refuse_not_finite(keys, token_mask)
        self._store(pairs, token_mask, self._slack(), hidden)

    def decides_with_others(self, m: int, token_mask: Tensor | None) -> bool:
        """Whether a forward of `m` tokens is a decoding step that all layers score, and cut, together at its end.

        Uneven heads do so where one rule cuts all layers; where each layer is cut alone, it scores alone, too.
        """
        if m > 1 or token_mask is not None:
            return False
        if isinstance(self.slots, EqualSlots):
            return self.slots.length > 0 and self.config.decides_together
        return self.slots.device.type == "cpu" and self.config.scores_together and self.config.evicts_after_forward

    def _refuse_not_finite(self, keys: Tensor, token_mask: Tensor | None) -> None:
        """Policies would rank such keys by numbers that mean nothing; those of padding may be anything."""
        if keys.device.type != "cpu":
            return
        real = keys if token_mask is None else keys.transpose(1, 2)[token_mask]
        if not math.isfinite(float(real.sum(dtype=torch.float64))):
            raise UserError(
                f"the keys of layer {self.index} are not finite, so no policy can choose among them: check the model's "
                "weights, or load it in a wider dtype"
            )

    def _store(
        self, pairs: dict[str, Tensor], token_mask: Tensor | None, slack: int, hidden: Tensor | None = None
    ) -> None:
        """Append keys, values and positions, with the initial state and the stored scores of their tokens."""
        new, positions = dict(pairs), pairs["positions"]
        config = self.config
        if config.stateful_policies or config.stored_scores:
            valid = torch.ones_like(positions, dtype=torch.bool)
            if token_mask is not None and token_mask.dim() == 2:
                valid &= to_device(token_mask[:, None], valid.device)
            view = self.new_view(pairs, valid, hidden)
            for i, policy in config.stateful_policies:
                new |= {f"{i}/{name}": tensor for name, tensor in policy.initial_state(view).items()}
            new |= {name: policy.score(view).float() for name, policy in config.stored_scores.items()}
        self.slots = self.slots.append(new, slack, token_mask)

    def new_view(self, pairs: Mapping[str, Tensor], valid: Tensor, hidden: Tensor | None = None) -> CacheView:
        """New tokens alone, as policies see them that score or begin their state on arrival."""
        # a captured step counts on the device, and only when its tokens were taken in
        ahead = 0 if self.next_position is None else valid.shape[2]
        seen, budget = self._seen(valid.device) + ahead, self._view_budget(None, valid)
        keys, values, positions = (pairs[name] for name in SLOT_BUFFERS)
        about = seen, budget, self.index, self.scaling
        return CacheView(keys, values, positions, valid, *about, hidden=hidden)

    def _next_positions(self, m: int, token_mask: Tensor | None, device: torch.device) -> Tensor:
        """Positions of new tokens, `[batch or 1, 1, m]`."""
        if self.next_position is not None:
            return self.next_position
        if token_mask is None and len(set(self.tokens_seen)) == 1:
            return _consecutive(self.tokens_seen[0], m, device)
        ahead = torch.arange(m) if token_mask is None else token_mask.cumsum(1) - 1
        return (number_tensor(self.tokens_seen, device)[:, None] + to_device(ahead, device))[:, None]

    def newest_positions(self, m: int, token_mask: Tensor | None) -> Tensor:
        """Positions of the newest `m` columns of tokens, `[batch, m]` int64; -1 where they are padding."""
        device = self.slots.device
        seen = number_tensor(self.tokens_seen, device)[:, None]
        if token_mask is None:
            return seen - m + torch.arange(m, device=device)
        real = to_device(token_mask, device)
        return (seen - real.sum(1, keepdim=True) + real.cumsum(1) - 1).masked_fill(~real, -1)

    def store_unread(self, ids: Tensor | None, positions: Tensor | None, token_mask: Tensor | None, seen: int) -> None:
        """Keep the ids of new tokens until they are read again.

        Args:
            ids: `[batch, m]` int64; None where the model was given embeddings.
            positions: the model's own, `[batch or 1, m]` int64; None where it counts on from `seen`.
            token_mask: `[batch, m]` bool on the CPU, which of them are no padding; None means all.
            seen: tokens that came before, padding included.

        Raises:
            UserError: there are no ids to repeat.
        """
        if ids is None:
            raise UserError(
                f"policy {self.config.policy.name!r} has the context read again, and embeddings cannot be repeated: "
                "give input_ids"
            )
        if positions is None:
            positions = torch.arange(seen, seen + ids.shape[1])[None]
        new = torch.stack((ids, to_device(positions, ids.device).expand_as(ids)), -1)
        if token_mask is not None:
            self.unread_is_padded = True
            new.masked_fill_(~to_device(token_mask, ids.device)[..., None], -1)
        self.unread = new if self.unread is None else torch.cat((self.unread, new), 1)

    def use_output_projection(self, module: nn.Module, query_heads: int, d: int) -> None:
        """Look up the output projection of the attention module, where a policy needs it."""
        if self.config.needs_output:
            self.output = output_projection(module, query_heads, d)

    @property
    def stored_as_read(self) -> bool:
        """Whether attention can read slots, and the tier's pairs, where they lie and as they are."""
        return self.config.rope_shift is None and (self.tier.stored is None or self.tier.packed() is not None)

    def visible_slots(self) -> Slots:
        """Keys and values that the newest queries see: what the tier shows of evicted pairs, then the slots."""
        if self.config.rope_shift is not None:
            return self.config.rope_shift.shifted(self.slots, self.tokens_seen)
        evicted = self.tier.visible(self.slots.buffers["keys"].dtype)
        return self.slots if evicted is None else concatenate(evicted, self.slots)

    def note_replayed_token(self) -> None:
        """A decoding step was replayed on the device: count its token as the host counts those that it appends."""
        assert isinstance(self.slots, RaggedSlots)
        self.slots.note_replayed(1)
        self.tokens_seen, self.appended = [seen + 1 for seen in self.tokens_seen], self.appended + 1

    def note_replayed_eviction(self, count: int) -> None:
        """An eviction of `count` slots of every head was replayed on the device: note what the host notes of others."""
        assert isinstance(self.slots, RaggedSlots)
        self.begin_eviction(None)
        self.slots.note_replayed(-count)

    # showing queries to policies

    def kept_queries(self) -> tuple[Tensor | None, Tensor | None]:
        """Queries that were shown to policies and are kept, and those that wait to be shown."""
        return self.queries, self._pending_query

    @property
    def steps_repeat(self) -> bool:
        """Whether one more decoding step leaves tensors of the same shapes as the last one did."""
        count, pending = self.config.num_queries, self._pending_query
        full = not count or (self.queries is not None and self.queries.shape[2] == count)
        waits = self.config.trigger.every is None and self.config.depends_on_queries
        return full and (pending is not None and pending.shape[2] == 1 if waits else pending is None)

    def observe(self, query: Tensor, token_mask: Tensor | None) -> None:
        """Show the queries `[batch, query_heads, m, d]` of the newest tokens to policies and tier.

        Where the tokens may still be taken back that waits until it is clear that they stay: see
        :meth:`observe_pending`.
        """
        assert self.scaling is not None
        self.tier.measure(query, token_mask, self.slots, self.scaling, self.evicted_at)
        if self.config.depends_on_queries:
            may_wait = self.record_past or query.shape[2] <= MAX_PENDING
            if token_mask is None and self.config.trigger.every is None and may_wait:
                self._pending_query = query.detach()
            else:
                self._observe_now(query, token_mask)

    @torch.no_grad()
    def observe_pending(self) -> None:
        """Show the queries that wait: before more tokens come, or anybody looks at state or queries."""
        if self._pending_query is not None:
            query, self._pending_query = self._pending_query, None
            self._observe_now(query, None)

    def _observe_now(self, query: Tensor, token_mask: Tensor | None) -> None:
        self.tier.observe(query, token_mask)
        if self.config.num_queries and not self.config.probe:
            self.queries = last_queries(self.queries, query, self.config.num_queries, token_mask)
        if not self.config.stateful_policies:
            return
        view, filled = self._view(None)
        view = replace(view, queries=None, state={})
        newest_last = isinstance(self.slots, EqualSlots) and self.appended >= query.shape[2]
        for i, policy in self.config.stateful_policies:
            state = {name: filled[buffer] for name, buffer in self._state_names(i)}
            for name, tensor in _observed(policy, view, query, state, token_mask, newest_last).items():
                self.slots.write(f"{i}/{name}", tensor)

    def observe_probe(self, query: Tensor) -> None:
        """Show policies the queries `[batch, query_heads, m, d]` of a probe, which see every slot and become none."""
        if self.config.num_queries:
            self.queries = query.clone()
        if not self.config.stateful_policies:
            return
        view, filled = self._view(None)
        view = replace(view, queries=None, state={})
        asked_at = view.seen[:, None] + torch.arange(query.shape[2], device=query.device)
        for i, policy in self.config.stateful_policies:
            state = {name: filled[buffer] for name, buffer in self._state_names(i)}
            for start in range(0, query.shape[2], QUERY_BLOCK):
                block = slice(start, start + QUERY_BLOCK)
                attention = attention_weights(
                    query[:, :, block], view.keys, asked_at[:, block], view.positions, view.valid, self.scaling
                )
                state = policy.observe(view, attention, state)
            for name, tensor in state.items():
                self.slots.write(f"{i}/{name}", tensor)

    def forget_probe(self) -> None:
        """Drop the queries of a probe, when every layer has been cut by them."""
        if self.config.probe:
            self.queries = None

    def write_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the policy's state, tensors `[batch, kv_heads, longest, ...]`."""
        for name, tensor in state.items():
            self.slots.write(f"0/{name}", tensor)

    def view(self, rows_to_evict: Sequence[bool] | None = None) -> CacheView:
        """The layer as the policy may see it now.

        Args:
            rows_to_evict: the other rows have budget for everything; None means all.
        """
        return self._view(rows_to_evict)[0]

    def _view(self, rows_to_evict: Sequence[bool] | None) -> tuple[CacheView, dict[str, Tensor]]:
        """The view, and all buffers padded."""
        self.observe_pending()
        filled, valid = self.slots.padded()
        if self.config.rope_shift is not None:  # policies see what attention sees
            filled["keys"] = self.config.rope_shift.shifted_keys(self.slots, self.tokens_seen)
        wanted = max(self.config.policy.needs_queries, self.config.allocation.needs_queries)
        queries = self.queries if wanted else None
        if queries is not None and not self.config.probe:  # of a probe all count
            queries = queries[:, :, -wanted:]
        view = CacheView(
            filled["keys"],
            filled["values"],
            filled["positions"],
            valid,
            seen=self._seen(valid.device),
            budget=self._view_budget(rows_to_evict, valid),
            layer=self.index,
            scaling=self.scaling,
            queries=queries,
            probe_length=len(self.config.probe),
            # the policy's own: it is the only one tracked, unless it is a group, which does not score
            state={name: filled[buffer] for name, buffer in self._state_names(0)},
            output=self.output,
            largest_budget=max(self.row_budgets(rows_to_evict)),
        )
        return view, filled

    def _view_budget(self, rows_to_evict: Sequence[bool] | None, like: Tensor) -> Tensor:
        return number_tensor(self.row_budgets(rows_to_evict), like.device)[:, None].expand(-1, like.shape[1])

    def _seen(self, device: torch.device) -> Tensor:
        """Tokens seen, `[batch]` int64; no constant while a captured step or eviction is made."""
        if self.next_position is not None:
            return self.next_position.flatten().expand(len(self.tokens_seen))
        return number_tensor(self.tokens_seen, device)

    def row_budgets(self, rows_to_evict: Sequence[bool] | None) -> list[int]:
        """Slots per head of every row; no limit for rows that are not to be cut."""
        rows_to_evict = [True] * len(self.tokens_seen) if rows_to_evict is None else rows_to_evict
        budgets = {seen: self.config.slots_after(seen) for seen in set(self.tokens_seen)}
        return [
            budgets[seen] if evicts else UNLIMITED
            for seen, evicts in zip(self.tokens_seen, rows_to_evict, strict=True)
        ]  # fmt: skip

    def _slack(self) -> int:
        return self.config.slack(self.slots.mean)

    def _state_names(self, policy_index: int) -> list[tuple[str, str]]:
        """Names of a tracked policy's state: its own, and the buffer's."""
        prefix, scores = f"{policy_index}/", self.config.stored_scores
        buffers = (name for name in self.slots.buffers if name.startswith(prefix) and name not in scores)
        return [(name.removeprefix(prefix), name) for name in buffers]

    # evicting

    def rows_to_evict(self) -> list[bool]:
        """Whether the trigger fires now, per row."""
        fires = self.config.trigger.fires
        if self.prefill_unfinished:
            return [False] * len(self.tokens_seen)
        return [fires(seen, at) for seen, at in zip(self.tokens_seen, self.evicted_at, strict=True)]

    def fits_budget(self, rows_to_evict: Sequence[bool] | None = None) -> bool:
        """Whether no head holds more than an equal share of the budget, so that nothing needs to be evicted.

        Where shares are not equal a small layer may have to give way to others, unless there is room for all tokens.
        """
        most = max(self.tokens_seen) if self.config.allocation.own_totals else self.slots.longest
        return min(self.row_budgets(rows_to_evict)) >= most

    def evict(self, rows_to_evict: Sequence[bool] | None = None, trim: bool = False) -> None:
        """Keep what the policy would within the budget, by this layer's own slots; the rest is freed.

        Args:
            rows_to_evict: which rows to cut; None means all.
            trim: keep no room for tokens to come.
        """
        if self.fits_budget(rows_to_evict):
            self.mark_evicted(rows_to_evict)
            return
        row_budgets, equal = self.row_budgets(rows_to_evict), self.config.allocation.equal
        if not trim and (sizes := self.repeatable_eviction(row_budgets)) is not None:
            priorities = self.score_slots(rows_to_evict).priorities
            victims = priorities.topk(sizes[0] - sizes[1], largest=False, sorted=False).indices
            assert isinstance(self.slots, RaggedSlots)
            self.slots.overwrite(victims)
            return
        if not (equal and isinstance(self.slots, EqualSlots) and len(set(row_budgets)) == 1):
            kept, most = self.config.allocation.kept([self.score_slots(rows_to_evict)])[0], None
            if equal and kept.device.type != "cpu":  # known without waiting
                most = torch.minimum(self.slots.bounds, torch.tensor(row_budgets)[:, None])
            self.keep_slots(kept, trim, most)
            return
        budget = row_budgets[0]
        if not trim and self.can_remove_one(budget):
            self._remove_lowest(self.slots, budget)
            return
        layer = self.score_slots(rows_to_evict)
        if not self.tier.drops:
            kept = top_mask(layer.priorities, layer.view.budget)
            self._hand_to_tier(kept, self.slots.bounds - budget, trim, equal=True)
        self.slots.keep_top(layer.priorities, budget, self._slack(), trim)

    def repeatable_eviction(self, row_budgets: Sequence[int]) -> tuple[int, int] | None:
        """Slots of every head before and after an eviction in place that does the same to the same memory every time.

        None where it does not: heads in one block of memory, or of different lengths, or a tier that takes evicted
        pairs.

        Args:
            row_budgets: slots per head of every row.
        """
        slots, budgets = self.slots, set(row_budgets)
        if not (isinstance(slots, RaggedSlots) and self.config.allocation.equal and self.tier.drops):
            return None
        (budget, *others), length = budgets, slots.common_length
        if others or length is None or length <= budget or not slots.can_overwrite(budget, self._slack()):
            return None
        return length, budget

    def can_remove_one(self, budget: int) -> bool:
        """Whether just one slot of every head goes and may be overwritten in place, as at every decoding step."""
        slots = self.slots
        if not isinstance(slots, EqualSlots) or slots.length != budget + 1 or not self.tier.drops:
            return False
        return slots.can_overwrite(budget, self._slack())

    def _remove_lowest(self, slots: EqualSlots, budget: int) -> None:
        self.begin_eviction(None)
        scores = slots["scores"] if "scores" in slots.buffers else self.config.policy.score(self.view())
        first, last = self.config.protected_range(budget, self.tokens_seen[0])
        self.remove_one(slot_to_evict(scores, slots["positions"], first, last, self.index))

    def remove_one(self, victims: Tensor) -> None:
        """Remove the slots `victims [batch, kv_heads, 1]`, where :meth:`can_remove_one`."""
        assert isinstance(self.slots, EqualSlots)
        if self.config.trigger.every == 1:  # the next token evicts again: it may as well be written there
            self.slots.leave_gap(victims)
        else:
            self.slots.overwrite(victims)

    def score_slots(self, rows_to_evict: Sequence[bool] | None = None) -> ScoredLayer:
        """The layer with its slots scored, ready to be cut in the rows `rows_to_evict`; None means all."""
        self.begin_eviction(rows_to_evict)
        stored = "scores" in self.slots.buffers
        if stored and not self.config.allocation.needs_queries:
            # nobody reads keys and values where scores are stored
            filled, valid = self.slots.padded(("positions", "scores"))
            nothing, scores = filled["scores"][..., None][..., :0], filled["scores"]
            seen, budget = self._seen(valid.device), self._view_budget(rows_to_evict, valid)
            view = CacheView(nothing, nothing, filled["positions"], valid, seen, budget, self.index)
        else:
            view, filled = self._view(rows_to_evict)
            scores = filled["scores"] if stored else self.config.policy.score(view)
        budgets = self.row_budgets(rows_to_evict)
        return self.config.scored_layer(scores, view, self.ordinal, self.tokens_seen, budgets)

    def begin_eviction(self, rows_to_evict: Sequence[bool] | None) -> None:
        """Note that the rows `rows_to_evict` are cut now; None means all."""
        self.mark_evicted(rows_to_evict)
        self.appended = 0
        self.selection.forget()
        self.config.warn_of_length(max(self.tokens_seen))

    def mark_evicted(self, rows_to_evict: Sequence[bool] | None) -> None:
        """Remember that the trigger fired now, for the rows `rows_to_evict`; None means all."""
        if self.config.trigger.every is not None:
            self.appended = 0  # the next eviction counts from here
        rows = [True] * len(self.tokens_seen) if rows_to_evict is None else rows_to_evict
        before = zip(self.tokens_seen, self.evicted_at, rows, strict=True)
        self.evicted_at = [seen if evicts else at for seen, at, evicts in before]

    def waits_to_keep(self, trim: bool = False) -> bool:
        """Whether :meth:`keep_slots` has to know the new lengths on the host."""
        return self.slots.waits_to_keep(self._slack(), trim)

    def keep_slots(self, kept: Tensor, trim: bool = False, lengths: Tensor | None = None) -> None:
        """Keep some slots and hand the others to the tier.

        Args:
            kept: `[batch, kv_heads, longest]` bool.
            trim: keep no room for tokens to come.
            lengths: ``kept.sum(2)`` on the CPU, where it is known there already, or on an accelerator at least as much.
        """
        if lengths is None and (kept.device.type == "cpu" or self.waits_to_keep(trim)):
            lengths = HostCopy.read(kept.sum(2))
        if not self.tier.drops:
            bounds = self.slots.bounds
            self._hand_to_tier(kept, bounds if lengths is None else bounds - lengths, trim, equal=False)
        self.slots = self.slots.keep(kept, self._slack(), trim, lengths)

    def _hand_to_tier(self, kept: Tensor, most: Tensor, trim: bool, equal: bool) -> None:
        """Show the tier which slots are about to go, at most `most [batch, kv_heads]`; take over what it changes."""
        if not bool(most.any()):
            return
        filled, valid = self.slots.padded(SLOT_BUFFERS)
        kept = kept[:, :, : valid.shape[2]]  # bounds may have become tighter since the slots were scored
        keys, values, positions = (filled[name] for name in SLOT_BUFFERS)
        seen = max(self.tokens_seen)
        pairs = EvictedPairs(keys, values, positions, valid, kept, most, seen, equal, self._slack(), trim)
        for name, tensor in (self.tier.take(pairs) or {}).items():
            self.slots.write(name, tensor)

    @torch.no_grad()
    def restore_evicted(self) -> None:
        """Return all evicted pairs to full precision, from the host's copies.

        Policies with memory know of them what they know of new tokens.

        Raises:
            UserError: the cache was made without ``offload=True``.
        """
        if not isinstance(self.tier, TierRecorder) or self.tier.host is None:
            raise UserError("there is no copy of what was evicted: give offload=True to the cache")
        self.observe_pending()
        copies = self.tier.take_back()
        if copies is None:
            return
        filled, real = copies
        device = self.slots.buffers["keys"].device
        pairs = {name: filled[name].to(device) for name in SLOT_BUFFERS}
        self.appended = 0  # the newest tokens are no longer the last ones
        self.selection.forget()
        self._store(pairs, None if bool(real.all()) else real.cpu(), 0)

    # taking tokens back

    @property
    def removable(self) -> int:
        """How many of the newest tokens can be removed so that nothing remembers them."""
        if not self.config.depends_on_queries:
            return self.appended
        return 0 if self._pending_query is None else min(self.appended, self._pending_query.shape[2])

    def remove_newest(self, count: int) -> None:
        """Forget the newest `count` tokens of every row, at most `removable`, as if they had never come."""
        if self._pending_query is not None:
            left = self._pending_query.shape[2] - count
            self._pending_query = self._pending_query[:, :, :left] if left else None
        self.unread = None if self.unread is None else self.unread[:, : self.unread.shape[1] - count].clone()
        self.slots.drop_newest(count)
        self.selection.forget()
        self.tokens_seen, self.appended = [seen - count for seen in self.tokens_seen], self.appended - count
        before = zip(self.evicted_at, self.tokens_seen, strict=True)
        self.evicted_at = [None if at is None or not seen else min(at, seen) for at, seen in before]

    # copies and batches

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""
        yield from self.slots.buffers.values()
        yield from (tensor for tensor in (self.queries, self._pending_query, self.unread) if tensor is not None)
        yield from self.tier.tensors()
        yield from self.selection.tensors()

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows `rows [new batch]` int64 of the batch, in that order."""
        if not self.tokens_seen:
            return
        self.observe_pending()
        self.slots.select_rows(rows)
        self.selection.forget()
        self.tier.select_rows(rows)
        chosen = rows.tolist()
        self.tokens_seen = [self.tokens_seen[row] for row in chosen]
        self.evicted_at = [self.evicted_at[row] for row in chosen]
        self.unread, self.queries = select_rows(self.unread, rows), select_rows(self.queries, rows)

    def move(self, device: torch.device) -> None:
        """Move all that is held to a device.

        Raises:
            UserError: a tier that stores evicted pairs.
        """
        if self.tier.stored is not None or isinstance(self.tier, TierRecorder):
            raise UserError(
                f"a cache with evicted={self.config.layer_tier.name!r}, a guard or offload=True stays on its device: "
                "move one that drops or merges what it evicts"
            )
        self.observe_pending()
        if self.tokens_seen:
            self.slots = self.slots.moved(device)
        self.selection.forget()
        self.queries, self.unread = (
            None if tensor is None else tensor.to(device) for tensor in (self.queries, self.unread)
        )

    def fork(self, config: CacheConfig) -> LayerState:
        """An independent copy with other settings; it takes along only what their policies need."""
        self.observe_pending()
        twin = LayerState(self.index, self.ordinal, config)
        twin.tokens_seen, twin.evicted_at = list(self.tokens_seen), list(self.evicted_at)
        twin.scaling, twin.appended, twin.output = self.scaling, self.appended, self.output
        if config.layer_tier == self.config.layer_tier:
            twin.tier = self.tier.fork()
        else:
            complete = not self.tokens_seen or bool(
                (self.slots.counts().cpu() == torch.tensor(self.tokens_seen)[:, None]).all()
            )
            twin.tier = config.layer_tier.begin_after(self.tier, self.ordinal, not self.tokens_seen, complete)
        if not self.tokens_seen:
            return twin
        twin.slots = self.slots.clone(self._buffers_for(config))
        if self.unread is not None and config.needs_second_reading:
            twin.unread, twin.unread_is_padded = self.unread.clone(), self.unread_is_padded
        if self.queries is not None and config.num_queries:
            twin.queries = self.queries[:, :, -config.num_queries :].clone()
        if config.scores_on_arrival and "scores" not in twin.slots.buffers:
            twin.slots.add("scores", config.policy.score(twin.view()).float())
        return twin

    def _buffers_for(self, config: CacheConfig) -> dict[str, str]:
        """The buffers that other settings need, by the names that they have there."""
        names = {name: name for name in SLOT_BUFFERS}
        for i, policy in enumerate(config.tracked_policies):
            if policy in self.config.tracked_policies:
                before = self.config.tracked_policies.index(policy)
                names |= {buffer: f"{i}/{name}" for name, buffer in self._state_names(before)}
        for name, policy in config.stored_scores.items():
            # scores of hidden states cannot be computed anew
            if policy.needs_hidden:
                names |= {own: name for own, scored in self.config.stored_scores.items() if scored == policy}
        return names


def last_queries(known: Tensor | None, new: Tensor, count: int, token_mask: Tensor | None) -> Tensor:
    """The last `count` of the queries known and new, `[batch, query_heads, <= count, d]`, in memory of their own.

    Args:
        known: `[batch, query_heads, k, d]`, or None.
        new: `[batch, query_heads, m, d]`.
        count: how many at most.
        token_mask: `[batch, m]` bool on the CPU, which new ones are no padding; None means all. Where a row has fewer
            than others, padding stands in front.
    """
    if token_mask is None:
        both = new if known is None else torch.cat((known, new[:, :, -count:]), 2)
        return both[:, :, -count:].clone()  # a view would hold all of the forward's queries
    both = new if known is None else torch.cat((known, new), 2)
    real = torch.ones(both.shape[0], both.shape[2], dtype=torch.bool)
    real[:, -new.shape[2] :] = token_mask
    order = to_device(real.byte().argsort(dim=1, stable=True)[:, -count:], new.device)  # padding first
    return both.gather(2, order[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))


def _observed(
    policy: StatefulPolicy,
    view: CacheView,
    query: Tensor,
    state: dict[str, Tensor],
    token_mask: Tensor | None,
    newest_last: bool,
) -> dict[str, Tensor]:
    """The state after a forward's queries `[batch, query_heads, m, d]`.

    Each row of a padded forward (`token_mask [batch, m]` bool on the CPU) is observed in the blocks in which it would
    be read alone.
    """
    if token_mask is None:
        return observe_blocks(policy, view, query, state, newest_last=newest_last)
    after = {name: tensor.clone() for name, tensor in state.items()}
    for row in range(len(token_mask)):
        columns = to_device(token_mask[row].nonzero()[:, 0], query.device)
        if not len(columns):
            continue
        one = slice(row, row + 1)
        row_view = replace(
            view,
            keys=view.keys[one],
            values=view.values[one],
            positions=view.positions[one],
            valid=view.valid[one],
            seen=view.seen[one],
            budget=view.budget[one],
        )
        row_state = {name: tensor[one] for name, tensor in state.items()}
        observed = observe_blocks(policy, row_view, query[one][:, :, columns], row_state, newest_last=False)
        for name, tensor in observed.items():
            after[name][one] = tensor
    return after


@lru_cache(maxsize=2)
def _consecutive(first: int, count: int, device: torch.device) -> Tensor:
    """Positions from `first` on, `[1, 1, count]`: the same for all layers, so made once a forward and never changed."""
    return torch.arange(first, first + count, device=device)[None, None]
