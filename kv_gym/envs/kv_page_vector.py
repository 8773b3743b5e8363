"""KVPage-v0 as a native batch: one trace in memory for all environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kv_gym.envs.kv_page import DecisionTimer, Observation, PageEpisode, PageEpisodes, begin_episode
from kv_gym.errors import UserError


class KVPageVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Many :class:`~kv_gym.envs.kv_page.KVPageEnv` at once, ``gym.make_vec("KVPage-v0", num_envs=16, ...)``.

    Rewards, observations and infos are those of the scalar environment. An environment whose episode is over is reset
    within the same step (`AutoresetMode.SAME_STEP`): the step returns the first observation of the next episode, and
    `infos["final_obs"]` and `infos["final_info"]` what belongs to the one that ended.

    ## Arguments

    `num_envs` environments, and all of the scalar environment's arguments but `render_mode`. One random generator
    serves the whole batch. `reset(options={"start": ...})` takes one number, or one for each environment.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
    autoreset_mode = AutoresetMode.SAME_STEP

    def __init__(self, num_envs: int = 1, requests: Any = None, **settings: Any) -> None:
        """Read the trace; `settings` are those of the scalar environment.

        Raises:
            UserError: no environment, or a trace or a setting that cannot be used.
        """
        if num_envs < 1:
            raise UserError(f"num_envs is {num_envs}; expected 1 or more")
        settings.pop("render_mode", None)
        self.num_envs = num_envs
        self.rules = PageEpisodes(requests, **settings)
        self.single_observation_space = self.rules.observation_space
        self.single_action_space = self.rules.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.timer = DecisionTimer(self.rules.limit)
        self._episodes: list[PageEpisode] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a stretch of requests in every environment."""
        super().reset(seed=seed)
        each: list[dict[str, Any] | None] = [options] * self.num_envs
        if options and isinstance(options.get("start"), list | tuple | np.ndarray):
            if len(options["start"]) != self.num_envs:
                raise UserError(f"start names {len(options['start'])} requests; expected one or {self.num_envs}")
            each = [{**options, "start": start} for start in options["start"]]
        self._episodes = [begin_episode(self.rules, self.np_random, one) for one in each]
        observation, infos = self._observe(), self._infos([True] * self.num_envs)
        self.timer.start()
        return observation, infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Evict a page everywhere, and begin anew where the slice is over."""
        if not self._episodes:
            raise UserError("step was called before reset: call reset first")
        late = self.timer.late
        rewards = np.array([one.act(action, late) for one, action in zip(self._episodes, actions, strict=True)])
        over = np.array([one.over for one in self._episodes])
        infos: dict[str, Any] = {}
        if over.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            infos["final_info"] = self._infos(over)
            for place in np.flatnonzero(over):
                final_obs[place] = self._episodes[place].observe()
                self._episodes[place] = begin_episode(self.rules, self.np_random)
            infos |= {"final_obs": final_obs, "_final_obs": over.copy(), "_final_info": over.copy()}
        infos |= self._infos([True] * self.num_envs)
        observation = self._observe()
        self.timer.start()
        return observation, rewards, np.zeros(self.num_envs, bool), over, infos

    def action_masks(self) -> NDArray[np.bool_]:
        """`[num_envs, K]`, which candidates there are."""
        counts = np.array([len(one.shown) for one in self._episodes])
        return np.arange(self.rules.candidates) < counts[:, None]

    def _observe(self) -> Observation:
        each = [one.observe() for one in self._episodes]
        return {key: np.stack([one[key] for one in each]) for key in each[0]}

    def _infos(self, whose: Any) -> dict[str, Any]:
        """Gymnasium's form of batched infos: every `key` has a `_key` that says for whom it holds."""
        present = np.asarray(whose, bool)
        each = [one.describe() for one in self._episodes]
        arrays = {key: np.array([one[key] for one in each]) for key in each[0]}
        return arrays | {f"_{key}": present.copy() for key in arrays}
