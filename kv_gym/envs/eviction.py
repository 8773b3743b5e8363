"""Eviction mode: the cache is cut to a budget before every block of new tokens; what went never returns."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from kv_gym.budgets.budget import Budget
from kv_gym.envs.render import Scene
from kv_gym.envs.rewards import best, by_head, in_time_order, protected_positions, shrunk_protection, slots
from kv_gym.envs.slot_table import SlotTable
from kv_gym.traces.sequence import Sequence


class Eviction:
    """What every block of every continuation attended to, one row per (decision, continuation, block).

    Attributes:
        decision, continuation, blocks: `[E]` int64, what each episode replays and how many steps it takes; episodes
            with nothing to lose are left out.
    """

    def __init__(
        self, sequences: Seq[Sequence], table: SlotTable, reduction: str, sinks: int, recent: int, budget: Budget
    ) -> None:
        """Read the futures of the table's heads (`reduction`: "max" or "mean" over query heads)."""
        self._table = table
        self._sinks, self._recent, self._budget = sinks, recent, budget
        self._occasions: dict[tuple[int, int], int] = {}  # (tokens, new tokens) -> row of the three lists below
        self._open: list[np.ndarray] = []
        self._room: list[int] = []
        worth: list[np.ndarray] = []
        occasion: list[int] = []
        episodes: list[tuple[int, int, int, int]] = []
        for i, sequence in enumerate(sequences):
            decisions = np.flatnonzero(table.sequence == i)
            for c, continuation in enumerate(sequence.continuations):
                n, blocks = len(sequence.tokens), continuation.future.shape[3]
                future = continuation.future[..., ("max", "mean").index(reduction)].reshape(-1, n, blocks)
                rows = np.zeros((blocks, len(table.chosen), table.tokens), np.float32)
                rows[..., :n] = np.moveaxis(future[table.chosen], -1, 0)
                # [decisions, blocks, N]: an episode's rows lie one after another
                rows = rows.reshape(blocks, len(decisions), table.size).swapaxes(0, 1)
                for decision, of_one in zip(decisions.tolist(), rows, strict=True):
                    episodes.append((decision, c, blocks, len(occasion)))
                    worth.append(in_time_order(of_one, table.heads))
                    occasion += [self._occasion(n, block * continuation.block) for block in range(blocks)]
        self._worth = np.concatenate(worth) if worth else np.zeros((0, table.size), np.float32)
        self._row_occasion = np.array(occasion, np.int64)
        self._open_of = np.array(self._open).reshape(-1, table.size)
        self._room_of = np.array(self._room, np.int64)
        self._total, self._open_total = np.zeros(len(occasion)), np.zeros(len(occasion))
        for row, which in enumerate(occasion):  # one by one: this is the largest array
            self._total[row] = self._worth[row].astype(np.float64).sum()
            self._worth[row] *= self._open_of[which]
            self._open_total[row] = self._worth[row].astype(np.float64).sum()
        columns = np.array(episodes, np.int64).reshape(-1, 4)
        losable = [self._open_total[first : first + blocks].any() for _, _, blocks, first in episodes]
        self.decision, self.continuation, self.blocks, self._first = columns[np.array(losable, bool)].T

    def _occasion(self, n: int, new: int) -> int:
        """The row that says which slots are open and how many of them stay, `new` tokens after a context of n."""
        if (n, new) in self._occasions:
            return self._occasions[n, new]
        table, budget = self._table, slots(self._budget, n)
        sinks, latest = shrunk_protection(budget, self._sinks, max(self._recent, new))
        # the new tokens are the most recent ones: they come first, the rest of the window reaches into the context
        cached_new = min(new, latest)
        protected = protected_positions(n, n + new, sinks, min(self._recent, latest))
        open_slots = np.zeros(table.size, bool)
        open_slots[: n * table.heads] = np.repeat(~protected, table.heads)
        self._open.append(open_slots)
        self._room.append((budget - cached_new - int(protected.sum())) * table.heads)
        self._occasions[n, new] = len(self._room) - 1
        return self._occasions[n, new]

    def whole(self, episodes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The cache at the start, `[B, N]` bool in time order: every token of the context."""
        there = self._table.length[self.decision[episodes]] * self._table.heads
        return np.arange(self._table.size) < there[:, None]

    def evict(
        self,
        episodes: NDArray[np.int64],
        block: NDArray[np.int64],
        cached: NDArray[np.bool_],
        scores: NDArray[np.float32],
    ) -> tuple[NDArray[np.bool_], np.ndarray, dict]:
        """Cut to the budget and let the next block attend.

        Args:
            episodes, block: `[B]` int64.
            cached: `[B, N]` bool in time order.
            scores: `[B, N]` in the observation's order.

        Returns:
            The slots still cached, rewards `[B]` float64, and what to tell about them.
        """
        rows = self._first[episodes] + block
        occasion = self._row_occasion[rows]
        open_slots = self._open_of[occasion]
        scores = in_time_order(scores, self._table.heads)
        cached = cached & (best(scores, open_slots & cached, self._room_of[occasion]) | ~open_slots)
        kept = np.multiply(self._worth[rows], cached, dtype=np.float64).sum(-1)
        losable, total = self._open_total[rows], self._total[rows]
        shielded = total - losable
        # where nothing can be lost nothing is lost
        reward = np.divide(kept, losable, out=np.ones_like(kept), where=losable > 0)
        return (
            cached,
            reward,
            {
                "utility_kept": np.divide(kept + shielded, total, out=np.ones_like(kept), where=total > 0),
                "utility_total": total,
                "slots": cached.sum(-1),
                "block": block.copy(),
            },
        )

    def ahead(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], highest: bool = False
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32]]:
        """What the next cut decides about, and what it is worth to whoever knows the rest of the continuation.

        Args:
            episodes, block: `[B]` int64.
            cached: `[B, N]` bool in time order.
            highest: take the block that pays a slot the most instead of the sum over blocks (Golden Eviction).

        Returns:
            The slots that may go `[B, N]` bool, how many of them may stay `[B]`, and the attention that `block` and all
            later ones pay to each slot while it is not protected, `[B, N]` float32; all in time order.
        """
        row = self._first[episodes] + block
        occasion = self._row_occasion[row]
        last = self._first[episodes] + self.blocks[episodes] - 1
        worth = self._worth[row]
        for later in range(1, int((last - row).max(initial=0)) + 1):
            more = np.where((row + later <= last)[:, None], self._worth[np.minimum(row + later, last)], 0)
            worth = np.maximum(worth, more) if highest else worth + more
        return self._open_of[occasion] & cached, self._room_of[occasion], worth

    @property
    def lanes(self) -> int:
        """Rows of a picture: the start, and the blocks of the longest continuation."""
        return 1 + int(self.blocks.max(initial=0))

    def scene(self, episode: int, block: int, cached: NDArray[np.bool_]) -> Scene:
        """What to show after `block` blocks have attended, when `cached` `[N]` (time order) were left for the last."""
        heads, first = self._table.heads, self._first[episode]
        worth = self._worth[first : first + self.blocks[episode]].sum(0)
        if block:
            row = first + block - 1
            occasion = self._row_occasion[row]
            open_slots, losable = self._open_of[occasion], self._open_total[row]
            wanted = best(worth[None], open_slots[None], self._room_of[occasion][None])[0] & (worth > 0)
            kept = np.multiply(self._worth[row], cached, dtype=np.float64).sum()
            share = float(kept / losable) if losable > 0 else float("nan")
        else:
            open_slots = wanted = cached
            share = float("nan")
        kept_slots, best_slots, ranked, values = (
            by_head(each[None], heads) for each in (cached, wanted, open_slots, worth)
        )
        label = f"block {block}" if block else "start"
        return Scene([label], kept_slots, best_slots, ranked[0], values[0], [share], "reward")

    def shown(self, cached: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[B, N]` from time order to the observation's order."""
        return by_head(cached, self._table.heads)
