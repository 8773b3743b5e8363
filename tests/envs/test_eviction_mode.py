"""Eviction mode: rewards by hand, and the first cut against the budgets package."""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import pytest
import torch
from env_traces import context, random_contexts

import kv_gym  # noqa: F401
from kv_gym.budgets import select
from kv_gym.cache_view import CacheView
from kv_gym.policies import Policy

FUTURE = np.array(
    [
        # attention of block 0, 1, 2
        [0.1, 0.4, 0.0],
        [0.2, 0.3, 0.5],
        [0.3, 0.2, 0.1],
        [0.4, 0.1, 0.4],
    ]
)


def test_three_blocks_by_hand():
    env = gym.make("KVEvict-v0", traces=[context(FUTURE[None, None])], budget=2, sinks=0, recent=0)
    observation, _ = env.reset(seed=0)
    assert observation["mask"].tolist() == [1, 1, 1, 1]

    # no new token yet: two of four slots stay, 1 and 3
    observation, reward, terminated, truncated, info = env.step(np.array([-1, 1, 0, 0.5], np.float32))
    assert reward == pytest.approx((0.2 + 0.4) / 1.0)
    assert (terminated, truncated, info["slots"], info["block"]) == (False, False, 2, 0)
    assert observation["mask"].tolist() == [0, 1, 0, 1]
    assert observation["position"].tolist() == [-1, 1, -1, 3]
    assert observation["key"].tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]

    # one new token takes half of the budget; token 0 scores best but has gone for good
    observation, reward, terminated, _, info = env.step(np.array([1, 0.5, 1, 0.6], np.float32))
    assert reward == pytest.approx(0.1 / 1.0)
    assert (terminated, info["slots"]) == (False, 1)
    assert observation["mask"].tolist() == [0, 0, 0, 1]

    # two new tokens do not take more than half
    observation, reward, terminated, truncated, info = env.step(np.array([1, 1, 1, -1], np.float32))
    assert reward == pytest.approx(0.4 / 1.0)
    assert (terminated, truncated, info["slots"]) == (True, False, 1)
    assert not observation["mask"].any() and not observation["key"].any()


def test_protection_by_hand():
    future = np.array([[0.3, 0.3], [0.1, 0.2], [0.1, 0.1], [0.1, 0.1], [0.2, 0.1], [0.2, 0.2]])
    env = gym.make("KVEvict-v0", traces=[context(future[None, None])], budget=4, sinks=1, recent=1)
    env.reset(seed=0)
    # the first and the last token are protected, two of the four others stay: 1 and 4
    observation, reward, *_, info = env.step(np.array([-1, 1, 0, 0, 0.5, -1], np.float32))
    assert observation["mask"].tolist() == [1, 1, 0, 0, 1, 1]
    assert reward == pytest.approx((0.1 + 0.2) / (0.1 + 0.1 + 0.1 + 0.2))
    assert info["utility_kept"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.2) / 1.0)
    # the new token is now the recent one: the last context token competes, and two of 1, 4, 5 stay
    *_, reward, terminated, _, info = env.step(np.array([-1, 0, 1, 1, 0.5, 1], np.float32))
    assert reward == pytest.approx((0.1 + 0.2) / (0.2 + 0.1 + 0.1 + 0.1 + 0.2))
    assert info["slots"] == 3 and terminated


def test_joint_by_hand():
    # two heads of two tokens, one block; budget 1 per head is two slots in all
    future = np.array([[0.6, 0.1], [0.2, 0.5]])[None, ..., None]
    env = gym.make("KVEvict-v0", traces=[context(future)], budget=1, heads="joint", sinks=0, recent=0)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.array([1, 0.5, 0, -1], np.float32))
    assert reward == pytest.approx((0.6 + 0.1) / 1.4)
    assert terminated and info["slots"] == 2


def test_a_budget_above_the_length_evicts_nothing():
    env = gym.make("KVEvict-v0", traces=random_contexts(), budget=1000)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        assert reward == 1.0 and info["utility_kept"] == 1.0


def test_long_joint_rows_lose_nothing_either():
    env = gym.make("KVEvict-v0", traces=random_contexts(lengths=(2500,)), budget=2500 * 2, heads="joint")
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == 1.0


@dataclass(frozen=True)
class FixedScores(Policy):
    """Scores from outside."""

    scores: torch.Tensor | None = None

    def score(self, view):
        return self.scores


@pytest.mark.parametrize("budget", [2, 5, 0.5, 0.25])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 1), (2, 7)])
def test_the_first_cut_is_that_of_the_budgets_package(budget, sinks, recent):
    (trace,) = random_contexts(lengths=(16,))
    env = gym.make("KVEvict-v0", traces=[trace], budget=budget, sinks=sinks, recent=recent)
    rng = np.random.default_rng(0)
    for head in range(4):
        env.reset(options={"head": head})
        scores = rng.uniform(-1, 1, 16).round(1).astype(np.float32)  # with ties
        observation, *_ = env.step(scores)
        slots = budget if isinstance(budget, int) else int(16 * budget)
        view = CacheView.of(torch.zeros(1, 1, 16, 4), torch.zeros(1, 1, 16, 4), budget=slots)
        kept = select(FixedScores(torch.from_numpy(scores)[None, None]), view, sinks, recent)[0, 0]
        assert observation["mask"].astype(bool).tolist() == kept.tolist()


def test_continuations_are_episodes_of_their_own():
    ones = np.ones((1, 1, 4, 1))
    env = gym.make("KVEvict-v0", traces=[context([ones, np.ones((1, 1, 4, 3))])], budget=2, sinks=0, recent=0)
    lengths = []
    for continuation in (0, 1):
        _, info = env.reset(options={"continuation": continuation})
        assert info["continuation"] == continuation
        steps, terminated = 0, False
        while not terminated:
            terminated = env.step(np.zeros(4, np.float32))[2]
            steps += 1
        lengths.append(steps)
    assert lengths == [1, 3]
