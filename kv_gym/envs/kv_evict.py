"""The environment KVEvict-v0: rank the tokens that a language model has cached, and keep the best."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence as Seq
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from kv_gym.budgets import Budget
from kv_gym.envs.episodes import Replay, Traces
from kv_gym.envs.observations import Heads
from kv_gym.envs.rendering import FRAMES_PER_SECOND, MODES, Renderer
from kv_gym.envs.rewards import BudgetWeights, EpisodeState
from kv_gym.errors import UserError
from kv_gym.policies import Policy


class KVEvictEnv(gym.Env[Any, np.ndarray]):
    """
    ## Description

    A language model keeps the keys and values of every past token, one slot for each token in each KV head. When
    memory is short, slots are evicted. This environment replays recorded contexts: an observation is what one KV head
    has cached at the end of a context, an action is a score per slot, and the reward is the share of the later
    queries' attention that went to the slots which the scores would have kept.

    There are two modes:

    - **ranking** (`budget=None`): an episode is one step. The ranking is judged at many budgets at once.
    - **eviction** (`budget=B`): an episode is a continuation of the context, in blocks of new tokens. Before every
      block the cache is cut to B slots per head by the agent's scores; evicted slots never return.

    Replay is teacher-forced: keys, values and attention are those of the full cache. In ranking mode that is exact.
    In eviction mode it is an approximation after the first eviction: in a live model the later tokens' own keys and
    queries would differ (keys by 8-10 % when 20 of 32 tokens went, in a check), and here they do not.

    Of traces that were recorded with `--slots N`, a context is its N sampled slots: observations hold these, with their
    positions in the whole text, budgets are shares of N, and `sinks` and `recent` count sampled slots (the first and
    the last four tokens are always sampled). Attention was normalised over all tokens, so that a slot's utility is
    what it is in the whole context; the reward is the share of the sample's utility. In eviction mode the new tokens
    count in the proportion in which slots were sampled.

    ## Action Space

    `Box(-1, 1, (N,), float32)`: a score for every slot, higher = keep. Only the order counts; ties go to the newer
    token. Scores outside the box are ranked like any others, NaN and infinity are refused. Scores of slots with mask
    0 and of protected slots (see `sinks`, `recent`) do not matter.

    ## Observation Space

    A `Dict`; N = slots of the longest context (or `max_tokens`), d = head dimension of the model. Slot i holds the
    i-th token of the context, or of its sample. Slots of padding and evicted slots have mask 0, position -1 and zeros
    elsewhere.

    | Key        | Space                                 | Meaning                                                     |
    |------------|---------------------------------------|-------------------------------------------------------------|
    | `key`      | `Box(-65504, 65504, (N, d), float32)` | cached keys, after the rotary embedding                     |
    | `value`    | `Box(-65504, 65504, (N, d), float32)` | cached values                                               |
    | `position` | `Box(-1, 2**24, (N,), float32)`       | position of the slot's token in the context                 |
    | `mask`     | `Box(0, 1, (N,), int8)`               | 1 = a cached token                                          |
    | `head`     | `Discrete(L * H)`                     | id of the head; `env.heads[id]` is its (layer, KV head)     |
    | `features` | `Box(-65504, 65504, (N, F), float32)` | only with `features`: scores of F policies                  |
    | `decision` | `Box(0, 2**31 - 1, (1,), int32)`      | only with `index=True`: id from which the vector            |
    |            |                                       | environment's `slots` makes the observation again           |

    With `heads="joint"` the N' = L x H x N slots of the whole model are one decision: head after head, each with its
    N tokens, and `head` is `Box(0, L * H - 1, (N',), int32)`, the id of each slot's head.

    Bounds do not depend on the traces, so that a saved agent runs on other traces of the same model with the same
    `max_tokens`. Numbers out of bounds are clipped when the traces are loaded, and counted in `info["clipped"]`.

    ## Rewards

    A slot's utility is the attention it received from later queries: mean over the queries of a continuation,
    maximum over the query heads of its KV head (`utility="attention_mean"`: mean over them), equal-weight mean over
    the continuations.

    **Ranking**: `sum_b w_b kept_b / sum_b w_b best_b`, where `kept_b` is the utility of the unprotected slots that stay
    at a budget of b slots per head, `best_b` that of the best ranking, and `w_b = 1 / b` (log-uniform budgets) for
    every b above the number of protected tokens up to n / 2, n = tokens of the context. The best ranking earns 1.
    Heads in which no ranking gains anything are never shown. For the reward the protected tokens are the same at every
    budget; they shrink to half of the largest budget, recent tokens first. With `heads="joint"` a budget of b per head
    is b x L x H slots.

    **Eviction**: for each block, the full-cache attention of the block's queries to the unprotected context slots that
    are still cached, divided by that to all unprotected context slots; 1 where there is none. New tokens are cached
    too: as many of the newest as fit into half of the budget (their keys are not recorded, so they cannot be ranked)
    take their slots from the context, which therefore shrinks from B to no less than B / 2 slots per head as the
    continuation goes on. A share is taken of the context's tokens.

    `info` after a step holds `utility_kept`, the share of all utility that stays, protected slots included (in ranking
    mode the weighted mean over budgets), and `utility_total`, its weight in averages over heads and contexts. In
    ranking mode also `curve`, the share kept at 1/2, 1/4, 1/8, 1/16 and 1/32 of the context, and `curve_slots`, these
    budgets in slots per head (at least the protected ones). In eviction mode also `slots`, how many slots of this
    context are cached, and `block`. `reward` is for training; report `utility_kept`.

    ## Starting State

    A context and a head (and in eviction mode a continuation) with all of the context's tokens cached: drawn
    uniformly, or one after the other with `order="sequential"` (a seed begins again with the first). To choose,
    `reset(options={"sequence": i, "head": j, "continuation": c})`; each may be left out. `info` says which it is,
    after steps too.

    ## Episode End

    Terminated after one step in ranking mode, after the continuation's last block in eviction mode; never truncated.
    The last observation shows no slots.

    ## Arguments

    - `traces`: a path, a trace set, a list of these (sets of one model), a list of `Sequence`, or None for the
      bundled sample.
    - `heads`: `"all"` (one head at a time), a list of (layer, head) pairs, or `"joint"`.
    - `budget`: None for ranking mode; an int (slots per head) or a float in (0, 1] (share) for eviction mode.
    - `budget_weights`: `"log"`, `"uniform"`, or a mapping such as `{0.25: 1.0, 0.125: 1.0}` (ranking mode).
    - `utility`: `"attention"` or `"attention_mean"`.
    - `order`: `"random"` or `"sequential"`.
    - `max_tokens`: N per head; None for the longest context.
    - `sinks`, `recent`: first and last tokens to keep always. In eviction mode they shrink to half the budget.
    - `delay`: eviction mode: a token is judged when so many others have come after it, those of the continuation
      included; the newest ones stay. It must fit into half the budget.
    - `features`: policies whose scores are shown, names or objects, such as `("knorm", "h2o")`.
    - `index`: add `decision` to the observation.
    - `flat`: an observation is one array, `Box((size,), float32)`, as `FlattenObservation` would make it: for libraries
      that know no `Dict`, and for the native batch, which resets within the step and which Gymnasium's vector wrappers
      of observations therefore refuse.
    - `render_mode`: which tokens stay at each budget, or after each block, as `"ansi"` (text), `"rgb_array"` (a
      picture) or `"human"` (the picture in a window that reset and step update; a warning where there is no display).
      Pictures of an environment all have one size.
    - `memory`: gigabytes (10^9 bytes) that contexts may take in memory; None: half of the machine's.
    - `tokenizer`: for rendering, anything with `convert_ids_to_tokens`; None takes that of stored traces where it is
      on this machine, else token ids are shown.

    ## Memory

    Observations take 8 d bytes for each context, head and slot, and 4 F for features, all padded to N slots. Half of
    `memory` may hold them: where all contexts fit they stay, and where they do not those that were replayed last do;
    others are read from the disk again when an episode begins with them. A quarter of `memory` holds contexts as they
    were read, while the environment is made and where not all fit; in eviction mode another quarter holds the attention
    of continuations, 4 bytes per context, head, slot, continuation and block. A list of contexts stays in memory whole,
    beside that. Always held are 4 bytes per context, head and slot for the utility in ranking mode, and the observation
    of a batch. The last context is held even where the limit is smaller. 64 contexts of 1,024 tokens of a model with 90
    heads of 64 dimensions take 3.0 GB. Several environments in one process share nothing: use one vector environment.

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
        flat: bool = False,
        delay: int = 0,
        render_mode: str | None = None,
        tokenizer: Any = None,
        memory: float | None = None,
    ) -> None:
        """Load the traces; the arguments are described in the class docstring.

        Raises:
            UserError: traces or an argument that cannot be used.
        """
        self.render_mode = render_mode
        self.renderer = Renderer(render_mode, traces, tokenizer)
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
            flat=flat,
            delay=delay,
            memory=memory,
        )
        self.observation_space: gym.Space[Any] = self.replay.observation_space
        self.action_space = self.replay.action_space
        self._state: EpisodeState | None = None
        self._check_autoreset = budget is None

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of every head id that an observation's `head` may show."""
        return self.replay.table.head_pairs

    @property
    def episodes(self) -> int:
        """How many different episodes the traces hold."""
        return len(self.replay)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if self._check_autoreset:
            self._check_autoreset = False
            _warn_if_reset_takes_a_step()
        if seed is not None:
            self.replay.restart_order()
        self._state = self.replay.mode.start(self.replay.sample(1, self.np_random, options))
        if self.render_mode:
            self.renderer.reset([self.replay.frame(self._state, 0, None)])
        return _only_row(self.replay.observe(self._state)), _plain_info(self.replay.reset_info(self._state))

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Rank the slots by the scores `action`, `[N]`."""
        if self._state is None:
            raise UserError("the episode is over or has not begun: call reset first")
        actions = np.asarray(action)[None]
        state, rewards, ended, info = self.replay.step(self._state, actions)
        reward, terminated = float(rewards[0]), bool(ended[0])
        if self.render_mode:
            self.renderer.step([self.replay.frame(state, 0, actions[0], reward)], ended)
        self._state = None if terminated else state
        observation = self.replay.final_observation() if terminated else _only_row(self.replay.observe(state))
        return observation, reward, terminated, False, _plain_info(info)

    def render(self) -> Any:
        """What stayed after the last step, in the render mode; None without one, and where a window shows it."""
        rendered = self.renderer.render()
        return rendered and rendered[0]

    def close(self) -> None:
        """Close the window, where there is one."""
        self.renderer.close()


def _warn_if_reset_takes_a_step() -> None:
    """Warn below a Gymnasium vector environment that resets with a step of its own."""
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__", "").startswith("gymnasium.vector."):
            owner = frame.f_locals.get("self")
            if frame.f_locals.get("autoreset_mode", getattr(owner, "autoreset_mode", None)) == AutoresetMode.NEXT_STEP:
                warnings.warn(
                    "the vector environment resets with a step of its own (AutoresetMode.NEXT_STEP) and episodes of "
                    "KVEvict-v0 in ranking mode last one step, so that every second transition is an empty reset: use "
                    'gym.make_vec("KVEvict-v0", num_envs=...) without vectorization_mode, or pass '
                    'vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}',
                    stacklevel=2,
                )
            return


def _only_row(batch: Any) -> Any:
    return {name: array[0] for name, array in batch.items()} if isinstance(batch, dict) else batch[0]


def _plain_info(info: dict[str, np.ndarray]) -> dict[str, Any]:
    """The only row of batched infos, as plain numbers where it can be."""
    return {name: values[0].item() if values.ndim == 1 else values[0] for name, values in info.items()}
