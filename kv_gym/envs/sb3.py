"""The native batches for Stable-Baselines3, whose vector environments are not Gymnasium's."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from kv_gym.envs.kv_evict_vector import KVEvictVectorEnv
from kv_gym.envs.kv_page_vector import KVPageVectorEnv
from kv_gym.errors import UserError


class NativeVecEnv(VecEnv):
    """A Gymnasium vector environment that resets within the step, as an SB3 `VecEnv`.

    A step gives four values; `infos` is a list with one dict per environment. When an episode ends its dict holds
    `terminal_observation` and `TimeLimit.truncated`, and the environment has been reset already.

    Args:
        env: the batch, with ``AutoresetMode.SAME_STEP``.

    Attributes:
        env: the Gymnasium vector environment.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self._actions = np.zeros(env.action_space.shape or (), env.action_space.dtype)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def _batch_options(self) -> dict[str, Any]:
        """The options that were set for single environments, as those of the batch: a list for each name."""
        names = dict.fromkeys(name for options in self._options for name in options)
        return {name: [options.get(name) for options in self._options] for name in names}

    def reset(self) -> Any:  # type: ignore[override]
        """Begin new episodes, with the seed and the options that were set before."""
        observation, infos = self.env.reset(seed=self._seeds[0], options=self._batch_options())
        self.reset_infos = _rows(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions `[num_envs, ...]` until :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict]]:  # type: ignore[override]
        """Observations, rewards `[num_envs]` float32, dones, and one dict of infos per environment."""
        observation, rewards, terminated, truncated, info = self.env.step(self._actions)
        ended = terminated | truncated
        rows = _rows(info, self.num_envs)
        final = _rows(info.get("final_info", {}), self.num_envs)
        for row in np.flatnonzero(ended):
            self.reset_infos[row] = rows[row]
            last = info["final_obs"][row]
            rows[row] = final[row] | {
                "terminal_observation": dict(last) if isinstance(last, dict) else last,
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
            }
        return observation, rewards.astype(np.float32), ended, rows

    def close(self) -> None:
        """Close the window, where there is one."""
        self.env.close()

    def get_images(self) -> list[np.ndarray | None]:
        """One picture per environment; needs ``render_mode="rgb_array"``."""
        pictures = self.env.render() if self.env.render_mode else None
        return list(pictures or [None] * self.num_envs)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the batch, once per environment asked for."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the batch: the environments share it."""
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the batch once, and give its result once per environment asked for."""
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """No environment of a native batch is wrapped."""
        return [False for _ in self._get_indices(indices)]


class KVEvictVecEnv(NativeVecEnv):
    """KVEvict-v0 for SB3: ``PPO("MultiInputPolicy", KVEvictVecEnv(num_envs=64, traces=...))``.

    Args:
        num_envs, traces, **settings: as :class:`~kv_gym.envs.kv_evict_vector.KVEvictVectorEnv` takes them.
    """

    def __init__(self, num_envs: int = 1, traces: Any = None, **settings: Any) -> None:
        super().__init__(KVEvictVectorEnv(num_envs, traces, **settings))

    def _batch_options(self) -> dict[str, Any]:
        group = self.env.group
        by_group = self._options[::group]
        if any(options != by_group[i // group] for i, options in enumerate(self._options)):
            raise UserError("environments of one group start in one state; set the same options for all of a group")
        names = dict.fromkeys(name for options in by_group for name in options)
        return {name: [of_group.get(name) for of_group in by_group] for name in names}


class KVPageVecEnv(NativeVecEnv):
    """KVPage-v0 for SB3: ``PPO("MultiInputPolicy", KVPageVecEnv(num_envs=16, capacity=1000, action="index"))``.

    `sb3_contrib.MaskablePPO` finds the valid actions by `action_masks`.

    Args:
        num_envs, requests, **settings: as :class:`~kv_gym.envs.kv_page_vector.KVPageVectorEnv` takes them.
    """

    def __init__(self, num_envs: int = 1, requests: Any = None, **settings: Any) -> None:
        super().__init__(KVPageVectorEnv(num_envs, requests, **settings))

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """As for every batch; of `action_masks` each environment gets its own row."""
        results = super().env_method(method_name, *method_args, indices=indices, **method_kwargs)
        if method_name != "action_masks":
            return results
        return [masks[row] for masks, row in zip(results, self._get_indices(indices), strict=True)]


def _rows(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays as the list of dicts that SB3 expects."""
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, values in infos.items():
        if not name.startswith(("_", "final_")):
            for row in np.flatnonzero(infos[f"_{name}"]):
                rows[row][name] = values[row]
    return rows
