"""`flat=True`: one array per observation, as Gymnasium's own wrapper makes it, in every form of KVEvict-v0."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO

from kv_gym.envs import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.training.sb3_policy import RankingPolicy


@pytest.mark.parametrize("settings", [{}, {"heads": "joint", "features": ("knorm",), "budget": 0.5}])
def test_flat_observations_are_those_of_the_wrapper(settings):
    flat = gym.make("KVEvict-v0", flat=True, **settings)
    wrapped = gym.wrappers.FlattenObservation(gym.make("KVEvict-v0", **settings))
    batch = gym.make_vec("KVEvict-v0", num_envs=3, flat=True, **settings)
    entries = gym.make_vec("KVEvict-v0", num_envs=3, **settings)
    assert flat.observation_space.dtype == np.float32
    assert flat.observation_space.shape == wrapped.observation_space.shape == batch.observation_space.shape[1:]
    assert np.array_equal(flat.reset(seed=1)[0], wrapped.reset(seed=1)[0].astype(np.float32))
    several, of_entries = batch.reset(seed=1)[0], entries.reset(seed=1)[0]
    for _ in range(3):
        single = entries.single_observation_space
        rows = [{name: array[row] for name, array in of_entries.items()} for row in range(3)]
        assert np.array_equal(several, [gym.spaces.flatten(single, row).astype(np.float32) for row in rows])
        assert several in batch.observation_space and several.dtype == np.float32
        action = batch.action_space.sample()
        several, reward, ended, _, info = batch.step(action)
        of_entries, expected, *_ = entries.step(action)
        assert np.array_equal(reward, expected)
    if not settings:
        assert ended.all() and info["final_obs"][0] in batch.single_observation_space
    action = flat.action_space.sample()
    assert flat.step(action)[1] == wrapped.step(action)[1]


def test_stock_policies_of_sb3_take_flat_observations():
    env = KVEvictVecEnv(4, flat=True)
    settings = {"n_steps": 2, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [2]}, "device": "cpu"}
    agent = PPO("MlpPolicy", env, **settings).learn(8)
    assert agent.predict(env.reset())[0].shape == (4, env.action_space.shape[0])
    with pytest.raises(UserError, match=r"RankingPolicy reads the entries .* was given Box: make .* without flat=True"):
        PPO(RankingPolicy, env, device="cpu")
    with pytest.raises(UserError, match="index=True adds an entry to it: give one"):
        KVEvictVecEnv(4, flat=True, index=True)
