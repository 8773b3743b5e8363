"""KVEvict-v0 as a native batch: one NumPy pass for all environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kv_gym.envs.episodes import Replay, Traces
from kv_gym.envs.observations import Observation
from kv_gym.envs.rendering import FRAMES_PER_SECOND, MODES, Renderer
from kv_gym.envs.rewards import EpisodeState
from kv_gym.errors import UserError


class KVEvictVectorEnv(VectorEnv[Any, np.ndarray, np.ndarray]):
    """Many :class:`~kv_gym.envs.kv_evict.KVEvictEnv` at once, ``gym.make_vec("KVEvict-v0", num_envs=64, ...)``.

    Rewards, observations and infos are those of the scalar environment. An environment whose episode is over is
    reset within the same step (`AutoresetMode.SAME_STEP`): the step returns the first observation of the next
    episode, and in `infos["final_obs"]` and `infos["final_info"]` those of the episode that ended. In ranking mode
    that is every environment at every step. The observations in `infos["final_obs"]` show no slots, because nothing
    is left to decide, and are read-only.

    ## Arguments

    `num_envs` environments, and all of the scalar environment's arguments. `group=K` puts K neighbours into the same
    starting state whenever they are reset, which is what group-relative advantages (GRPO) compare; K must divide
    `num_envs`. One random generator serves the whole batch. With `order="sequential"` the episodes are dealt out one
    after the other, group by group. `reset(options=...)` takes one number for all environments, or a list with one
    for each group, where None means any: `{"sequence": [0, 1, None, 3], "head": 5}`. The traces are held once,
    whatever `num_envs`; an observation of all environments takes `num_envs` x N x 8 d bytes.
    """

    metadata = {
        "render_modes": list(MODES),
        "render_fps": FRAMES_PER_SECOND,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    autoreset_mode = AutoresetMode.SAME_STEP

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
        self.render_mode = render_mode
        self.renderer = Renderer(render_mode, traces, tokenizer)
        self.replay = Replay(traces, **settings)
        self.single_observation_space = self.replay.observation_space
        self.single_action_space = self.replay.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: EpisodeState | None = None
        self._final_obs = self.replay.final_observation()
        for array in self._final_obs.values() if isinstance(self._final_obs, dict) else [self._final_obs]:
            if isinstance(array, np.ndarray):
                array.setflags(write=False)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, KV head) of every head id that an observation's `head` may show."""
        return self.replay.table.head_pairs

    @property
    def episodes(self) -> int:
        """How many different episodes the traces hold."""
        return len(self.replay)

    def slots(self, decisions: NDArray[np.int64], mask: np.ndarray | None = None) -> Observation:
        """The observations again from their `decision` ids, for buffers that store ids instead of arrays.

        Args:
            decisions: `[B]`, the `decision` of observations with `index=True`.
            mask: `[B, N]`, the `mask` of the observations; needed in eviction mode only.
        """
        return self.replay.slots(np.asarray(decisions, np.int64).reshape(-1), mask)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes everywhere; a seed also begins the sequential order again."""
        super().reset(seed=seed)
        if seed is not None:
            self.replay.restart_order()
        self._state = self._start(self.num_envs // self.group, options)
        if self.render_mode:
            self.renderer.reset([self.replay.frame(self._state, row, None) for row in range(self.num_envs)])
        everywhere = np.ones(self.num_envs, bool)
        return self.replay.observe(self._state), _with_masks(self.replay.reset_info(self._state), everywhere)

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Rank the slots by the scores `actions`, `[num_envs, N]`, and reset the episodes that ended."""
        if self._state is None:
            raise UserError("step was called before reset: call reset first")
        state, rewards, ended, info = self.replay.step(self._state, actions)
        if self.render_mode:
            rows = range(self.num_envs)
            self.renderer.step([self.replay.frame(state, r, actions[r], float(rewards[r])) for r in rows], ended)
        infos: dict[str, Any] = {} if ended.all() else _with_masks(info, ~ended)
        if ended.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            for row in np.flatnonzero(ended):
                final_obs[row] = self._final_obs
            infos |= {"final_obs": final_obs, "_final_obs": ended.copy()}
            infos |= {"final_info": _with_masks(info, ended), "_final_info": ended.copy()}
            state = self._restart(state, ended)
            infos |= _with_masks(self.replay.reset_info(state), np.ones(self.num_envs, bool))
        self._state = state
        return self.replay.observe(state), rewards, ended, np.zeros(self.num_envs, bool), infos

    def render(self) -> tuple[Any, ...] | None:
        """Every environment in the render mode; None without one, and where a window shows them.

        After the step that ends an episode this is still that episode, though the observation is of the next one.
        """
        return self.renderer.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window, where there is one."""
        self.renderer.close()

    def _restart(self, state: EpisodeState, ended: NDArray[np.bool_]) -> EpisodeState:
        # the copies of a group replay one episode, so they end together
        started = self._start(int(ended.sum()) // self.group)
        if ended.all():
            return started
        state.episode = state.episode.copy()
        state.episode[ended], state.block[ended] = started.episode, started.block
        if state.cached is not None:
            state.cached[ended] = started.cached
        return state

    def _start(self, groups: int, options: dict[str, Any] | None = None) -> EpisodeState:
        """New episodes for `groups` groups."""
        listed = [values for values in (options or {}).values() if np.ndim(values)]
        if any(len(values) != groups for values in listed):
            raise UserError(f"a reset option has another length than there are groups; expected {groups} numbers")
        if options and listed:
            by_group = [{k: v[g] if np.ndim(v) else v for k, v in options.items()} for g in range(groups)]
            episodes = np.concatenate([self.replay.sample(1, self.np_random, one) for one in by_group])
        else:
            episodes = self.replay.sample(groups, self.np_random, options)
        return self.replay.mode.start(episodes.repeat(self.group))


def _with_masks(info: dict[str, np.ndarray], holds: NDArray[np.bool_]) -> dict[str, np.ndarray]:
    """Gymnasium's form of batched infos: every `key` has a `_key`, `[num_envs]` bool, for whom it holds."""
    return info | {f"_{name}": holds.copy() for name in info}
