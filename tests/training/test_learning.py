"""Every agent learns a ranking that is known, to a threshold that an untrained policy is far from."""

import numpy as np
import pytest
from known_traces import write_known_traces
from stable_baselines3 import A2C, PPO, SAC

from kv_gym.envs import KVEvictVecEnv
from kv_gym.evaluation.measure import replay
from kv_gym.policies import make_policy
from kv_gym.traces import open_traces
from kv_gym.training import train
from kv_gym.training.registry import learner_class, list_agents

SETTINGS = {"hidden": 16, "rate": 0.02, "every": 20, "progress": False}
STEPS = {"distill": 80, "expected": 60, "foresight": 160, "grpo": 40, "joint": 60, "kvzap": 60, "ppo": 25, "rloo": 120}
FROM_TRACES = [agent for agent in list_agents() if not getattr(learner_class(agent), "needs_model", False)]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


def way_to_the_oracle(policy, traces):
    """0: as good as a random order; 1: as good as the best ranking, at a quarter of the slots."""
    policies = {"learned": policy, "oracle": make_policy("oracle"), "random": make_policy("random")}
    rows = replay(policies, open_traces(traces).select(split="test"), [0.25], sinks=0, recent=0)
    kept = {row["policy"]: row["utility_kept"] for row in rows}
    return (kept["learned"] - kept["random"]) / (kept["oracle"] - kept["random"])


def test_every_agent_has_a_threshold():
    assert set(STEPS) == set(FROM_TRACES)


@pytest.mark.parametrize("agent", FROM_TRACES)
def test_an_agent_learns_the_known_ranking(traces, tmp_path, agent):
    untrained = train(agent, traces, tmp_path / "untrained", steps=1, **(SETTINGS | {"rate": 0.0}))
    trained = train(agent, traces, tmp_path / "trained", steps=STEPS[agent], **SETTINGS)
    assert way_to_the_oracle(untrained, traces) < 0.5
    assert way_to_the_oracle(trained, traces) > 0.9


def test_foresight_learns_from_its_own_evictions_alone(traces, tmp_path):
    """Its second stage from scratch, without the golden order before it."""
    policy = train("foresight", traces, tmp_path / "policy", steps=80, distill=0.0, **SETTINGS)
    assert way_to_the_oracle(policy, traces) > 0.9


def test_one_ranking_of_all_heads_learns_by_reinforcement_too(traces, tmp_path):
    policy = train("grpo", traces, tmp_path / "policy", steps=40, ranking="joint", **SETTINGS)
    assert policy.comparable and way_to_the_oracle(policy, traces) > 0.9


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (PPO, {"n_steps": 8, "batch_size": 16}),
        (A2C, {"n_steps": 8}),
        (SAC, {"learning_starts": 16, "batch_size": 16, "buffer_size": 200}),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"budget": 0.25}])
def test_any_algorithm_with_a_box_action_runs_unchanged(traces, algorithm, settings, mode):
    env = KVEvictVecEnv(4, traces=traces, **mode)
    agent = algorithm("MultiInputPolicy", env, device="cpu", seed=0, **settings)
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    agent.learn(64)
    moved = [not p.equal(q) for p, q in zip(agent.policy.parameters(), before, strict=True)]
    actions, _ = agent.predict(env.reset())
    assert any(moved) and agent.num_timesteps == 64
    assert actions.shape == (4, 40) and np.isfinite(actions).all() and np.abs(actions).max() <= 1
    assert all(bool(parameter.isfinite().all()) for parameter in agent.policy.parameters())
