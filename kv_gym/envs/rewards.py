"""The rewards of KVEvict-v0: ranking mode, eviction mode, and the arithmetic that they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kv_gym.budgets import Budget, parse_budget, slots_after, sortable
from kv_gym.cache_view import protected_tokens
from kv_gym.envs.context_arrays import ContextArrays
from kv_gym.envs.observations import ObservationTable
from kv_gym.errors import UserError
from kv_gym.traces.bounded_cache import UNLIMITED
from kv_gym.traces.sequence import Contexts, Sequence

BudgetWeights = str | Mapping[Budget, float]

CURVE = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)  # shares of the context's tokens


@dataclass
class EpisodeState:
    """Where B environments stand.

    Attributes:
        episode: `[B]` int64, index of the episode.
        block: `[B]` int64, blocks of the continuation that were replayed.
        cached: `[B, N]` bool, the slots still cached; None in ranking mode.
    """

    episode: NDArray[np.int64]
    block: NDArray[np.int64]
    cached: NDArray[np.bool_] | None = None


Step = tuple[EpisodeState, np.ndarray, NDArray[np.bool_], dict[str, np.ndarray]]
"""State after a step, rewards `[B]` float64, which episodes ended `[B]`, and info arrays."""


class RankingMode:
    """An episode is one step: one ranking of the slots, judged at every budget at once.

    Attributes:
        decision: `[E]` int64, the decision that each episode shows; those with nothing to gain are left out.
        keys: for each reset option (`sequence`, `head`) its value in every episode, `[E]` int64.
        picture_rows: rows that a picture has room for.
        keeps_history: whether a picture shows the earlier decisions of the episode too.
    """

    picture_rows = len(CURVE)
    keeps_history = False

    def __init__(
        self,
        sequences: Contexts,
        table: ObservationTable,
        reduction: str,
        sinks: int,
        recent: int,
        weights: BudgetWeights,
    ) -> None:
        """Compute the utility of every slot, and all that a reward needs and no action changes.

        Args:
            sequences: the recorded contexts.
            table: their decisions.
            reduction: over the query heads of a KV head, ``max`` or ``mean``.
            sinks: first tokens to protect.
            recent: last tokens to protect.
            weights: see :func:`budget_weights`.
        """
        self._table = table
        self._prepare_lengths(sinks, recent, weights)
        by_context = np.zeros((len(sequences), len(table.head_ids), table.tokens), np.float32)
        for i, sequence in enumerate(sequences):
            n = sequence.slots
            by_context[i, :, :n] = sequence.utility(reduction).reshape(-1, n)[table.head_ids]
        utility = by_context.reshape(len(table), table.size)
        self._total = utility.sum(-1, dtype=np.float64)
        self._utility = np.where(self._evictable[table.length_index], utility, np.float32(0))
        self._protected_utility = self._total - self._utility.sum(-1, dtype=np.float64)
        self._best = (np.sort(self._utility, axis=-1) * self._rank_weights[table.length_index]).sum(-1)
        self.decision = np.flatnonzero(self._best > 0)
        self.keys = {"sequence": table.sequence[self.decision], "head": table.head[self.decision]}

    def _prepare_lengths(self, sinks: int, recent: int, weights: BudgetWeights) -> None:
        """Arrays `[lengths, ...]` of what depends on a context's length alone."""
        table, count = self._table, len(self._table.lengths)
        self._evictable = np.zeros((count, table.size), bool)
        self._rank_weights = np.zeros((count, table.size))  # of the worst rank first
        self._weight_sum = np.zeros(count)
        self._curve_slots = np.zeros((count, len(CURVE)), np.int64)  # per head
        self._protected = np.zeros(count, np.int64)
        for row, n in enumerate(table.lengths.tolist()):
            by_budget, row_sinks, row_recent = budget_weights(weights, n, sinks, recent)
            protected = protected_positions(n, n, row_sinks, row_recent)
            self._protected[row] = protected.sum()
            self._evictable[row] = table.per_slot(~protected)
            by_rank = rank_weights(by_budget, int(protected.sum()), table.heads)
            self._rank_weights[row, table.size - len(by_rank) :] = by_rank[::-1]
            self._weight_sum[row] = by_budget.sum()
            self._curve_slots[row] = [max(slots_after(share, n), int(protected.sum())) for share in CURVE]

    def start(self, episodes: NDArray[np.int64]) -> EpisodeState:
        """The beginning of B episodes."""
        return EpisodeState(episodes, np.zeros(len(episodes), np.int64))

    def step(self, state: EpisodeState, scores: NDArray[np.float32]) -> Step:
        """Rank the slots by `scores` `[B, N]`."""
        decisions = self.decision[state.episode]
        lengths = self._table.length_index[decisions]
        order = ascending(scores, self._evictable.take(lengths, axis=0), self._table)
        ranked = self._utility.reshape(-1).take(order + decisions[:, None] * self._table.size)
        kept = (ranked * self._rank_weights.take(lengths, axis=0)).sum(-1)
        total, protected = self._total[decisions], self._protected_utility[decisions]
        curve_slots = self._curve_slots[lengths]
        free_slots = (curve_slots - self._protected[lengths, None]) * self._table.heads
        kept_by_slots = np.zeros((len(ranked), self._table.size + 1))
        np.cumsum(ranked[:, ::-1], axis=-1, out=kept_by_slots[:, 1:])
        kept_on_curve = np.take_along_axis(kept_by_slots, free_slots, axis=1)
        info = {
            "utility_kept": (kept / self._weight_sum[lengths] + protected) / total,
            "utility_total": total,
            "curve": (kept_on_curve + protected[:, None]) / total[:, None],
            "curve_slots": curve_slots,
        }
        return state, kept / self._best[decisions], np.ones(len(scores), bool), info

    def outcome(self, state: EpisodeState, row: int, scores: NDArray[np.float32] | None) -> dict[str, Any]:
        """What the action `scores` `[N]` did in environment `row`; None before the first action.

        Returns:
            Fields of a :class:`~kv_gym.envs.rendering.Frame`, slots as `[rows, N]` or `[N]`; `evictable` for its
            `protected`.
        """
        decision = int(self.decision[state.episode[row]])
        length, utility = self._table.length_index[decision], self._utility[decision]
        evictable = self._evictable[length]
        if scores is None:
            kept = best = self._table.is_token[length][None]
            labels, shares = ["all"], [float("nan")]
        else:
            kept = self._kept_on_curve(length, np.asarray(scores, np.float32))
            best = self._kept_on_curve(length, utility) & (utility > 0)
            best_utility = (best * utility).sum(-1, dtype=np.float64)
            kept_utility = (kept * utility).sum(-1, dtype=np.float64)
            shares = np.divide(
                kept_utility, best_utility, out=np.full_like(kept_utility, np.nan), where=best_utility > 0
            ).tolist()
            budgets = zip(CURVE, self._curve_slots[length], strict=True)
            labels = [f"1/{round(1 / share)} = {slots}" for share, slots in budgets]
        return {
            "labels": labels, "kept": kept, "best": best, "evictable": evictable, "utility": utility,
            "shares": shares, "measure": "of best",
        }  # fmt: skip

    def _kept_on_curve(self, length: int, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The slots that stay at each budget of the curve, `[budgets, N]`."""
        evictable = np.repeat(self._evictable[length][None], len(CURVE), axis=0)
        counts = (self._curve_slots[length] - self._protected[length]) * self._table.heads
        ranked = top_slots(np.repeat(scores[None], len(CURVE), axis=0), evictable, counts, self._table)
        return ranked | (self._table.is_token[length] & ~evictable)


class EvictionMode:
    """An episode is a continuation: the cache is cut to a budget before every block; evicted slots never return.

    Attributes:
        decision: `[E]` int64, the decision that each episode shows; episodes with nothing to lose are left out.
        continuation: `[E]` int64, index of the continuation that each episode replays.
        blocks: `[E]` int64, blocks of that continuation, the steps of the episode.
        keys: for each reset option (`sequence`, `head`, `continuation`) its value in every episode, `[E]` int64.
        picture_rows: rows that a picture has room for: the start, and the blocks of the longest continuation.
        keeps_history: whether a picture shows the earlier decisions of the episode too.
    """

    keeps_history = True

    def __init__(
        self,
        sequences: Contexts,
        table: ObservationTable,
        reduction: str,
        sinks: int,
        recent: int,
        budget: Budget | str,
        limit: int = UNLIMITED,
    ) -> None:
        """Read the attention of every block of every continuation, of which `limit` bytes stay in memory.

        The other arguments are as for :class:`RankingMode`.
        """
        self._table = table
        self._sinks, self._recent, self._budget = sinks, recent, parse_budget(budget)
        cuts: dict[tuple[int, int], int] = {}  # (tokens, new tokens) -> row of evictable and capacity
        cut_of: list[int] = []  # one row per (decision, continuation, block)
        episodes: list[tuple[int, int, int, int]] = []
        self._first_of_context = [0]
        for i, sequence in enumerate(sequences):
            decisions = np.flatnonzero(table.sequence == i)
            for c, continuation in enumerate(sequence.continuations):
                n, blocks = sequence.slots, continuation.future.shape[3]
                # new tokens count in the proportion in which slots were sampled
                new = [b * continuation.block * n // len(sequence.tokens) for b in range(blocks)]
                for decision in decisions.tolist():
                    episodes.append((decision, c, blocks, len(cut_of)))
                    cut_of += [cuts.setdefault((n, count), len(cuts)) for count in new]
            self._first_of_context.append(len(cut_of))
        evictable, capacity = zip(*(self._cut(n, new) for n, new in cuts), strict=True) if cuts else ((), ())
        self._evictable = np.array(evictable).reshape(-1, table.size)
        self._capacity = np.array(capacity, np.int64)
        self._cut_of = np.array(cut_of, np.int64)
        self._total, self._losable = np.zeros(len(cut_of)), np.zeros(len(cut_of))
        self._attention = ContextArrays(
            np.diff(self._first_of_context).tolist(),
            {"attention": (table.size,)},
            lambda number: self._read(number, sequences[number], reduction),
            limit,
        )
        columns = np.array(episodes, np.int64).reshape(-1, 4)
        can_lose = [self._losable[first : first + blocks].any() for _, _, blocks, first in episodes]
        self.decision, self.continuation, self.blocks, self._first_row = columns[np.array(can_lose, bool)].T
        self.keys = {
            "sequence": table.sequence[self.decision],
            "head": table.head[self.decision],
            "continuation": self.continuation,
        }
        self.picture_rows = 1 + int(self.blocks.max(initial=0))

    def _read(self, number: int, sequence: Sequence, reduction: str) -> dict[str, np.ndarray]:
        """Attention to the unprotected slots of a context, `[its rows, N]`, and the sums of these rows."""
        table, n = self._table, sequence.slots
        attention: list[np.ndarray] = []
        for continuation in sequence.continuations:
            blocks = continuation.future.shape[3]
            future = continuation.future[..., ("max", "mean").index(reduction)].reshape(-1, n, blocks)
            rows = np.zeros((blocks, len(table.head_ids), table.tokens), np.float32)
            rows[..., :n] = np.moveaxis(future[table.head_ids], -1, 0)
            # [decisions, blocks, N]: the rows of an episode lie one after another
            attention.extend(rows.reshape(blocks, -1, table.size).swapaxes(0, 1))
        stacked = np.concatenate(attention) if attention else np.zeros((0, table.size), np.float32)
        start = self._first_of_context[number]
        for row, cut in enumerate(self._cut_of[start : start + len(stacked)]):  # row by row: this is the largest array
            self._total[start + row] = stacked[row].astype(np.float64).sum()
            stacked[row] *= self._evictable[cut]
            self._losable[start + row] = stacked[row].astype(np.float64).sum()
        return {"attention": stacked}

    def _attention_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._attention.take(rows)["attention"]

    def _cut(self, n: int, new: int) -> tuple[NDArray[np.bool_], int]:
        """The evictable slots `[N]`, and how many of them stay, `new` tokens after a context of `n`."""
        budget = slots_after(self._budget, n)
        sinks, latest = protected_tokens(budget, self._sinks, max(self._recent, new))
        # the new tokens are the most recent ones: they come first, the rest of the window reaches into the context
        protected = protected_positions(n, n + new, sinks, min(self._recent, latest))
        room = budget - min(new, latest) - int(protected.sum())
        return self._table.per_slot(~protected), room * self._table.heads

    def full_cache(self, episodes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The cache at the start, `[B, N]` bool: every token of the context."""
        return self._table.is_token[self._table.length_index[self.decision[episodes]]]

    def start(self, episodes: NDArray[np.int64]) -> EpisodeState:
        """The beginning of B episodes."""
        return EpisodeState(episodes, np.zeros(len(episodes), np.int64), self.full_cache(episodes))

    def step(self, state: EpisodeState, scores: NDArray[np.float32]) -> Step:
        """Cut the cache by `scores` `[B, N]`, and let the next block attend to it."""
        assert state.cached is not None
        cached, rewards, info = self.evict(state.episode, state.block, state.cached, scores)
        after = EpisodeState(state.episode, state.block + 1, cached)
        return after, rewards, after.block >= self.blocks[state.episode], info

    def evict(
        self,
        episodes: NDArray[np.int64],
        block: NDArray[np.int64],
        cached: NDArray[np.bool_],
        scores: NDArray[np.float32],
    ) -> tuple[NDArray[np.bool_], np.ndarray, dict[str, np.ndarray]]:
        """Cut the cache to the budget, then let a block attend to it.

        Args:
            episodes: `[B]` int64.
            block: `[B]` int64, the block that is about to attend.
            cached: `[B, N]` bool.
            scores: `[B, N]`, higher = keep.

        Returns:
            The slots still cached, rewards `[B]` float64, and info.
        """
        rows = self._first_row[episodes] + block
        cut = self._cut_of[rows]
        evictable = self._evictable[cut]
        cached = cached & (top_slots(scores, evictable & cached, self._capacity[cut], self._table) | ~evictable)
        kept = np.multiply(self._attention_rows(rows), cached, dtype=np.float64).sum(-1)
        losable, total = self._losable[rows], self._total[rows]
        protected = total - losable
        # 1 where there is no attention to lose
        reward = np.divide(kept, losable, out=np.ones_like(kept), where=losable > 0)
        return cached, reward, {
            "utility_kept": np.divide(kept + protected, total, out=np.ones_like(kept), where=total > 0),
            "utility_total": total,
            "slots": cached.sum(-1),
            "block": block.copy(),
        }  # fmt: skip

    def future_attention(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], highest: bool = False
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32]]:
        """What the next cut decides about, and the utility of each slot for the rest of the continuation.

        Args:
            episodes: `[B]` int64.
            block: `[B]` int64, the block that is about to attend.
            cached: `[B, N]` bool.
            highest: the most attention of any block instead of the sum over blocks (Golden Eviction).

        Returns:
            The evictable slots `[B, N]` bool, how many of them stay `[B]`, and the attention that `block` and all
            later ones pay to each slot while it is not protected, `[B, N]` float32.
        """
        rows = self._first_row[episodes] + block
        cut = self._cut_of[rows]
        last = self._first_row[episodes] + self.blocks[episodes] - 1
        utility = self._attention_rows(rows)
        for later in range(1, int((last - rows).max(initial=0)) + 1):
            in_episode = (rows + later <= last)[:, None]
            more = np.where(in_episode, self._attention_rows(np.minimum(rows + later, last)), 0)
            utility = np.maximum(utility, more) if highest else utility + more
        return self._evictable[cut] & cached, self._capacity[cut], utility

    def outcome(self, state: EpisodeState, row: int, scores: NDArray[np.float32] | None) -> dict[str, Any]:
        """What the last cut did in environment `row`; as :meth:`RankingMode.outcome`."""
        assert state.cached is not None
        first, block, cached = self._first_row[state.episode[row]], int(state.block[row]), state.cached[row]
        attention = self._attention_rows(np.arange(first, first + self.blocks[state.episode[row]]))
        utility = attention.sum(0)
        evictable = best = cached
        label, share = "start", float("nan")
        if block:
            attending = first + block - 1
            cut = self._cut_of[attending]
            evictable, losable = self._evictable[cut], self._losable[attending]
            best = top_slots(utility[None], evictable[None], self._capacity[[cut]], self._table)[0] & (utility > 0)
            kept = np.multiply(attention[block - 1], cached, dtype=np.float64).sum()
            label, share = f"block {block}", float(kept / losable) if losable > 0 else float("nan")
        return {
            "labels": [label], "kept": cached[None], "best": best[None], "evictable": evictable, "utility": utility,
            "shares": [share], "measure": "reward",
        }  # fmt: skip


def _order_keys(
    scores: NDArray[np.float32], evictable: NDArray[np.bool_], table: ObservationTable
) -> NDArray[np.int64]:
    """Integers that order like (evictable, score, age): sorting them is much faster than a stable argsort."""
    if not np.isfinite(scores).all():
        raise UserError("the action holds a score that is not finite; expected numbers, best within [-1, 1]")
    # adding zero makes -0.0 the same as 0.0
    keys = sortable(torch.from_numpy(np.where(evictable, scores + np.float32(0.0), np.float32(-np.inf)))).numpy()
    keys <<= 32
    keys |= table.time_of_slot
    return keys


def ascending(scores: NDArray[np.float32], evictable: NDArray[np.bool_], table: ObservationTable) -> NDArray[np.int64]:
    """Indices `[B, N]` of every row's slots by rising score: slots that are not evictable, then the first to go.

    The reverse of the order of `kv_gym.budgets.keep_order`: ties go to the newer token.

    Args:
        scores: `[B, N]` float32, higher = keep.
        evictable: `[B, N]` bool, the slots that are ranked: cached and not protected.
        table: says which slot is older.

    Raises:
        UserError: a score is not finite.
    """
    keys = _order_keys(scores, evictable, table)
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    return keys if table.heads == 1 else table.slot_of_time[keys]


def top_slots(
    scores: NDArray[np.float32], evictable: NDArray[np.bool_], counts: NDArray[np.int64], table: ObservationTable
) -> NDArray[np.bool_]:
    """The `counts` `[B]` evictable slots of each row with the highest scores, `[B, N]` bool, or all where fewer are.

    These are the last slots of :func:`ascending`, found without sorting the indices.
    """
    keys = _order_keys(scores, evictable, table)
    size = keys.shape[-1]
    lowest = np.sort(keys, axis=-1)[np.arange(len(keys)), np.clip(size - counts, 0, size - 1)]
    return evictable & (keys >= lowest[:, None]) & (counts > 0)[:, None]


def protected_positions(n: int, seen: int, sinks: int, recent: int) -> NDArray[np.bool_]:
    """Which of the first `n` tokens are protected when `seen` tokens were seen, `[n]` bool."""
    position = np.arange(n)
    return (position < sinks) | (seen - 1 - position < recent)


def budget_weights(weights: BudgetWeights, n: int, sinks: int, recent: int) -> tuple[NDArray[np.float64], int, int]:
    """The weight of every budget, and the protection that goes with them.

    Args:
        weights: ``"log"`` (budgets log-uniform up to n / 2, weight 1 / b), ``"uniform"`` (weight 1 up to n / 2), or
            a mapping from budgets (slots per head, or shares of the tokens) to weights.
        n: tokens of the context.
        sinks: first tokens to protect; they shrink to half of the largest budget, after the recent ones.
        recent: last tokens to protect.

    Returns:
        `[n + 1]` float64, the weight of each budget in slots per head, zero at and below the number of protected
        tokens, where there is nothing to choose; then sinks and recent after shrinking.

    Raises:
        UserError: another name, or a mapping with no positive weight above the protected tokens.
    """
    by_budget = np.zeros(n + 1)
    if isinstance(weights, str):
        if weights not in ("log", "uniform"):
            raise UserError(f"budget_weights is {weights!r}; expected 'log', 'uniform' or a mapping budget -> weight")
        budgets = np.arange(1, max(1, n // 2) + 1)
        by_budget[budgets] = 1.0 / budgets if weights == "log" else 1.0
    else:
        for budget, weight in weights.items():
            by_budget[min(n, slots_after(parse_budget(budget), n))] += weight
    if by_budget.min() < 0 or not by_budget.any():
        raise UserError(f"budget_weights {weights} are not all positive; expected a mapping budget -> weight above 0")
    sinks, recent = protected_tokens(int(np.flatnonzero(by_budget)[-1]), sinks, recent)
    by_budget[: int(protected_positions(n, n, sinks, recent).sum()) + 1] = 0.0
    return by_budget, sinks, recent


def rank_weights(by_budget: NDArray[np.float64], protected: int, heads: int = 1) -> NDArray[np.float64]:
    """The weight of rank r among the evictable slots, `[heads * n]` float64, falling with r.

    A slot of rank r (from 0) stays at every total budget above ``protected + r``, so that the sum over budgets of
    weight times kept utility is the sum over slots of utility times weight of its rank: one pass, no loop over budgets.

    Args:
        by_budget: `[n + 1]` weights of budgets per head, zero up to `protected`.
        protected: protected tokens per head.
        heads: heads that share one ranking; a budget of b per head is `b * heads` slots in all.
    """
    n = len(by_budget) - 1
    tails = by_budget[::-1].cumsum()[::-1]  # tails[b]: weight of all budgets from b on
    needed = np.arange(heads * n) + 1 + protected * heads  # the smallest total that keeps rank r
    per_head = -(-needed // heads)
    return np.where(per_head <= n, tails[np.minimum(per_head, n)], 0.0)
