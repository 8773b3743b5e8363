"""KVEvict-v0 as a native batch: one NumPy pass for all environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kv_gym.envs.episodes import Dealer, Replay, State, Traces
from kv_gym.envs.render import FRAMES_PER_SECOND, MODES, Frame, check_mode, draw, tokenizer_for
from kv_gym.envs.slot_table import Observation
from kv_gym.envs.window import Window, tiled
from kv_gym.errors import UserError


class KVEvictVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Many :class:`~kv_gym.envs.kv_evict.KVEvictEnv` at once, ``gym.make_vec("KVEvict-v0", num_envs=64, ...)``.

    Rewards, observations and infos are those of the scalar environment. An environment whose episode is over is
    reset within the same step (`AutoresetMode.SAME_STEP`): the step returns the first observation of the next
    episode, and `infos["final_obs"]` and `infos["final_info"]` what belongs to the one that ended. In ranking mode
    that is every environment at every step. `infos["final_obs"]` shows no slots, for nothing is left to decide, and
    cannot be written to.

    ## Arguments

    `num_envs` environments, and all of the scalar environment's arguments. `group=K` puts K neighbours into the same
    starting state whenever they are reset, which is what group-relative advantages (GRPO) compare; K must divide
    `num_envs`. One random generator serves the whole batch. With `order="sequential"` the episodes are dealt out one
    after the other, group by group. `reset(options=...)` takes one number for all environments, or one for each
    group: `{"sequence": [0, 1, 2, 3], "head": 5}`.
    """

    metadata = {
        "render_modes": list(MODES),
        "render_fps": FRAMES_PER_SECOND,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        traces: Traces = None,
        *,
        group: int = 1,
        render_mode: str | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """Load the traces; `settings` are those of the scalar environment.

        Raises:
            UserError: `num_envs` is not a positive multiple of `group`, or traces or settings cannot be used.
        """
        if group < 1 or num_envs < 1 or num_envs % group:
            raise UserError(f"num_envs is {num_envs} and group is {group}; expected a positive multiple of the group")
        self.num_envs, self.group = num_envs, group
        self.render_mode = check_mode(render_mode)
        self._tokenizer = tokenizer_for(traces, tokenizer, render_mode)
        self.replay = Replay(traces, **settings)
        self.single_observation_space = self.replay.observation_space
        self.single_action_space = self.replay.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._dealer = Dealer(self.replay)
        self._state: State | None = None
        self._frames: list[list[Frame]] = []  # of each environment, the episode that it shows
        self._over = np.zeros(num_envs, bool)
        self._window: Window | None = None
        self._final_obs = self.replay.nothing()
        for array in self._final_obs.values():
            if isinstance(array, np.ndarray):
                array.setflags(write=False)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of every number that an observation's `head` may show."""
        return self.replay.table.pairs

    @property
    def episodes(self) -> int:
        """How many different episodes the traces hold."""
        return len(self.replay)

    def slots(self, decisions: NDArray[np.int64], mask: np.ndarray | None = None) -> Observation:
        """Observations again from their `decision` ids `[B]`, for buffers that store ids instead of arrays.

        Args:
            decisions: `[B]`, what `index=True` shows as `decision`.
            mask: `[B, N]` of the observations, in eviction mode; ranking mode does without.
        """
        return self.replay.slots(np.asarray(decisions, np.int64).reshape(-1), mask)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin new episodes everywhere; a seed also begins the sequential order again."""
        super().reset(seed=seed)
        if seed is not None:
            self._dealer.rewind()
        self._state = self.replay.start(self._deal(self.num_envs // self.group, options))
        if self.render_mode:
            self._over = np.zeros(self.num_envs, bool)
            self._frames = [[self.replay.frame(self._state, row, None)] for row in range(self.num_envs)]
            self._show()
        return self.replay.observe(self._state), _masked(
            self.replay.describe(self._state), np.ones(self.num_envs, bool)
        )

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, np.ndarray, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Rank, reward, and reset what is over; `actions` is `[num_envs, N]`."""
        if self._state is None:
            raise UserError("step was called before reset: call reset first")
        state, rewards, over, told = self.replay.act(self._state, actions)
        if self.render_mode:
            for place, frames in enumerate(self._frames):
                frame = self.replay.frame(state, place, actions[place], float(rewards[place]))
                # an episode that ended is shown until the first decision of the next one
                earlier = [] if self._over[place] else frames
                self._frames[place] = frame.after(earlier)
            self._over = over
            self._show()
        infos: dict[str, Any] = {}
        if over.all():
            state = self.replay.start(self._deal(self.num_envs // self.group, None))
        else:
            infos |= _masked(told, ~over)
            if over.any():
                self._restart(state, over)
        self._state = state
        if over.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(over):
                final_obs[row] = self._final_obs
            infos |= {"final_obs": final_obs, "_final_obs": over.copy()}
            infos |= {"final_info": _masked(told, over), "_final_info": over.copy()}
            infos |= _masked(self.replay.describe(state), over)
        return self.replay.observe(state), rewards, over, np.zeros(self.num_envs, bool), infos

    def render(self) -> tuple[Any, ...] | None:
        """What every environment shows, in the render mode; None without one, and where a window shows it.

        After the step that ends an episode this is still that episode, though the observation is of the next one.
        """
        if self.render_mode in (None, "human"):
            return None
        return tuple(draw(frames, self.render_mode, self._tokenizer) for frames in self._frames)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window, where there is one."""
        if self._window is not None:
            self._window.close()

    def _show(self) -> None:
        if self.render_mode == "human":
            self._window = self._window or Window("KVEvict-v0", FRAMES_PER_SECOND)
            self._window.show(tiled([draw(frames, "human", self._tokenizer) for frames in self._frames]))

    def _restart(self, state: State, over: NDArray[np.bool_]) -> None:
        # copies of a group replay one episode, so that they end together
        groups = int(over.sum()) // self.group
        fresh = self.replay.start(self._deal(groups, None))
        state.episode = state.episode.copy()
        state.episode[over], state.block[over] = fresh.episode, fresh.block
        if state.cached is not None:
            state.cached[over] = fresh.cached

    def _deal(self, groups: int, options: dict[str, Any] | None) -> NDArray[np.int64]:
        if options and any(np.ndim(number) for number in options.values()):
            if any(len(number) != groups for number in options.values() if np.ndim(number)):
                raise UserError(f"a reset option has another length than there are groups; expected {groups} numbers")
            each = [{k: v[g] if np.ndim(v) else v for k, v in options.items()} for g in range(groups)]
            episodes = np.concatenate([self._dealer.deal(1, self.np_random, one) for one in each])
        else:
            episodes = self._dealer.deal(groups, self.np_random, options)
        return episodes.repeat(self.group)


def _masked(told: dict[str, np.ndarray], there: NDArray[np.bool_]) -> dict[str, np.ndarray]:
    """Gymnasium's form of batched infos: every `key` has a `_key` that says for whom it holds."""
    return told | {f"_{name}": there.copy() for name in told}
