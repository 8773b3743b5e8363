"""Stable-Baselines3 trains on the native batch, and learns what there is to learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from env_traces import context, random_contexts
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from kv_gym.envs import KVEvictVecEnv
from kv_gym.errors import UserError


def test_steps_are_those_of_sb3():
    env = KVEvictVecEnv(4, traces=random_contexts(), budget=4, group=2)
    env.seed(3)
    env.set_options({"sequence": 1})
    observation = env.reset()
    assert observation["key"].shape == (4, 16, 4)
    assert [info["sequence"] for info in env.reset_infos] == [1] * 4
    for block in range(3):
        observation, rewards, dones, infos = env.step(np.zeros((4, 16), np.float32))
        assert rewards.dtype == np.float32 and len(infos) == 4
        assert dones.tolist() == [block == 2] * 4
        assert [info["block"] for info in infos] == [block] * 4
        assert all(("terminal_observation" in info) == (block == 2) for info in infos)
    assert infos[0]["TimeLimit.truncated"] is False
    assert not infos[0]["terminal_observation"]["mask"].any()
    assert observation["mask"].sum() >= 4 * 9  # begun again, with all that is cached
    assert env.get_attr("group") == [2] * 4 and env.env_is_wrapped(VecMonitor) == [False] * 4


@pytest.mark.parametrize("settings", [{}, {"heads": "joint"}, {"budget": 4}])
def test_ppo_trains_saves_and_loads(tmp_path, settings):
    env = VecNormalize(VecMonitor(KVEvictVecEnv(4, traces=random_contexts(), **settings)), norm_obs_keys=["position"])
    agent = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    agent.learn(64)
    agent.save(tmp_path / "agent")
    other = VecMonitor(KVEvictVecEnv(2, traces=random_contexts((11, 16), seed=5), **settings))
    again = PPO.load(tmp_path / "agent", env=other, device="cpu")
    mean, _ = evaluate_policy(again, other, n_eval_episodes=6)
    assert 0 < mean <= 3
    observation = other.reset()
    actions = [one.predict(observation, deterministic=True)[0] for one in (agent, again)]
    np.testing.assert_array_equal(*actions)


def test_each_environment_has_options_of_its_own():
    env = KVEvictVecEnv(3, traces=random_contexts())
    env.seed(0)
    env.set_options([{"head": 3}, {}, {"sequence": 1, "head": 0}])
    env.reset()
    assert env.reset_infos[0]["head"] == 3
    assert (env.reset_infos[2]["sequence"], env.reset_infos[2]["head"]) == (1, 0)
    grouped = KVEvictVecEnv(4, traces=random_contexts(), group=2)
    grouped.set_options([{}, {}, {"head": 1}, {"head": 1}])
    grouped.reset()
    assert [info["head"] for info in grouped.reset_infos[2:]] == [1, 1]
    grouped.set_options([{"head": 1}, {"head": 2}, {}, {}])
    with pytest.raises(UserError, match="set the same options for all of a group"):
        grouped.reset()


def contexts_with_known_utility(contexts, n, seed):
    """Contexts whose best answer is known: a slot is attended to if the first coordinate of its value is positive."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(contexts):
        values = rng.choice([-1.0, 1.0], size=(1, 1, n, 2))
        future = 0.01 + (values[..., :1] > 0)
        made.append(replace(context(future, values=values, keys=rng.normal(size=(1, 1, n, 2))), id=str(i)))
    return made


def test_ppo_learns_a_utility_that_one_coordinate_of_the_value_decides():
    torch.manual_seed(0)
    env = KVEvictVecEnv(
        64, traces=contexts_with_known_utility(512, 6, seed=0), sinks=0, recent=0, budget_weights={3: 1.0}
    )
    held_out = VecMonitor(
        KVEvictVecEnv(
            64, traces=contexts_with_known_utility(256, 6, seed=1), sinks=0, recent=0, budget_weights={3: 1.0}
        )
    )
    agent = PPO(
        "MultiInputPolicy",
        env,
        n_steps=8,
        batch_size=256,
        n_epochs=4,
        learning_rate=3e-3,
        gamma=0.0,
        seed=0,
        device="cpu",
    )
    before, _ = evaluate_policy(agent, held_out, n_eval_episodes=512)
    agent.learn(10_000)
    after, _ = evaluate_policy(agent, held_out, n_eval_episodes=512)
    assert before < 0.75 < 0.9 < after
