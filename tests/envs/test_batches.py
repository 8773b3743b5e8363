"""Batches of every environment as the libraries of the field expect them: spaces, shapes, and names of infos."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

import kv_gym  # noqa: F401 (registers the environments)

NUM_ENVS = 2


@pytest.mark.parametrize("mode", [None, "sync", "async"])
@pytest.mark.parametrize("name", ["kv_gym:KVEvict-v0", "kv_gym:KVPage-v0"])
def test_shapes_of_a_batch(name, mode):
    """TorchRL stores infos beside observations under their names, so that those of one name need one shape."""
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP} if mode else {}
    env = gym.make_vec(name, num_envs=NUM_ENVS, vectorization_mode=mode, vector_kwargs=vector_kwargs)
    try:
        assert env.unwrapped.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        assert env.observation_space == batch_space(env.single_observation_space, NUM_ENVS)
        assert env.action_space == batch_space(env.single_action_space, NUM_ENVS)
        single = env.single_observation_space
        observations, infos = env.reset(seed=0)
        for _ in range(3):
            assert observations in env.observation_space
            for key in set(infos) & set(single):
                assert infos[key].shape == (NUM_ENVS, *single[key].shape), f"info and observation {key!r} differ"
            observations, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
            assert rewards.shape == terminated.shape == truncated.shape == (NUM_ENVS,)
            assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
    finally:
        env.close()
