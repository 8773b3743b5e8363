"""What one layer of an evicting cache keeps and lets go, whatever attention does with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kv_gym.budgets import Layer, top, weakest
from kv_gym.live.config import Eviction
from kv_gym.live.holding import SLOT, Holding
from kv_gym.live.ragged import RaggedSlots
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers import Leaving


class Contents(Holding):
    """What a layer holds, cut to the budget; its attributes are those of :class:`~kv_gym.live.holding.Holding`."""

    def due(self) -> list[bool]:
        """Whether the trigger fires now, per row."""
        trigger = self.eviction.trigger
        return [trigger.fires(seen, at) for seen, at in zip(self.rows, self.fired, strict=True)]

    def evict(self, due: Sequence[bool] | None = None, exact: bool = False) -> None:
        """Keep what the policy would within the budget, by this layer's own slots; the rest is freed.

        Args:
            due: which rows to cut; None means all.
            exact: keep no room for tokens to come.
        """
        if self.fits(due):
            self.mark(due)
            return
        rooms = set(self._rooms(due))
        equal = self.eviction.allocation.equal and isinstance(self.slots, EqualSlots) and len(rooms) == 1
        if equal and self._one_leaves(min(rooms), exact):
            return
        layer = self.judged(due)
        if equal:
            assert isinstance(self.slots, EqualSlots)
            room = rooms.pop()
            if not self.tier.drops:
                self._leave(top(layer.merits, layer.view.budget), self.slots.length - room, exact)
            self.slots.keep_top(layer.merits, room, self._slack(), exact)
        else:
            self.cut(self.eviction.allocation.kept([layer])[0], exact)

    def _one_leaves(self, room: int, exact: bool) -> bool:
        """Overwrite one slot of every head where just that is to be done, as at every decoding step; else False."""
        slots = self.slots
        assert isinstance(slots, EqualSlots)
        if exact or slots.length != room + 1 or not self.tier.drops or not slots.may_overwrite(room, self._slack()):
            return False
        self._begin()
        known = "scores" in slots.buffers
        scores = slots["scores"] if known else self.eviction.policy.score(self.view())
        first, last = self.eviction.guarded(room, self.rows[0])
        slots.overwrite(weakest(scores, slots["positions"], first, last, self.index))
        return True

    def fits(self, due: Sequence[bool] | None = None) -> bool:
        """Whether no head holds more than an equal share of the budget, so that nothing needs to go.

        Where shares are not equal a small layer may have to give way to others, unless there is room for all tokens.
        """
        most = max(self.rows) if self.eviction.allocation.own_totals else self.slots.longest
        return min(self._rooms(due)) >= most

    def judged(self, due: Sequence[bool] | None = None) -> Layer:
        """The layer with its slots scored, ready to be cut in the rows `due`; None means all."""
        self._begin(due)
        known = "scores" in self.slots.buffers
        if known and not self.eviction.allocation.needs_queries:
            view, scores = self._scored(due)
        else:
            view, filled = self._view(due)
            scores = filled["scores"] if known else self.eviction.policy.score(view)
        return self.eviction.judge(scores, view, self.place)

    def _begin(self, due: Sequence[bool] | None = None) -> None:
        self.mark(due)
        self.loose = 0
        self.eviction.warn_of_length(max(self.rows))

    def cut(self, kept: Tensor, exact: bool = False) -> None:
        """Keep the slots `kept [batch, kv_heads, longest]` bool."""
        if not self.tier.drops:
            most = int((self.slots.counts() - kept.sum(2).cpu()).max())
            self._leave(kept, most, exact, equal=False)
        if isinstance(self.slots, EqualSlots):
            self.slots = RaggedSlots.of(self.slots, kept)
        else:
            self.slots.keep(kept, self._slack(), exact)

    def mark(self, due: Sequence[bool] | None = None) -> None:
        """Remember that the trigger fired now, for the rows `due`."""
        due = [True] * len(self.rows) if due is None else due
        if self.eviction.trigger.every is not None:
            self.loose = 0  # the next firing counts from here
        self.fired = [seen if now else at for seen, at, now in zip(self.rows, self.fired, due, strict=True)]

    def _leave(self, kept: Tensor, most: int, exact: bool, equal: bool = True) -> None:
        """Show the tier which slots are about to go, at most `most` of a head, and take over what it changes."""
        if not most:
            return
        filled, valid = self.slots.padded(SLOT)
        keys, values, positions = (filled[name] for name in SLOT)
        leaving = Leaving(keys, values, positions, valid, kept, most, equal, self._slack(), exact, self.place)
        changed = self.tier.take(leaving)
        for name, tensor in (changed or {}).items():
            self.slots.write(name, tensor)

    def fork(self, eviction: Eviction) -> Contents:
        """An independent copy that evicts by `eviction`; it takes along only what that one's policies need."""
        self.settle()
        twin = Contents(self.index, self.place, eviction)
        twin.rows, twin.fired, twin.scaling = list(self.rows), list(self.fired), self.scaling
        twin.loose, twin.output = self.loose, self.output
        same = eviction.evicted == self.eviction.evicted
        twin.tier = self.tier.fork() if same else eviction.evicted.after(self.tier, not self.rows)
        if not self.rows:
            return twin
        names = {name: name for name in SLOT}
        for after, policy in enumerate(eviction.watched):
            if policy in self.eviction.watched:
                before = self.eviction.watched.index(policy)
                names |= {own: f"{after}/{name}" for name, own in self._state_names(before)}
        # scores of hidden states cannot be computed anew
        known = {id(policy): name for name, policy in self.eviction.scored.items() if policy.needs_hidden}
        names |= {known[id(policy)]: name for name, policy in eviction.scored.items() if id(policy) in known}
        twin.slots = self.slots.clone(names)
        if self.unread is not None and eviction.rereads:
            twin.unread = self.unread.clone()
        if self.queries is not None and eviction.queries:
            twin.queries = self.queries[:, :, -eviction.queries :].clone()
        if eviction.scores_once and "scores" not in twin.slots.buffers:
            twin.slots.add("scores", eviction.policy.score(twin.view()).float())
        return twin
