"""`save_policy`: an agent of Stable-Baselines3 becomes a policy folder that a live cache takes."""

import pytest
import torch
from stable_baselines3 import A2C, PPO

from kv_gym import EvictingCache, make_policy, open_traces
from kv_gym.envs import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.models import load_model
from kv_gym.reference import MODEL
from kv_gym.training.sb3_policy import RankingPolicy, save_policy


def test_an_agent_of_sb3_is_exported_for_the_live_cache(tmp_path):
    env = KVEvictVecEnv(2)
    agent = A2C(RankingPolicy, env, n_steps=2, device="cpu", seed=0, policy_kwargs={"sinks": 2}).learn(4)
    folder = save_policy(agent, tmp_path / "policy")
    policy = make_policy(folder)
    recorded = open_traces()
    assert policy.protection == (2, 1) and policy.training["agent"] == "A2C" and policy.training["samples"] == 4
    assert policy.fingerprint == recorded.fingerprint
    for name, tensor in agent.policy.scorer.state_dict().items():
        assert torch.equal(policy.network.state_dict()[name], tensor)
    model, _ = load_model(MODEL, "cpu")
    with EvictingCache(model, folder, 8) as cache, torch.no_grad():
        model(torch.as_tensor(recorded[0].tokens[:40][None].astype("int64")), past_key_values=cache)
        assert cache.kept().unique().tolist() == [8]


def test_other_agents_and_traces_are_refused(tmp_path):
    stock = PPO("MlpPolicy", "CartPole-v1", n_steps=2, batch_size=2, device="cpu")
    with pytest.raises(UserError, match=r"policy is ActorCriticPolicy, and only a RankingPolicy"):
        save_policy(stock, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()
