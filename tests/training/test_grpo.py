"""Returns, advantages and the clipped loss of `grpo`, against slow references."""

import numpy as np
import pytest
import torch
from env_traces import one_head

from kv_gym.envs import KVEvictEnv
from kv_gym.envs.rewards import budget_weights, rank_weights
from kv_gym.errors import UserError
from kv_gym.training.grpo import GRPOSettings, RankingGroup, group_advantage, returns_to_go
from kv_gym.training.plackett_luce import sample_rankings
from kv_gym.training.registry import agent_settings


def test_returns_are_those_of_every_budget_above_the_stage():
    torch.manual_seed(0)
    utility, order = torch.rand(3, 7), sample_rankings(torch.zeros(3, 7), 4)
    by_budget = np.array([0, 0.5, 0.0, 2.0, 1.0, 0, 0, 0])  # of 0 to 7 slots
    weights = torch.from_numpy(rank_weights(by_budget, 0)).float()
    returns = returns_to_go(order, utility, weights)
    for k in range(4):
        for row in range(3):
            ranked, ideal = utility[row][order[k, row]], utility[row].sort(descending=True).values
            best = sum(by_budget[b] * ideal[:b].sum().item() for b in range(8))
            for stage in range(7):
                earned = sum(by_budget[b] * ranked[:b].sum().item() for b in range(stage + 1, 8))
                assert returns[k, row, stage].item() == pytest.approx(earned / best, abs=1e-6)


def test_the_first_return_is_the_reward_of_the_environment():
    utility = np.random.default_rng(0).random(9)
    env = KVEvictEnv([one_head(utility)], sinks=0, recent=0)
    weights = torch.from_numpy(rank_weights(budget_weights("log", 9, 0, 0)[0], 0)).float()
    order = sample_rankings(torch.zeros(9), 5)
    for ranking, returns in zip(order, returns_to_go(order, torch.from_numpy(utility).float(), weights), strict=True):
        env.reset()
        score = np.empty(9, np.float32)
        score[ranking.numpy()] = np.linspace(1, -1, 9)
        assert env.step(score)[1] == pytest.approx(returns[0].item(), rel=1e-5)


def test_equal_returns_have_no_advantage_and_a_group_of_one_is_refused():
    assert group_advantage(torch.full((4, 2, 3), 0.7)).abs().max() < 1e-6
    returns = torch.tensor([[1.0, 0.3], [2.0, 0.2], [3.0, 0.1]])
    advantage = group_advantage(returns)
    assert advantage[:, 0].tolist() == pytest.approx([-1.2247, 0, 1.2247], abs=1e-3)
    assert advantage[:, 1].tolist() == pytest.approx([0.12247, 0, -0.12247], abs=1e-3)  # a tenth is at stake there
    for agent in ("grpo", "rloo", "foresight"):
        with pytest.raises(UserError, match=f"'{agent}': group is 1; expected greater than or equal to 2"):
            agent_settings(agent, group=1)
    with pytest.raises(UserError, match="ranking is 'joint'; expected 'head'"):  # heads are cut one by one
        agent_settings("foresight", ranking="joint")


def test_states_with_nothing_to_decide_teach_nothing():
    scores = torch.randn(2, 6, requires_grad=True)
    group = RankingGroup.sample(scores.detach(), scores.detach(), torch.rand(2, 6), torch.zeros(2, 6), 4)
    loss, metrics = group.loss(scores, GRPOSettings(kl=0.5, entropy=0.1))
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any() and all(float(value) == 0 for value in metrics.values())


def test_the_first_update_follows_the_score_function_and_far_ratios_do_not_count():
    torch.manual_seed(0)
    scores, utility = torch.randn(1, 6), torch.rand(1, 6)
    weights = torch.tensor([3.0, 2.0, 1.0, 0, 0, 0])
    group = RankingGroup.sample(scores, scores, utility, weights, 4)
    assert group.advantage.shape == (4, 1, 3)
    free = scores.clone().requires_grad_()
    loss, metrics = group.loss(free, GRPOSettings(kl=0.5, clip=0.2))
    loss.backward()
    slow = scores.clone().requires_grad_()
    total = 0.0
    for k in range(4):
        left = list(range(6))
        for stage in range(3):
            pick = group.order[k, 0, stage].item()
            total = total - group.advantage[k, 0, stage] * (slow[0, pick] - slow[0, left].logsumexp(0)) / 12
            left.remove(pick)
    total.backward()
    assert torch.allclose(free.grad, slow.grad, atol=1e-6)  # the divergence from itself is flat there
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-6) and metrics["clip_share"] == 0

    changed = (scores + torch.tensor([5.0, 0, 0, 0, 0, 0])).requires_grad_()
    loss, metrics = group.loss(changed, GRPOSettings(kl=0.0))
    assert metrics["clip_share"] > 0 and metrics["kl"] > 0


def test_a_thousand_slots_with_noise_on_their_scores_are_not_clipped_draw_by_draw():
    """Of a whole ranking the ratio would leave [0.8, 1.2] in most samples; of a draw it hardly moves."""
    torch.manual_seed(0)
    scores = torch.randn(8, 1024)
    weights = torch.from_numpy(rank_weights(budget_weights("log", 1024, 0, 0)[0], 0)).float()
    group = RankingGroup.sample(scores, scores, torch.rand(8, 1024), weights, 8)
    _, metrics = group.loss(scores + 0.01 * torch.randn_like(scores), GRPOSettings())
    assert metrics["clip_share"] == 0
    from kv_gym.training.plackett_luce import RankingStages

    whole = [RankingStages.of(s.expand(group.order.shape), group.order).log_prob.sum(-1)
             for s in (scores, scores + 0.01 * torch.randn_like(scores))]  # fmt: skip
    assert (((whole[1] - whole[0]).exp() - 1).abs() > 0.2).float().mean() > 0.4
