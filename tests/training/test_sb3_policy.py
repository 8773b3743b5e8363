"""Rankings as actions of Stable-Baselines3: the distribution, the policy and the buffer of decisions."""

import itertools

import numpy as np
import pytest
import torch
from env_traces import random_contexts
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize

from kv_gym.envs import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.training.plackett_luce import PADDING_SCORE
from kv_gym.training.sb3_policy import DecisionBuffer, PrefixDistribution, RankingPolicy, stages_of

MODES = [{}, {"heads": "joint"}, {"budget": 4}]


def action(*ranking):
    """Ranks scaled to [-1, 1] of a ranking of slots, best first."""
    ranks = torch.empty(1, len(ranking))
    ranks[0, list(ranking)] = torch.linspace(1, -1, len(ranking))
    return ranks


def test_the_probabilities_of_all_rankings_sum_to_one_beside_a_padded_slot():
    scores = torch.tensor([[0.5, -1.0, 2.0, PADDING_SCORE, 0.1]])
    whole = PrefixDistribution(5, False).proba_distribution(scores, torch.tensor([4]))
    total = sum(whole.log_prob(action(*ranking, 3)).exp().item() for ranking in itertools.permutations((0, 1, 2, 4)))
    assert total == pytest.approx(1, abs=1e-5)
    two = PrefixDistribution(3, True).proba_distribution(scores, torch.tensor([2]))
    pairs = {two.log_prob(action(*r, 3)).sum().exp().item() for r in itertools.permutations((0, 1, 2, 4))}
    assert sum(pairs) == pytest.approx(1, abs=1e-5) and len(pairs) == 12  # the order behind the prefix says nothing
    first = torch.tensor([0.5, -1.0, 2.0, 0.1]).softmax(0)[2].log().item()
    assert two.log_prob(action(2, 0, 1, 4, 3))[0].tolist() == pytest.approx(
        [first, torch.tensor([0.5, -1.0, 0.1]).softmax(0)[0].log().item(), 0]
    )


def test_samples_are_rankings_that_clipping_does_not_change():
    torch.manual_seed(0)
    distribution = PrefixDistribution(300, False).proba_distribution(torch.randn(2, 600) * 5, torch.tensor([300, 10]))
    for actions in (distribution.sample(), distribution.mode()):
        assert actions.abs().max() <= 1 and all(len(row.unique()) == 600 for row in actions)
    assert torch.equal(distribution.mode().argsort(-1), distribution.scores.argsort(-1))


@pytest.mark.parametrize("settings", MODES)
def test_the_policy_scores_each_slot_with_the_network_of_its_head(settings):
    env = KVEvictVecEnv(3, traces=random_contexts(), **settings)
    agent = PPO(RankingPolicy, env, policy_kwargs={"hidden": 8, "prefix": 0.5}, device="cpu", seed=0)
    observation = env.reset()
    distribution = agent.policy.get_distribution(obs_as_tensor(observation, "cpu"))
    heads = np.broadcast_to(observation["head"].reshape(3, -1), observation["mask"].shape)
    scorer = agent.policy.scorer
    for row, slot in itertools.product(range(3), range(0, observation["mask"].shape[1], 5)):
        position, n = observation["position"][row, slot], observation["position"][row].max() + 1
        if not 1 <= position < n - 1:  # absent, or protected
            assert distribution.scores[row, slot] == PADDING_SCORE
            continue
        place = torch.tensor([position, n - 1 - position]).log1p() / 4
        x = torch.cat([torch.from_numpy(observation[name][row, slot]) for name in ("key", "value")] + [place])
        head = int(heads[row, slot])
        score = scorer(x.view(1, 1, -1), slice(head, head + 1))
        assert distribution.scores[row, slot].item() == pytest.approx(score.item(), abs=1e-5)


@pytest.mark.parametrize("settings", MODES)
def test_the_buffer_gives_back_what_the_environment_showed(settings):
    env = KVEvictVecEnv(3, traces=random_contexts(), index=True, **settings)
    size, stages = env.action_space.shape[0], 4
    buffer = DecisionBuffer(5, env.observation_space, env.action_space, n_envs=3, gamma=0.0, stages=stages)
    buffer.slots = env.get_attr("slots")[0]
    rng, stored = np.random.default_rng(0), []
    env.seed(0)
    observation = env.reset()
    for _ in range(5):
        actions = rng.uniform(-1, 1, (3, size)).astype(np.float32)
        after, rewards, dones, _ = env.step(actions)
        log_probs = torch.from_numpy(rng.normal(size=(3, stages)).astype(np.float32))
        buffer.add(observation, actions, rewards, np.zeros(3), torch.full((3, 1), 0.25), log_probs)
        stored += [({k: v[i] for k, v in observation.items()}, actions[i], log_probs[i], rewards[i]) for i in range(3)]
        observation = after
    buffer.compute_returns_and_advantage(torch.zeros(3), dones)
    np.random.seed(0)
    found = 0
    for batch in buffer.get(4):
        for row in range(len(batch.actions)):
            (match,) = [s for s in stored if np.array_equal(s[1], batch.actions[row])]
            for name, array in match[0].items():
                np.testing.assert_array_equal(batch.observations[name][row].numpy(), array)
            assert torch.equal(batch.old_log_prob[row], match[2])
            assert batch.advantages[row, 0].item() == pytest.approx(match[3] - 0.25, abs=1e-6)
            assert batch.returns[row].item() == pytest.approx(match[3], abs=1e-6)
            found += 1
    assert found == 15


def test_a_large_rollout_needs_less_than_a_gigabyte():
    """2,048 steps of 16 environments with 1,024 slots of head dimension 64."""
    slots, dim = 1024, 64
    space = spaces.Dict(
        key=spaces.Box(-1, 1, (slots, dim), np.float32), value=spaces.Box(-1, 1, (slots, dim), np.float32),
        position=spaces.Box(-1, 2**24, (slots,), np.float32), mask=spaces.Box(0, 1, (slots,), np.int8),
        head=spaces.Discrete(12), decision=spaces.Box(0, 2**31 - 1, (1,), np.int32),
    )  # fmt: skip
    actions = spaces.Box(-1, 1, (slots,), np.float32)
    buffer = DecisionBuffer(2048, space, actions, n_envs=16, stages=stages_of(space, 0.5))
    assert 2048 * 16 * (slots * 4 + slots // 2 * 4) < buffer.nbytes < 1e9  # actions and log-probabilities at least
    buffer.cached = buffer.swap_and_flatten(buffer.cached)
    assert buffer.nbytes < 1e9


def test_a_buffer_without_decisions_or_environment_is_refused():
    env = KVEvictVecEnv(2, traces=random_contexts())
    with pytest.raises(UserError, match="index=True"):
        PPO(RankingPolicy, env, rollout_buffer_class=DecisionBuffer, device="cpu")
    env = KVEvictVecEnv(2, traces=random_contexts(), index=True)
    agent = PPO(RankingPolicy, env, n_steps=4, batch_size=8, rollout_buffer_class=DecisionBuffer, device="cpu")
    with pytest.raises(UserError, match=r"agent\.rollout_buffer\.slots = env\.get_attr"):
        agent.learn(8)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("settings", MODES)
def test_stock_algorithms_take_the_policy_with_and_without_the_buffer(algorithm, settings, tmp_path):
    """One log-probability per action; the weights move alike whichever buffer remembers the observations."""
    weights = []
    for buffer in (None, DecisionBuffer):
        env = KVEvictVecEnv(4, traces=random_contexts(), index=True, **settings)
        agent = algorithm(
            RankingPolicy, env, n_steps=4, policy_kwargs={"hidden": 8, "prefix": settings.get("budget", 0.5)}, seed=0,
            device="cpu", rollout_buffer_class=buffer, **({"batch_size": 8} if algorithm is PPO else {}),
        )  # fmt: skip
        if buffer:
            agent.rollout_buffer.slots = env.get_attr("slots")[0]
        before = agent.policy.scorer.weights[0].detach().clone()
        agent.learn(32)
        assert not torch.equal(agent.policy.scorer.weights[0], before)
        weights.append(agent.policy.scorer.weights[0].detach())
    assert torch.allclose(*weights, atol=1e-6)
    agent.save(tmp_path / "agent")
    assert (tmp_path / "agent.zip").stat().st_size < 200_000  # the traces are not in it
    again = algorithm.load(tmp_path / "agent", device="cpu")
    observation = env.reset()
    np.testing.assert_array_equal(*(one.predict(observation, deterministic=True)[0] for one in (agent, again)))


def test_every_draw_is_clipped_alone():
    env = KVEvictVecEnv(4, traces=random_contexts(), index=True)
    stages = stages_of(env.observation_space, 0.5)
    assert stages == 8  # half of the longest context
    agent = PPO(
        RankingPolicy, env, n_steps=4, batch_size=16, n_epochs=3, seed=0, device="cpu", learning_rate=0.1,
        policy_kwargs={"hidden": 8, "per_stage": True}, rollout_buffer_class=DecisionBuffer,
        rollout_buffer_kwargs={"stages": stages},
    )  # fmt: skip
    agent.rollout_buffer.slots = env.get_attr("slots")[0]
    agent.learn(16)
    (batch,) = agent.rollout_buffer.get(16)
    _, log_prob, entropy = agent.policy.evaluate_actions(batch.observations, batch.actions)
    assert log_prob.shape == batch.old_log_prob.shape == (16, stages) and entropy.shape == (16,)
    n = batch.observations["mask"].sum(-1)
    drawn = n // 2 - 2  # half of the context, less the two protected tokens
    for row in range(16):
        assert (log_prob[row] != 0).sum() == drawn[row] == (batch.old_log_prob[row] != 0).sum()


def test_normalised_positions_are_refused():
    env = KVEvictVecEnv(3, traces=random_contexts())
    settings = {"n_steps": 4, "batch_size": 4, "policy_kwargs": {"hidden": 8}, "device": "cpu"}
    PPO(RankingPolicy, VecNormalize(env, norm_obs_keys=["key", "value"]), **settings).learn(12)
    agent = PPO(RankingPolicy, VecNormalize(env, norm_obs_keys=["key", "value", "position"]), **settings)
    with pytest.raises(UserError, match=r"not token numbers.*VecNormalize\(env, norm_obs_keys=\['key', 'value'\]\)"):
        agent.learn(12)


def test_the_divergence_of_two_rankings_is_that_of_the_enumeration():
    """What algorithms with a trust region ask of Stable-Baselines3, and its gradient of second order."""
    torch.manual_seed(0)
    scores, other = torch.tensor([[0.5, -1.0, 2.0]]), torch.tensor([[0.0, 0.3, 0.1]])
    mask = torch.tensor([2])
    p, q = (PrefixDistribution(2, False).proba_distribution(x, mask) for x in (scores, other))
    expected = sum(
        p.log_prob(action(*r)).exp().item() * (p.log_prob(action(*r)) - q.log_prob(action(*r))).item()
        for r in itertools.permutations(range(3))
    )
    count = mask.expand(20_000)
    many = [PrefixDistribution(2, False).proba_distribution(x.expand(20_000, -1), count) for x in (scores, other)]
    assert kl_divergence(*many).mean().item() == pytest.approx(expected, rel=0.02)
    free = scores.clone().requires_grad_()
    fixed = PrefixDistribution(2, False).proba_distribution(scores, mask)
    divergence = kl_divergence(PrefixDistribution(2, False).proba_distribution(free, mask), fixed).mean()
    (gradient,) = torch.autograd.grad(divergence, free, create_graph=True)
    assert gradient.abs().max() < 1e-6
    (curvature,) = torch.autograd.grad((gradient * torch.tensor([1.0, 0.0, 0.0])).sum(), free)
    assert curvature[0, 0] > 0.01
