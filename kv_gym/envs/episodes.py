"""What the scalar and the vector environment share: the loaded traces, the episodes in them, and the rules."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kv_gym.budgets.budget import Budget, parse_budget
from kv_gym.envs.eviction import Eviction
from kv_gym.envs.ranking import Ranking
from kv_gym.envs.render import Frame
from kv_gym.envs.rewards import BudgetWeights
from kv_gym.envs.slot_table import Heads, Observation, SlotTable
from kv_gym.errors import UserError
from kv_gym.policies import Policy
from kv_gym.traces import open_traces
from kv_gym.traces.sequence import Sequence

Traces = str | Path | Iterable[Sequence] | None

_REDUCTIONS = {"attention": "max", "attention_mean": "mean"}


@dataclass
class State:
    """Where B environments stand.

    Attributes:
        episode, block: `[B]` int64.
        cached: `[B, N]` bool in time order, or None in ranking mode.
    """

    episode: NDArray[np.int64]
    block: NDArray[np.int64]
    cached: NDArray[np.bool_] | None


class Replay:
    """Traces as episodes. It holds no state of play: that is in a :class:`State`, so that many may share it.

    Attributes:
        table: the slots of every decision.
        observation_space, action_space: of one environment.
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
    ) -> None:
        """Load everything; the arguments are those of :class:`kv_gym.envs.KVEvictEnv`."""
        if utility not in _REDUCTIONS:
            raise UserError(f"utility is {utility!r}; expected 'attention' or 'attention_mean'")
        if order not in ("random", "sequential"):
            raise UserError(f"order is {order!r}; expected 'random' or 'sequential'")
        if min(sinks, recent) < 0:
            raise UserError(f"sinks and recent are {sinks} and {recent}; expected numbers from 0")
        sequences = _load(traces)
        self.order, self._index = order, index
        self.table = SlotTable(sequences, heads, max_tokens, features)
        self._tokens = [sequence.tokens for sequence in sequences]
        reduction = _REDUCTIONS[utility]
        self._rules: Ranking | Eviction
        if budget is None:
            self._rules = Ranking(sequences, self.table, reduction, sinks, recent, budget_weights)
        else:
            self._rules = Eviction(sequences, self.table, reduction, sinks, recent, parse_budget(budget))
        if not len(self):
            raise UserError(
                f"none of the {len(sequences)} contexts has a head with attention to lose: record them with "
                "continuations, and with more tokens than are protected"
            )
        self.observation_space = self.table.space(index)
        self.action_space = spaces.Box(-1.0, 1.0, (self.table.size,), np.float32)

    def __len__(self) -> int:
        """How many different episodes there are."""
        return len(self._rules.decision)

    def start(self, episodes: NDArray[np.int64]) -> State:
        """The beginning of B episodes."""
        cached = self._rules.whole(episodes) if isinstance(self._rules, Eviction) else None
        return State(episodes, np.zeros(len(episodes), np.int64), cached)

    def observe(self, state: State) -> Observation:
        """New arrays with what is seen in B environments."""
        return self.slots(self._rules.decision[state.episode], self._shown(state))

    def slots(self, decisions: NDArray[np.int64], mask: np.ndarray | None = None) -> Observation:
        """The observation again from its `decision` ids `[B]` and, in eviction mode, its `mask` `[B, N]`."""
        observation = self.table.gather(decisions, None if mask is None else mask.astype(bool))
        if self._index:
            observation["decision"] = decisions.astype(np.int32)[:, None]
        return observation

    def nothing(self) -> Observation:
        """What one environment shows when its episode is over."""
        return self.table.nothing() | ({"decision": np.zeros(1, np.int32)} if self._index else {})

    def describe(self, state: State) -> dict[str, np.ndarray]:
        """What `info` tells at the start of B episodes, each `[B]`."""
        decisions = self._rules.decision[state.episode]
        table = self.table
        told = {
            "sequence": table.sequence[decisions],
            "head": table.head[decisions],
            "clipped": table.clipped[decisions],
        }
        if isinstance(self._rules, Eviction):
            told["continuation"] = self._rules.continuation[state.episode]
        return told

    def act(self, state: State, actions: np.ndarray) -> tuple[State, np.ndarray, NDArray[np.bool_], dict]:
        """One step of B environments: the state after it, rewards, which episodes are over, and info arrays."""
        scores = np.asarray(actions, np.float32)
        if scores.shape != (len(state.episode), self.table.size):
            raise UserError(
                f"the action has shape {scores.shape[1:]}; expected one score per slot, {(self.table.size,)}"
            )
        if isinstance(self._rules, Ranking):
            rewards, told = self._rules.rate(self._rules.decision[state.episode], scores)
            return state, rewards, np.ones(len(scores), bool), told
        assert state.cached is not None
        cached, rewards, told = self._rules.evict(state.episode, state.block, state.cached, scores)
        after = State(state.episode, state.block + 1, cached)
        return after, rewards, after.block >= self._rules.blocks[state.episode], told

    def find(self, options: dict[str, Any] | None) -> NDArray[np.int64]:
        """Episodes that fit `options`: `sequence`, `head` (its number) and, in eviction mode, `continuation`."""
        wanted = dict(options or {})
        rules, table = self._rules, self.table
        known = {"sequence": table.sequence[rules.decision], "head": table.head[rules.decision]}
        if isinstance(rules, Eviction):
            known["continuation"] = rules.continuation
        fits = np.ones(len(self), bool)
        for name, number in wanted.items():
            if name not in known:
                raise UserError(f"unknown reset option {name!r}; expected {', '.join(known)}")
            fits &= known[name] == number
        if not fits.any():
            asked = ", ".join(f"{name} {number}" for name, number in wanted.items())
            raise UserError(
                f"no episode has {asked}; there are sequences 0 to {len(self._tokens) - 1} and heads "
                f"{'joint' if table.joint else table.chosen.tolist()}, less those with no attention to lose"
            )
        return np.flatnonzero(fits)

    def frame(self, state: State, row: int, scores: np.ndarray | None, reward: float | None = None) -> Frame:
        """What to show of one environment's decision; `scores` is the action `[N]`, None before the first."""
        episode, rules, table = int(state.episode[row]), self._rules, self.table
        decision = int(rules.decision[episode])
        tokens = self._tokens[table.sequence[decision]]
        title = f"context {table.sequence[decision]}"
        if isinstance(rules, Eviction):
            assert state.cached is not None
            title += f", continuation {rules.continuation[episode]}"
            scene = rules.scene(episode, int(state.block[row]), state.cached[row])
        else:
            scene = rules.scene(decision, None if scores is None else np.asarray(scores, np.float32))
        by_head = (len(scene.labels), table.heads, table.tokens)
        n = len(tokens)
        numbers = table.chosen if table.joint else table.head[decision : decision + 1]
        return Frame(
            title=title,
            heads=[table.pairs[number] for number in numbers],
            tokens=tokens,
            labels=scene.labels,
            shares=scene.shares,
            measure=scene.measure,
            kept=scene.kept.reshape(by_head)[..., :n],
            best=scene.best.reshape(by_head)[..., :n],
            protected=~scene.open.reshape(by_head[1:])[0, :n],
            worth=scene.worth.reshape(by_head[1:])[:, :n],
            reward=reward,
            goes_on=isinstance(rules, Eviction),
            lanes=rules.lanes,
        )

    def _shown(self, state: State) -> NDArray[np.bool_] | None:
        if state.cached is None or not isinstance(self._rules, Eviction):
            return None
        return self._rules.shown(state.cached)


class Dealer:
    """Which episode comes next: at random, or one after the other."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._next = 0

    def rewind(self) -> None:
        """Begin the sequential order again."""
        self._next = 0

    def deal(self, count: int, rng: np.random.Generator, options: dict[str, Any] | None = None) -> NDArray[np.int64]:
        """`[count]` episodes that fit the options."""
        if options:
            fitting = self._replay.find(options)
            if self._replay.order == "random":
                return fitting[rng.integers(len(fitting), size=count)]
            return fitting[np.arange(count) % len(fitting)]
        if self._replay.order == "random":
            return rng.integers(len(self._replay), size=count)
        dealt = (self._next + np.arange(count)) % len(self._replay)
        self._next = (self._next + count) % len(self._replay)
        return dealt


def _load(traces: Traces) -> list[Sequence]:
    opened: Any = open_traces(traces) if traces is None or isinstance(traces, str | Path) else traces
    # a trace set promises len and [i], other collections may only be iterated over
    return [opened[i] for i in range(len(opened))] if hasattr(opened, "__getitem__") else list(opened)
