"""Ranking mode: rewards by hand on four tokens, and against a slow loop terminated budgets."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from env_traces import context, one_head, random_contexts

import kv_gym  # noqa: F401
from kv_gym.budgets import keep_order
from kv_gym.cache_view import CacheView
from kv_gym.envs.observations import ObservationTable
from kv_gym.envs.rewards import ascending
from kv_gym.errors import UserError


def play(traces, scores, **settings):
    env = gym.make("KVEvict-v0", traces=traces, **settings)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.asarray(scores, np.float32))
    assert terminated is True and truncated is False
    return reward, info


def test_two_budgets_by_hand():
    # budgets 1 and 2 weigh 1 and 1/2: rank 0 is utility 3/2, rank 1 is utility 1/2
    reward, info = play([one_head([0.4, 0.1, 0.3, 0.2])], [-0.5, -1, 1, 0.5], sinks=0, recent=0)
    assert reward == pytest.approx((0.3 * 1.5 + 0.2 * 0.5) / (0.4 * 1.5 + 0.3 * 0.5))
    assert info["utility_kept"] == pytest.approx((0.3 * 1.5 + 0.2 * 0.5) / 1.5)
    assert info["utility_total"] == pytest.approx(1.0)
    assert info["curve_slots"].tolist() == [2, 1, 1, 1, 1]
    np.testing.assert_allclose(info["curve"], [0.5, 0.3, 0.3, 0.3, 0.3], rtol=1e-6)


def test_uniform_budgets_by_hand():
    reward, _ = play([one_head([0.4, 0.1, 0.3, 0.2])], [-0.5, -1, 1, 0.5], sinks=0, recent=0, budget_weights="uniform")
    assert reward == pytest.approx((0.3 * 2 + 0.2) / (0.4 * 2 + 0.3))


def test_chosen_budgets_by_hand():
    # three slots weigh 1, one slot (a share of 1/4) weighs 3
    reward, _ = play(
        [one_head([0.4, 0.1, 0.3, 0.2])], [-0.5, -1, 1, 0.5], sinks=0, recent=0, budget_weights={3: 1.0, 0.25: 3.0}
    )
    assert reward == pytest.approx((3 * 0.3 + (0.3 + 0.2 + 0.4)) / (3 * 0.4 + (0.4 + 0.3 + 0.2)))


@pytest.mark.parametrize(("kept_token", "utility"), [(1, 0.1), (2, 0.3), (3, 0.2)])
def test_protected_tokens_stay_and_earn_no_reward(kept_token, utility):
    # the largest budget is 2, so that one token is protected, the sink; of the others one stays at budget 2
    scores = np.full(4, -1.0)
    scores[kept_token] = 0.0
    scores[0] = -1.0 if kept_token == 1 else 1.0  # the sink's own score does not matter
    reward, info = play([one_head([0.5, 0.1, 0.3, 0.2])], scores, sinks=1, recent=1)
    assert reward == pytest.approx(utility / 0.3)
    assert info["utility_kept"] == pytest.approx((0.5 + utility) / 1.1)
    np.testing.assert_allclose(info["curve"], [(0.5 + utility) / 1.1, *[0.5 / 1.1] * 4], rtol=1e-6)


def test_joint_ranking_by_hand():
    # one slot per head is two in all, whoever gets them
    traces = [context(np.array([[[0.6, 0.1], [0.2, 0.5]]])[..., None])]
    assert play(traces, [1, -1, 0.5, 0], heads="joint")[0] == pytest.approx((0.6 + 0.2) / (0.6 + 0.5))
    assert play(traces, [1, 0.5, 0, -1], heads="joint")[0] == pytest.approx((0.6 + 0.1) / (0.6 + 0.5))
    # ties: the newer token wins, in whatever head it is
    assert play(traces, [0, 0, 0, 0], heads="joint")[0] == pytest.approx((0.1 + 0.5) / (0.6 + 0.5))


def test_ties_go_to_the_newer_token():
    reward, _ = play([one_head([0.4, 0.1, 0.3, 0.2])], [0.0, -0.0, 0.0, -0.0], sinks=0, recent=0)
    assert reward == pytest.approx((0.2 * 1.5 + 0.3 * 0.5) / 0.75)


def test_utility_is_the_mean_over_continuations():
    futures = [np.array([4.0, 0, 0, 0])[None, None, :, None], np.array([0, 2.0, 2, 0])[None, None, :, None]]
    reward, info = play([context(futures)], [1, 0, -0.5, -1], sinks=0, recent=0)
    assert info["utility_total"] == pytest.approx(4.0)
    assert reward == pytest.approx(1.0)  # 2 before 1, and 1 before 1


def slow_reward(utility, scores, sinks, recent, weights):
    """Loop terminated budgets, `utility` and `scores` `[heads, n]`."""
    heads, n = utility.shape
    largest = max(1, n // 2)
    sinks = min(sinks, largest // 2)
    recent = min(recent, largest // 2 - sinks)
    protected = {t for t in range(n) if t < sinks or t >= n - recent}
    free = [(h, t) for h in range(heads) for t in range(n) if t not in protected]
    ranked = sorted(free, key=lambda slot: (scores[slot], slot[1], slot[0]), reverse=True)
    perfect = sorted(free, key=lambda slot: -utility[slot])
    kept = best = 0.0
    for budget in range(len(protected) + 1, largest + 1):
        weight = 1 / budget if weights == "log" else 1.0
        slots = (budget - len(protected)) * heads
        kept += weight * sum(utility[slot] for slot in ranked[:slots])
        best += weight * sum(utility[slot] for slot in perfect[:slots])
    return kept / best


@pytest.mark.parametrize("weights", ["log", "uniform"])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 1), (2, 3), (9, 9)])
def test_rewards_equal_a_loop_over_budgets(weights, sinks, recent):
    traces = random_contexts()
    rng = np.random.default_rng(1)
    for heads in ("all", "joint"):
        env = gym.make("KVEvict-v0", traces=traces, heads=heads, sinks=sinks, recent=recent, budget_weights=weights)
        for sequence, trace in enumerate(traces):
            for head in range(4) if heads == "all" else [-1]:
                env.reset(options={"sequence": sequence, "head": head})
                action = rng.uniform(-1, 1, env.action_space.shape).round(1).astype(np.float32)  # with ties
                utility = trace.utility().reshape(4, -1)
                scores = action.reshape(-1, 16)[:, : utility.shape[1]]
                utility = utility if heads == "joint" else utility[head : head + 1]
                expected = slow_reward(utility, scores, sinks, recent, weights)
                assert env.step(action)[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("heads", ["all", "joint"])
def test_the_best_ranking_earns_exactly_one(heads):
    traces = random_contexts(lengths=(40,))
    env = gym.make("KVEvict-v0", traces=traces, heads=heads, utility="attention_mean")
    _, info = env.reset(seed=3)
    utility = traces[0].utility("mean").reshape(4, -1)
    best = utility.ravel() if heads == "joint" else utility[info["head"]]
    assert env.step(best)[1] == 1.0
    env.reset(options={"head": info["head"]})
    assert env.step(-best)[1] < 0.9


@pytest.mark.parametrize("heads", ["all", "joint"])
@pytest.mark.parametrize("budget", [None, 4])
def test_padding_changes_nothing(heads, budget):
    traces = random_contexts(lengths=(16,))
    rng = np.random.default_rng(2)
    plain = gym.make("KVEvict-v0", traces=traces, heads=heads, budget=budget)
    padded = gym.make("KVEvict-v0", traces=traces, heads=heads, budget=budget, max_tokens=25)
    options = {"head": -1 if heads == "joint" else 2}
    plain.reset(seed=0, options=options), padded.reset(seed=0, options=options)
    terminated = False
    while not terminated:
        scores = rng.uniform(-1, 1, (plain.action_space.shape[0] // 16, 16)).astype(np.float32)
        padded_scores = np.concatenate((scores, np.ones((len(scores), 9), np.float32)), 1)
        _, reward, terminated, _, info = plain.step(scores.ravel())
        seen, padded_reward, _, _, padded_info = padded.step(padded_scores.ravel())
        assert padded_reward == pytest.approx(reward, rel=1e-12)
        assert padded_info["utility_kept"] == pytest.approx(info["utility_kept"], rel=1e-12)
        assert not seen["mask"].reshape(-1, 25)[:, 16:].any()


def test_the_order_is_that_of_the_budgets_package():
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (5, 12)).astype(np.float32)
    protected = rng.random((5, 12)) < 0.2
    view = CacheView.of(torch.zeros(5, 1, 12, 1), torch.zeros(5, 1, 12, 1))
    expected = keep_order(torch.from_numpy(scores)[:, None], view, torch.from_numpy(protected)[:, None])[:, 0].numpy()
    table = ObservationTable([one_head(np.ones(12))])
    order = ascending(scores, ~protected, table)[:, ::-1]
    for row in range(5):
        count = int((~protected[row]).sum())
        assert order[row, :count].tolist() == expected[row, 12 - count :].tolist()


def test_heads_without_utility_are_never_shown():
    nothing = np.zeros((1, 2, 4, 1), np.float32)
    nothing[0, 1] = 1.0
    env = gym.make("KVEvict-v0", traces=[context(nothing)])
    assert {env.reset()[1]["head"] for _ in range(20)} == {1}
    with pytest.raises(UserError, match="no episode has head 0"):
        env.reset(options={"head": 0})
    with pytest.raises(UserError, match="attention to lose"):
        gym.make("KVEvict-v0", traces=[one_head([0.0, 0, 0, 0])])


def test_scores_that_are_not_finite_are_refused():
    env = gym.make("KVEvict-v0", traces=[one_head([0.4, 0.1, 0.3, 0.2])])
    env.reset(seed=0)
    with pytest.raises(UserError, match="not finite"):
        env.unwrapped.step(np.array([0, np.nan, 0, 0], np.float32))


def test_golden_returns_of_v0():
    """v0 is frozen: a change here is a change of the environment, which would have to be v1."""
    traces = random_contexts(seed=7)
    rng = np.random.default_rng(7)
    returns = []
    for settings in ({}, {"heads": "joint", "sinks": 2}, {"budget": 0.25}, {"budget": 6, "heads": "joint"}):
        env = gym.make("KVEvict-v0", traces=traces, order="sequential", **settings)
        total, terminated = 0.0, True
        for _ in range(9):
            if terminated:
                env.reset()
            _, reward, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            total += reward
        returns.append(total)
    assert returns == pytest.approx(
        [6.803407478707678, 6.825299694171272, 1.0363198751383562, 2.585983114969059], rel=1e-9
    )
