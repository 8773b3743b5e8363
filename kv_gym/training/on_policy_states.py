"""The states that evictions produce: before a block of new tokens, with what earlier cuts have left.

The rules are those of KVEvict-v0 in eviction mode. A state is relabelled: what its slots are worth is what the rest of
the continuation attends to, whatever way led to it (as DAgger does, arXiv 1011.0686).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_gym.budgets import parse_budget
from kv_gym.envs.observations import ObservationTable
from kv_gym.envs.rewards import EvictionMode
from kv_gym.errors import UserError
from kv_gym.policies.scoring.inputs import slot_inputs
from kv_gym.traces.sequence import Sequence

Score = Callable[[Tensor, Tensor], Tensor]
"""From inputs `[B, n, f]` and each row's head `[B]` to scores `[B, n]`."""


@dataclass(frozen=True)
class States:
    """B decision points, one KV head each; only the slots that may go, first in every row.

    Attributes:
        inputs: `[B, n, f]`, as the network sees them, not standardised.
        heads: `[B]` int64, number of the head.
        there: `[B, n]` bool; false where a row has fewer slots than the longest.
        room: `[B]` int64, how many of them may stay.
        worth: `[B, n]` float32, attention that the rest of the continuation pays; zero where nothing is.
    """

    inputs: Tensor
    heads: Tensor
    there: Tensor
    room: Tensor
    worth: Tensor


class Reached:
    """Draws continuations of recorded contexts, and the states in them that a policy's own cuts lead to.

    Holds 4 bytes per context, head, continuation, block and token.
    """

    def __init__(self, sequences: list[Sequence], budget: float, sinks: int, recent: int):
        """Read the contexts; `budget` is the share of a context that stays.

        Raises:
            UserError: no continuation attends to anything that could go.
        """
        self._table = ObservationTable(sequences)
        self._rules = EvictionMode(sequences, self._table, "max", sinks, recent, parse_budget(budget))
        rules = self._rules
        self._block = [[c.block for c in sequence.continuations] for sequence in sequences]
        names = np.stack((self._table.sequence[rules.decision], rules.continuation), 1)
        _, which = np.unique(names, axis=0, return_inverse=True)
        # all heads of one continuation together
        self._groups = [np.flatnonzero(which == group) for group in range(which.max(initial=-1) + 1)]
        if not self._groups:
            raise UserError(
                f"at a budget of {budget} no continuation of the {len(sequences)} contexts loses attention: record "
                "longer contexts, or lower the budget"
            )

    def draw(self, count: int, score: Score | None, highest: bool = False) -> States:
        """States of all heads of `count` random continuations, each before a random block of it.

        Args:
            count: continuations.
            score: the policy whose cuts lead there; None lets what the future attends to decide (Golden Eviction).
            highest: worth is the most attention of any block to come instead of the sum over them.
        """
        chosen = [self._groups[i] for i in torch.randint(len(self._groups), (count,)).tolist()]
        target = [int(torch.randint(int(self._rules.blocks[group[0]]), ())) for group in chosen]
        episodes = np.concatenate(chosen)
        stop = np.repeat(target, [len(group) for group in chosen])
        cached = self._rules.full_cache(episodes)
        for block in range(stop.max(initial=0)):
            going = np.flatnonzero(stop > block)
            at = np.full(len(going), block)
            scores = self._scores(episodes[going], at, cached[going], score)
            cached[going] = self._rules.evict(episodes[going], at, cached[going], scores)[0]
        return self._states(episodes, stop, cached, highest)

    def reward(self, score: Score | None) -> float:
        """What KVEvict-v0 pays a policy in eviction mode: mean over all blocks of all heads, contexts, continuations.

        Args:
            score: the policy, whose every cut bears on those after it; None: Golden Eviction, which sees the future.
        """
        rewards = []
        for episodes in self._groups:
            cached = self._rules.full_cache(episodes)
            for block in range(int(self._rules.blocks[episodes[0]])):
                at = np.full(len(episodes), block)
                cached, reward, _ = self._rules.evict(episodes, at, cached, self._scores(episodes, at, cached, score))
                rewards.append(reward)
        return float(np.concatenate(rewards).mean())

    def _scores(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], score: Score | None
    ) -> NDArray[np.float32]:
        """`[B, N]`, by a policy, or by what the future attends to most."""
        if score is None:
            return self._rules.future_attention(episodes, block, cached, highest=True)[2]
        return score(*self._inputs(episodes, block)).numpy()

    def _states(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], highest: bool
    ) -> States:
        may_go, room, worth = self._rules.future_attention(episodes, block, cached, highest)
        there = torch.from_numpy(may_go)
        # the same slots in front, in their order
        first = there.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(there.sum(-1).max())]
        inputs, heads = self._inputs(episodes, block)
        inputs = inputs.gather(1, first[..., None].expand(-1, -1, inputs.shape[-1]))
        there = there.gather(1, first)
        return States(inputs, heads, there, torch.from_numpy(room), torch.from_numpy(worth).gather(1, first) * there)

    def _inputs(self, episodes: NDArray[np.int64], block: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        decisions = self._rules.decision[episodes]
        shown = self._table.gather(decisions)
        sizes = zip(self._table.sequence[decisions], self._rules.continuation[episodes], strict=True)
        new = block * np.array([self._block[i][c] for i, c in sizes])
        seen = torch.from_numpy(self._table.length[decisions] + new)[:, None]
        key, value, position = (torch.from_numpy(shown[name]) for name in ("key", "value", "position"))
        return slot_inputs(key, value, position.long(), seen), torch.from_numpy(shown["head"])
