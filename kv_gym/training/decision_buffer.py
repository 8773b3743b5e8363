"""A rollout buffer that remembers which decisions were seen, not what they looked like.

An observation of KVEvict-v0 holds keys and values of all slots; 2,048 steps of 16 environments with 1,024 slots of
head dimension 64 would be 17 GB. With ``index=True`` the environment shows a `decision` id from which it makes the
observation again, so that the buffer keeps the id and one bit per slot.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from kv_gym.errors import UserError


class DecisionBuffer(RolloutBuffer):
    """For on-policy algorithms of Stable-Baselines3 on ``KVEvictVecEnv(..., index=True)``.

    Give it to the algorithm as ``rollout_buffer_class``, and afterwards the environment:
    ``agent.rollout_buffer.slots = env.get_attr("slots")[0]`` (an argument would be saved with the agent, and all traces
    with it).

    Attributes:
        slots: makes observations from decision ids and masks, :meth:`kv_gym.envs.KVEvictVectorEnv.slots`.
    """

    slots: Callable[..., dict[str, np.ndarray]] | None = None

    def __init__(
        self, buffer_size: int, observation_space: spaces.Dict, action_space: spaces.Box, *arguments: Any,
        stages: int = 0, **keywords: Any,
    ):  # fmt: skip
        """Make room; `stages` log-probabilities per action (0: one for all of it), the rest as in SB3.

        Raises:
            UserError: the environment does not show `decision`.
        """
        if not isinstance(observation_space, spaces.Dict) or "decision" not in observation_space.spaces:
            raise UserError("a DecisionBuffer needs an environment that shows decisions: make it with index=True")
        self._per_stage, self._size = stages, int(np.prod(action_space.shape))
        # to the buffer below, the id is the whole observation
        super().__init__(buffer_size, observation_space["decision"], action_space, *arguments, **keywords)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cached = np.zeros((self.buffer_size, self.n_envs, -(-self._size // 8)), np.uint8)
        if self._per_stage:
            self.log_probs = np.zeros((self.buffer_size, self.n_envs, self._per_stage), np.float32)

    def add(self, obs: dict[str, np.ndarray], *rest: Any) -> None:  # type: ignore[override]
        """Store a step of all environments; the arguments are those of SB3."""
        self.cached[self.pos] = np.packbits(obs["mask"].astype(bool), axis=-1)
        super().add(obs["decision"], *rest)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:
        """Random batches, whose observations are made again."""
        if not self.generator_ready:
            self.cached = self.swap_and_flatten(self.cached)
        yield from super().get(batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> DictRolloutBufferSamples:  # type: ignore[override]
        if self.slots is None:
            raise UserError(
                "the buffer was not given its environment: set agent.rollout_buffer.slots = env.get_attr('slots')[0]"
            )
        cached = np.unpackbits(self.cached[batch_inds], axis=-1, count=self._size)
        observations = self.slots(self.observations[batch_inds, 0], cached)
        log_probs, advantages = self.log_probs[batch_inds], self.advantages[batch_inds]

        def flat(array: np.ndarray) -> Tensor:
            return self.to_torch(array.flatten())

        return DictRolloutBufferSamples(
            observations=obs_as_tensor(observations, self.device),  # type: ignore[arg-type]
            actions=self.to_torch(self.actions[batch_inds]),
            old_values=flat(self.values[batch_inds]),
            # [batch, stages] and [batch, 1]: SB3's loss is then clipped stage by stage
            old_log_prob=self.to_torch(log_probs) if self._per_stage else flat(log_probs),
            advantages=self.to_torch(advantages) if self._per_stage else flat(advantages),
            returns=flat(self.returns[batch_inds]),
        )
