"""Decision points on the path of a policy's own evictions: before a block of new tokens, after earlier cuts.

The rules are those of KVEvict-v0 in eviction mode. A state is relabelled: the utility of its slots is what the rest of
the continuation attends to, however the state was reached (as in DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kv_gym.budgets import parse_budget
from kv_gym.devices import to_device
from kv_gym.envs.observations import ObservationTable
from kv_gym.envs.rewards import EvictionMode
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.policies.scoring.inputs import slot_inputs
from kv_gym.traces import TraceSet
from kv_gym.traces.bounded_cache import UNLIMITED
from kv_gym.traces.sequence import Contexts

Score = Callable[[Tensor, Tensor], Tensor]
"""From inputs `[B, n, f]` and each row's head `[B]` to scores `[B, n]`."""


@dataclass(frozen=True)
class DecisionStates:
    """B decision points, one KV head each; slots that may go come first in every row, others are left out.

    Attributes:
        inputs: `[B, n, f]`, as the network sees them, not standardised.
        heads: `[B]` int64, number of the head.
        mask: `[B, n]` bool; false where a row has fewer slots than the longest.
        room: `[B]` int64, how many of them may stay.
        utility: `[B, n]` float32, attention that the rest of the continuation pays; zero at padding.
    """

    inputs: Tensor
    heads: Tensor
    mask: Tensor
    room: Tensor
    utility: Tensor

    def to(self, device: torch.device) -> DecisionStates:
        """The same on a device."""
        return DecisionStates(*(to_device(getattr(self, each.name), device) for each in fields(self)))


class OnPolicyStates:
    """Draws continuations of recorded contexts, and the states in them that a policy's own cuts lead to.

    Attention takes 4 bytes per context, head, continuation, block and token.

    Args:
        sequences: recorded contexts.
        budget: share of a context's slots that stay.
        sinks, recent: first and last tokens that are protected.
        limit: bytes of contexts that may be held; the rest is read again when it is drawn.

    Raises:
        UserError: no continuation attends to anything that could be evicted.
    """

    def __init__(self, sequences: Contexts, budget: float, sinks: int, recent: int, limit: int = UNLIMITED):
        if isinstance(sequences, TraceSet):
            sequences = sequences.cached(limit // 4)
        self._table = ObservationTable(sequences, limit=limit // 2)
        self._eviction = EvictionMode(sequences, self._table, "max", sinks, recent, parse_budget(budget), limit // 4)
        self._block_tokens = [[c.block for c in sequence.continuations] for sequence in sequences]
        context = self._table.sequence[self._eviction.decision]
        _, group = np.unique(np.stack((context, self._eviction.continuation), 1), axis=0, return_inverse=True)
        # episodes of all heads of one continuation together
        self._groups = [np.flatnonzero(group == number) for number in range(group.max(initial=-1) + 1)]
        if not self._groups:
            raise UserError(
                f"at a budget of {budget} no continuation of the {len(sequences)} contexts loses attention: record "
                "longer contexts, or lower the budget"
            )

    def draw(self, count: int, score: Score | None, highest: bool = False) -> DecisionStates:
        """States of all heads of `count` random continuations, each before a random block of it.

        Args:
            count: continuations.
            score: the policy whose cuts lead there; None evicts what the future attends to least (Golden Eviction).
            highest: utility is the most attention of any block to come instead of the sum over them.
        """
        groups = [self._groups[i] for i in torch.randint(len(self._groups), (count,)).tolist()]
        stops = [int(torch.randint(int(self._eviction.blocks[group[0]]), ())) for group in groups]
        episodes = np.concatenate(groups)
        stop = np.repeat(stops, [len(group) for group in groups])
        cached = self._eviction.full_cache(episodes)
        for block in range(stop.max(initial=0)):
            active = np.flatnonzero(stop > block)
            blocks = np.full(len(active), block)
            scores = self._scores(episodes[active], blocks, cached[active], score)
            cached[active] = self._eviction.evict(episodes[active], blocks, cached[active], scores)[0]
        return self._states(episodes, stop, cached, highest)

    def reward(self, score: Score | None) -> float:
        """What KVEvict-v0 pays a policy in eviction mode: mean over all blocks of all heads, contexts, continuations.

        Args:
            score: the policy; its cuts are made one after another. None: Golden Eviction, which sees the future.
        """
        rewards = []
        for episodes in self._groups:
            cached = self._eviction.full_cache(episodes)
            for block in range(int(self._eviction.blocks[episodes[0]])):
                blocks = np.full(len(episodes), block)
                scores = self._scores(episodes, blocks, cached, score)
                cached, reward, _ = self._eviction.evict(episodes, blocks, cached, scores)
                rewards.append(reward)
        return float(np.concatenate(rewards).mean())

    def _scores(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], score: Score | None
    ) -> NDArray[np.float32]:
        """`[B, N]`, by a policy, or the most attention of any block to come."""
        if score is None:
            return self._eviction.future_attention(episodes, block, cached, highest=True)[2]
        device = score.mean.device if isinstance(score, GroupedScorer) else torch.device("cpu")
        inputs, heads = (to_device(tensor, device) for tensor in self._inputs(episodes, block))
        return score(inputs, heads).cpu().numpy()  # the environment decides on the host

    def _states(
        self, episodes: NDArray[np.int64], block: NDArray[np.int64], cached: NDArray[np.bool_], highest: bool
    ) -> DecisionStates:
        evictable, room, utility = self._eviction.future_attention(episodes, block, cached, highest)
        mask = torch.from_numpy(evictable)
        # evictable slots first, in their order
        order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : int(mask.sum(-1).max())]
        inputs, heads = self._inputs(episodes, block)
        inputs = inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1]))
        mask = mask.gather(1, order)
        utility_tensor = torch.from_numpy(utility).gather(1, order) * mask
        return DecisionStates(inputs, heads, mask, torch.from_numpy(room), utility_tensor)

    def _inputs(self, episodes: NDArray[np.int64], block: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs `[B, N, f]` of all slots, and the head `[B]`."""
        decisions = self._eviction.decision[episodes]
        observation = self._table.gather(decisions)
        pairs = zip(self._table.sequence[decisions], self._eviction.continuation[episodes], strict=True)
        new = block * np.array([self._block_tokens[i][c] for i, c in pairs])
        seen = torch.from_numpy(self._table.seen[decisions] + new)[:, None]
        key, value, position = (torch.from_numpy(observation[name]) for name in ("key", "value", "position"))
        return slot_inputs(key, value, position.long(), seen), torch.from_numpy(observation["head"])
