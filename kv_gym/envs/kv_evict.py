"""The environment KVEvict-v0: rank what a language model has cached."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import gymnasium as gym
import numpy as np

from kv_gym.budgets.budget import Budget
from kv_gym.envs.episodes import Dealer, Replay, State, Traces
from kv_gym.envs.render import FRAMES_PER_SECOND, MODES, Frame, check_mode, draw, tokenizer_for
from kv_gym.envs.rewards import BudgetWeights
from kv_gym.envs.slot_table import Heads, Observation
from kv_gym.envs.window import Window
from kv_gym.errors import UserError
from kv_gym.policies import Policy


class KVEvictEnv(gym.Env[Observation, np.ndarray]):
    """
    ## Description

    A language model keeps the keys and values of every past token, one slot for each token in each KV head. When
    memory is short, slots must go. This environment replays recorded contexts: it shows what one KV head has cached
    at the end of a context, asks for a score per slot, and pays by how much of the attention of later queries went to
    the slots that such a ranking would have kept.

    There are two modes:

    - **ranking** (`budget=None`): an episode is one step. The ranking is judged at many budgets at once.
    - **eviction** (`budget=B`): an episode is a continuation of the context, in blocks of new tokens. Before every
      block the cache is cut to B slots per head by the agent's scores; what went never returns.

    Replay is teacher-forced: keys, values and attention are those of the full cache. In ranking mode that is exact.
    In eviction mode it is an approximation after the first eviction: in a live model the later tokens' own keys and
    queries would differ (keys by 8-10 % when 20 of 32 tokens went, in a check), and here they do not.

    ## Action Space

    `Box(-1, 1, (N,), float32)`: a score for every slot, higher = keep. Only the order counts; ties go to the newer
    token. Scores outside the box are ranked like any others, NaN and infinity are refused. Scores of slots with mask
    0 and of protected slots (see `sinks`, `recent`) do not matter.

    ## Observation Space

    A `Dict`; N = tokens of the longest context (or `max_tokens`), d = head dimension of the model. Slot i holds the
    i-th token of the context. Slots that are padding or were evicted have mask 0, position -1 and zeros elsewhere.

    | Key        | Space                                 | Meaning                                                     |
    |------------|---------------------------------------|-------------------------------------------------------------|
    | `key`      | `Box(-65504, 65504, (N, d), float32)` | cached keys, after the rotary embedding                     |
    | `value`    | `Box(-65504, 65504, (N, d), float32)` | cached values                                               |
    | `position` | `Box(-1, 2**24, (N,), float32)`       | position of the slot's token in the context                 |
    | `mask`     | `Box(0, 1, (N,), int8)`               | 1 = a cached token                                          |
    | `head`     | `Discrete(L * H)`                     | number of the head; `env.heads[number]` is (layer, KV head) |
    | `features` | `Box(-65504, 65504, (N, F), float32)` | only with `features`: scores of F policies                  |
    | `decision` | `Box(0, 2**31 - 1, (1,), int32)`      | only with `index=True`: from which `slots` makes this again |

    With `heads="joint"` the N' = L x H x N slots of the whole model are ranked in one: head after head, each with its
    N tokens, and `head` is `Box(0, L * H - 1, (N',), int32)`, the number of each slot's head.

    Bounds do not depend on the traces, so that a saved agent runs on other traces of the same model with the same
    `max_tokens`. Numbers out of bounds are clipped, once, and counted in `info["clipped"]`.

    ## Rewards

    A slot's utility is the attention it received from later queries: mean over the queries of a continuation,
    maximum over the query heads of its KV head (`utility="attention_mean"`: mean over them), equal-weight mean over
    the continuations.

    **Ranking**: `sum_b w_b kept_b / sum_b w_b best_b`, where `kept_b` is the utility of the unprotected slots that stay
    at a budget of b slots per head, `best_b` what the best ranking would have, and `w_b = 1 / b` (log-uniform budgets)
    for every b above the number of protected tokens up to n / 2, n = tokens of the context. 1 = perfect. Heads that
    have nothing to gain are never shown. For the reward the protected tokens are the same at every budget; they shrink
    to half of the largest budget, recent tokens first. With `heads="joint"` a budget of b per head is b x L x H slots.

    **Eviction**: for each block, the full-cache attention of the block's queries to the unprotected context slots that
    are still cached, divided by that to all unprotected context slots; 1 where there is none. New tokens are cached
    too: as many of the newest as fit into half of the budget (their keys are not recorded, so they cannot be ranked)
    take their slots from the context, which therefore shrinks from B to no less than B / 2 slots per head as the
    continuation goes on. A share is taken of the context's tokens.

    `info` after a step holds `utility_kept`, the share of all utility that stays, protected slots included (averaged
    over the budgets with their weights in ranking mode), and `utility_total`, to weigh it with when heads and contexts
    are averaged. In ranking mode also `curve`, the share kept at 1/2, 1/4, 1/8, 1/16 and 1/32 of the context, and
    `curve_slots`, these budgets in slots per head (never fewer than are protected). In eviction mode also `slots`,
    how many slots of this context are cached, and `block`. `reward` is for training; report `utility_kept`.

    ## Starting State

    A context and a head (and in eviction mode a continuation) with all of the context's tokens cached: drawn
    uniformly, or one after the other with `order="sequential"` (a seed begins again with the first). To choose,
    `reset(options={"sequence": i, "head": j, "continuation": c})`; each may be left out. `info` says which it is.

    ## Episode End

    Terminated after one step in ranking mode, after the continuation's last block in eviction mode; never truncated.
    The last observation shows no slots.

    ## Arguments

    - `traces`: a path, a trace set, a list of `Sequence`, or None for the bundled sample. All of it is read into
      memory.
    - `heads`: `"all"` (one head at a time), a list of (layer, head) pairs, or `"joint"`.
    - `budget`: None for ranking mode; an int (slots per head) or a float in (0, 1] (share) for eviction mode.
    - `budget_weights`: `"log"`, `"uniform"`, or a mapping such as `{0.25: 1.0, 0.125: 1.0}` (ranking mode).
    - `utility`: `"attention"` or `"attention_mean"`.
    - `order`: `"random"` or `"sequential"`.
    - `max_tokens`: N per head; None for the longest context.
    - `sinks`, `recent`: how many first and last tokens always stay. In eviction mode they shrink to half the budget.
    - `features`: policies whose scores are shown, names or objects, such as `("knorm", "h2o")`.
    - `index`: show `decision`.
    - `render_mode`: `"ansi"` (text), `"rgb_array"` (a picture) or `"human"` (the picture in a window, which reset and
      step bring up to date; where there is no display a warning says so): which tokens stay at each budget, or after
      each block. Pictures of an environment all have one size.
    - `tokenizer`: for rendering, anything with `convert_ids_to_tokens`; None takes that of stored traces where it is
      on this machine, else token ids are shown.

    ## Version History

    - v0: first version. A changed reward or observation will be v1.
    """

    metadata = {"render_modes": list(MODES), "render_fps": FRAMES_PER_SECOND}

    def __init__(
        self,
        traces: Traces = None,
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
        render_mode: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Load the traces; the class docstring says what the arguments mean.

        Raises:
            UserError: traces or an argument that cannot be used.
        """
        self.render_mode = check_mode(render_mode)
        self._tokenizer = tokenizer_for(traces, tokenizer, render_mode)
        self.replay = Replay(
            traces,
            heads=heads,
            budget=budget,
            budget_weights=budget_weights,
            utility=utility,
            order=order,
            max_tokens=max_tokens,
            sinks=sinks,
            recent=recent,
            features=features,
            index=index,
        )
        self.observation_space: gym.Space[Any] = self.replay.observation_space
        self.action_space = self.replay.action_space
        self._dealer = Dealer(self.replay)
        self._state: State | None = None
        self._frames: list[Frame] = []
        self._window: Window | None = None

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of every number that an observation's `head` may show."""
        return self.replay.table.pairs

    @property
    def episodes(self) -> int:
        """How many different episodes the traces hold."""
        return len(self.replay)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self._dealer.rewind()
        self._state = self.replay.start(self._dealer.deal(1, self.np_random, options))
        if self.render_mode:
            self._frames = [self.replay.frame(self._state, 0, None)]
            self._show()
        return _first(self.replay.observe(self._state)), _plain(self.replay.describe(self._state))

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Rank the slots by `action`, `[N]`."""
        if self._state is None:
            raise UserError("the episode is over or has not begun: call reset first")
        actions = np.asarray(action)[None]
        state, rewards, over, told = self.replay.act(self._state, actions)
        if self.render_mode:
            frame = self.replay.frame(state, 0, actions[0], float(rewards[0]))
            self._frames = frame.after(self._frames)
            self._show()
        terminated = bool(over[0])
        self._state = None if terminated else state
        observation = self.replay.nothing() if terminated else _first(self.replay.observe(state))
        return observation, float(rewards[0]), terminated, False, _plain(told)

    def render(self) -> Any:
        """What stayed after the last step, in the render mode; None without one, and where a window shows it."""
        if self.render_mode in (None, "human") or not self._frames:
            return None
        return draw(self._frames, self.render_mode, self._tokenizer)

    def close(self) -> None:
        """Close the window, where there is one."""
        if self._window is not None:
            self._window.close()

    def _show(self) -> None:
        if self.render_mode == "human":
            self._window = self._window or Window("KVEvict-v0", FRAMES_PER_SECOND)
            self._window.show(draw(self._frames, "human", self._tokenizer))


def _first(batch: Observation) -> Observation:
    return {name: array[0] for name, array in batch.items()}


def _plain(told: dict[str, np.ndarray]) -> dict[str, Any]:
    """The only row of batched infos, as plain numbers where it can be."""
    return {name: values[0].item() if values.ndim == 1 else values[0] for name, values in told.items()}
