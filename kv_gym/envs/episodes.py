"""The episodes in a trace set, which the scalar and the vector environment share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kv_gym.budgets import Budget, parse_budget, slots_after
from kv_gym.cache_view import protected_tokens
from kv_gym.envs.observations import Heads, Observation, ObservationTable, flat_space, flatten
from kv_gym.envs.rendering import Frame
from kv_gym.envs.rewards import BudgetWeights, EpisodeState, EvictionMode, RankingMode
from kv_gym.errors import UserError
from kv_gym.policies import Policy
from kv_gym.traces import TraceSet, open_traces
from kv_gym.traces.bounded_cache import memory_limit
from kv_gym.traces.reader import names_trace_sets
from kv_gym.traces.sequence import Contexts, Sequence

Traces = str | Path | Iterable[str | Path | TraceSet] | Iterable[Sequence] | None
ResetOptions = Mapping[str, int | None] | None

_REDUCTIONS = {"attention": "max", "attention_mean": "mean"}


class Replay:
    """Traces as episodes. Where an environment stands is an :class:`EpisodeState`, so that many can share a replay.

    Attributes:
        table: the observations of every decision.
        mode: what an action does and earns.
        observation_space: of one environment.
        action_space: of one environment.
    """

    def __init__(
        self,
        traces: Traces = None,
        *,
        heads: Heads = "all",
        budget: Budget | str | None = None,
        budget_weights: BudgetWeights = "log",
        utility: str = "attention",
        order: str = "random",
        max_tokens: int | None = None,
        sinks: int = 1,
        recent: int = 1,
        features: Seq[str | Policy] = (),
        index: bool = False,
        flat: bool = False,
        delay: int = 0,
        memory: float | None = None,
    ) -> None:
        """Read every context; the arguments are those of :class:`kv_gym.envs.KVEvictEnv`."""
        if utility not in _REDUCTIONS:
            raise UserError(f"utility is {utility!r}; expected 'attention' or 'attention_mean'")
        if order not in ("random", "sequential"):
            raise UserError(f"order is {order!r}; expected 'random' or 'sequential'")
        if flat and index:
            raise UserError("flat=True makes one array of an observation and index=True adds an entry to it: give one")
        if min(sinks, recent) < 0:
            raise UserError(f"sinks and recent are {sinks} and {recent}; expected numbers from 0")
        opened: Any = open_traces(traces) if names_trace_sets(traces) else traces  # type: ignore[arg-type]
        if delay and budget is None:
            raise UserError(
                f"a delay of {delay} tokens is for eviction mode, and ranking mode decides at the end of a context: "
                "give a budget"
            )
        limit = memory_limit(memory)
        sequences: Contexts
        if isinstance(opened, TraceSet):
            sequences = opened.cached(limit // 4)
        else:  # what is in memory anyway; some collections may only be iterated over
            sequences = [opened[i] for i in range(len(opened))] if hasattr(opened, "__getitem__") else list(opened)
        self.table = ObservationTable(sequences, heads, max_tokens, features, limit // 2)
        self.mode: RankingMode | EvictionMode
        if budget is None:
            self.mode = RankingMode(sequences, self.table, _REDUCTIONS[utility], sinks, recent, budget_weights)
        else:
            refuse_unfit_delay(self.table.lengths.tolist(), parse_budget(budget), sinks, delay)
            recent = max(recent, delay)
            self.mode = EvictionMode(sequences, self.table, _REDUCTIONS[utility], sinks, recent, budget, limit // 4)
        if not len(self):
            raise UserError(
                f"none of the {len(sequences)} contexts has a head with attention to lose: record them with "
                "continuations, and with more tokens than are protected"
            )
        self._tokens = [sequence.tokens[sequence.slot_positions] for sequence in sequences]
        self._order, self._index, self._next = order, index, 0
        self._entries = self.table.space(index)
        self._flat = flat
        self.observation_space: spaces.Space[Any] = flat_space(self._entries) if flat else self._entries
        self.action_space = spaces.Box(-1.0, 1.0, (self.table.size,), np.float32)

    def __len__(self) -> int:
        """How many different episodes there are."""
        return len(self.mode.decision)

    def restart_order(self) -> None:
        """Begin the sequential order again with the first episode."""
        self._next = 0

    def sample(self, count: int, rng: np.random.Generator, options: ResetOptions = None) -> NDArray[np.int64]:
        """The next `count` episodes that fit `options`, at random or in sequence; `[count]` int64."""
        fitting = self._matching(options)
        if fitting is None and self._order == "random":
            return rng.integers(len(self), size=count)
        if fitting is None:
            start, self._next = self._next, (self._next + count) % len(self)
            return (start + np.arange(count)) % len(self)
        if self._order == "random":
            return fitting[rng.integers(len(fitting), size=count)]
        return fitting[np.arange(count) % len(fitting)]

    def _matching(self, options: ResetOptions) -> NDArray[np.int64] | None:
        """Episodes that fit `options` (`sequence`, `head`, `continuation`; None: any), or None without options."""
        given = {name: number for name, number in (options or {}).items() if number is not None}
        if not given:
            return None
        fits = np.ones(len(self), bool)
        for name, number in given.items():
            if name not in self.mode.keys:
                raise UserError(f"unknown reset option {name!r}; expected {', '.join(self.mode.keys)}")
            fits &= self.mode.keys[name] == number
        if not fits.any():
            listed = ", ".join(f"{name} {number}" for name, number in given.items())
            heads = "joint" if self.table.joint else self.table.head_ids.tolist()
            raise UserError(
                f"no episode has {listed}; there are sequences 0 to {len(self._tokens) - 1} and heads {heads}, less "
                "those with no attention to lose"
            )
        return np.flatnonzero(fits)

    def observe(self, state: EpisodeState) -> Any:
        """New arrays with the observations of B environments; with `flat` one array."""
        observation = self.slots(self.mode.decision[state.episode], state.cached)
        return flatten(self._entries, observation) if self._flat else observation

    def slots(self, decisions: NDArray[np.int64], mask: np.ndarray | None = None) -> Observation:
        """The observations again from their `decision` ids `[B]` and, in eviction mode, their `mask` `[B, N]`."""
        observation = self.table.gather(decisions, None if mask is None else mask.astype(bool))
        if self._index:
            observation["decision"] = decisions.astype(np.int32)[:, None]
        return observation

    def final_observation(self) -> Any:
        """The observation of one environment whose episode is over: no slots."""
        observation = self.table.empty() | ({"decision": np.zeros(1, np.int32)} if self._index else {})
        if self._flat:
            return flatten(self._entries, {name: np.asarray(array)[None] for name, array in observation.items()})[0]
        return observation

    def reset_info(self, state: EpisodeState) -> dict[str, np.ndarray]:
        """The `info` of `reset` for B episodes, each `[B]`."""
        clipped = self.table.clipped[self.mode.decision[state.episode]]
        return {name: column[state.episode] for name, column in self.mode.keys.items()} | {"clipped": clipped}

    def step(
        self, state: EpisodeState, actions: np.ndarray
    ) -> tuple[EpisodeState, np.ndarray, NDArray[np.bool_], dict[str, np.ndarray]]:
        """One step of B environments: the state after it, rewards `[B]`, which episodes ended `[B]`, and info."""
        scores = np.asarray(actions, np.float32)
        if scores.shape != (len(state.episode), self.table.size):
            raise UserError(
                f"the action has shape {scores.shape[1:]}; expected one score per slot, {(self.table.size,)}"
            )
        after, rewards, ended, info = self.mode.step(state, scores)
        return after, rewards, ended, self.reset_info(state) | info

    def frame(self, state: EpisodeState, row: int, scores: np.ndarray | None, reward: float | None = None) -> Frame:
        """What to render of environment `row`; `scores` is its action `[N]`, None before the first."""
        episode, table = int(state.episode[row]), self.table
        decision = int(self.mode.decision[episode])
        keys = {name: column[episode] for name, column in self.mode.keys.items()}
        tokens = self._tokens[keys["sequence"]]
        title = f"context {keys['sequence']}"
        if "continuation" in keys:
            title += f", continuation {keys['continuation']}"
        outcome = self.mode.outcome(state, row, scores)
        n = len(tokens)
        for name in ("kept", "best", "evictable", "utility"):
            slots = outcome[name]
            outcome[name] = slots.reshape(*slots.shape[:-1], table.heads, table.tokens)[..., :n]
        return Frame(
            title=title,
            heads=[table.head_pairs[i] for i in (table.head_ids if table.joint else table.head[[decision]])],
            tokens=tokens,
            protected=~outcome.pop("evictable")[0],
            reward=reward,
            keeps_history=self.mode.keeps_history,
            rows=self.mode.picture_rows,
            **outcome,
        )


def refuse_unfit_delay(lengths: Seq[int], budget: Budget, sinks: int, delay: int) -> None:
    """Raise a UserError for a delay that is negative, or has no room in half of some context's budget."""
    slots = min((slots_after(budget, n) for n in lengths), default=0)
    if delay and (delay < 0 or protected_tokens(slots, sinks, delay)[1] < delay):
        raise UserError(
            f"a delay of {delay} tokens beside {sinks} sinks does not fit into half of the budget of {slots} slots: "
            "expected a smaller one from 0, or a larger budget"
        )
