"""What rloo, grpo, distill and foresight are paid for, against slow references."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from env_traces import one_head, random_contexts

from kv_gym.envs import KVEvictEnv, KVEvictVectorEnv
from kv_gym.envs.rewards import budget_weights, rank_weights
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.training.distill import golden_utility
from kv_gym.training.foresight import Foresight, ForesightSettings, cut_action
from kv_gym.training.grpo import GRPOSettings, RankingGroup, group_advantage, returns_to_go
from kv_gym.training.losses import pairwise_hinge
from kv_gym.training.on_policy_states import DecisionStates, OnPolicyStates
from kv_gym.training.plackett_luce import sample_rankings
from kv_gym.training.registry import load_settings
from kv_gym.training.rloo import RLOO, RLOOSettings, leave_one_out, rank_cost_ratio


def test_rloo_pays_the_loss_of_all_budgets_over_that_of_the_ideal_order():
    worth = torch.tensor([0.5, 0.0, 0.2, 0.3])
    order = torch.tensor([[1, 0, 3, 2], [0, 3, 2, 1]])

    def lost(ranking):  # evicted at every budget from 1 to n - 1
        return sum(worth[i].item() for budget in (1, 2, 3) for i in ranking[budget:])

    expected = [lost([1, 0, 3, 2]) / lost([0, 3, 2, 1]), 1.0]
    assert rank_cost_ratio(order, worth).tolist() == pytest.approx(expected)
    assert rank_cost_ratio(order, torch.tensor([0.0, 0.0, 1.0, 0.0]))[1] == 1  # the ideal order costs nothing


def test_the_baseline_is_the_mean_of_the_others():
    reward = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(reward).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_rloo_estimates_the_gradient_of_the_expected_cost():
    """Averaged over many samples, against central differences of the enumerated expectation."""
    import itertools

    torch.manual_seed(0)
    scores, worth = torch.tensor([0.3, -0.4, 0.1]), torch.tensor([0.2, 0.7, 0.1])

    def expectation(f):
        total = 0.0
        for ranking in itertools.permutations(range(3)):
            left, p = [0, 1, 2], 1.0
            for i in ranking:
                p *= (f[i].exp() / sum(f[j].exp() for j in left)).item()
                left.remove(i)
            total += p * -rank_cost_ratio(torch.tensor([ranking]), worth).item()
        return total

    slope = torch.tensor(
        [(expectation(scores + 1e-2 * e) - expectation(scores - 1e-2 * e)) / 2e-2 for e in torch.eye(3)]
    )
    network = GroupedScorer(1, 1, 1)
    rloo = RLOO(RLOOSettings(group=60_000), 0, network)
    scores = scores.view(1, 1, 3).requires_grad_()
    rloo.loss(scores, worth.view(1, 1, 3))[0].backward()
    direction = -scores.grad.flatten()
    assert torch.nn.functional.cosine_similarity(direction, slope, dim=0) > 0.99


def test_returns_are_those_of_every_budget_above_the_stage():
    torch.manual_seed(0)
    worth, order = torch.rand(3, 7), sample_rankings(torch.zeros(3, 7), 4)
    by_budget = np.array([0, 0.5, 0.0, 2.0, 1.0, 0, 0, 0])  # of 0 to 7 slots
    weights = torch.from_numpy(rank_weights(by_budget, 0)).float()
    returns = returns_to_go(order, worth, weights)
    for k in range(4):
        for row in range(3):
            ranked, ideal = worth[row][order[k, row]], worth[row].sort(descending=True).values
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
        with pytest.raises(UserError, match=f"'{agent}': setting group is 1; expected greater than or equal to 2"):
            load_settings(agent, group=1)
    with pytest.raises(UserError, match="setting ranking is 'joint'; expected 'head'"):  # heads are cut one by one
        load_settings("foresight", ranking="joint")


def test_states_with_nothing_to_decide_teach_nothing():
    scores = torch.randn(2, 6, requires_grad=True)
    group = RankingGroup.sample(scores.detach(), scores.detach(), torch.rand(2, 6), torch.zeros(2, 6), 4)
    loss, metrics = group.loss(scores, GRPOSettings(kl=0.5, entropy=0.1))
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any() and all(float(value) == 0 for value in metrics.values())


def test_the_first_update_follows_the_score_function_and_far_ratios_do_not_count():
    torch.manual_seed(0)
    scores, worth = torch.randn(1, 6), torch.rand(1, 6)
    weights = torch.tensor([3.0, 2.0, 1.0, 0, 0, 0])
    group = RankingGroup.sample(scores, scores, worth, weights, 4)
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

    moved = (scores + torch.tensor([5.0, 0, 0, 0, 0, 0])).requires_grad_()
    loss, metrics = group.loss(moved, GRPOSettings(kl=0.0))
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


def test_the_hinge_is_the_mean_over_pairs_that_differ():
    scores, target = torch.tensor([0.3, 0.1, 0.305, 9.0]), torch.tensor([1.0, 2.0, 1.0, 7.0])
    there = torch.tensor([True, True, True, False])
    pairs = [(1, 0), (1, 2)]  # better, worse
    expected = sum(max(0.0, 0.01 - (scores[b] - scores[w]).item()) for b, w in pairs) / len(pairs)
    assert pairwise_hinge(scores, target, 0.01, there).item() == pytest.approx(expected)
    assert pairwise_hinge(scores, target, 0.01).item() < expected  # slot 3 leads all others by far
    assert pairwise_hinge(scores[:1], target[:1], 0.01) == 0


def test_the_golden_target_is_the_highest_block():
    (sequence,) = random_contexts((6,), layers=2, heads=2, continuations=2, queries=5, block=2)
    worth = golden_utility(sequence)
    for layer in range(2):
        for head in range(2):
            for slot in range(6):
                blocks = [
                    c.future[layer, head, slot, k, 1] / (2, 2, 1)[k] for c in sequence.continuations for k in range(3)
                ]
                assert worth.reshape(2, 2, 6)[layer, head, slot] == pytest.approx(max(blocks))


def states_of(worth, room, there=None):
    worth = torch.tensor(worth)
    there = torch.ones_like(worth, dtype=torch.bool) if there is None else torch.tensor(there)
    return DecisionStates(torch.zeros(*worth.shape, 1), torch.zeros(len(worth)), there, torch.tensor(room), worth)


def test_a_cut_is_drawn_from_its_cut_action_and_paid_for_what_stays():
    worth = [[4.0, 1.0, 2.0, 3.0, 9.0], [4.0, 1.0, 2.0, 3.0, 9.0], [4.0, 1.0, 2.0, 0.0, 0.0]]
    there = [[True] * 5, [True] * 5, [True, True, True, False, False]]
    sign, paid, weights = cut_action(states_of(worth, [2, 4, 3], there))
    assert sign.flatten().tolist() == [1, -1, -1]
    assert weights.sum(-1).tolist() == [2, 1, 0]  # two stay, one goes, nothing to do
    order = torch.tensor([[[4, 0, 1, 2, 3], [2, 0, 1, 3, 4], [0, 1, 2, 3, 4]]])
    returns = returns_to_go(order, paid, weights)[0]
    assert returns[0, :2].tolist() == pytest.approx([1, 1])  # the best two stay, both draws are paid for it
    assert returns[1, 0].item() == pytest.approx((19 - 2) / (19 - 1))  # slot 2 went, slot 1 should have
    assert returns[2].abs().max() == 0


@pytest.mark.parametrize("highest", [False, True])
def test_reached_states_are_those_of_the_environment(highest):
    contexts = random_contexts((16, 12), layers=2, heads=1, continuations=1, queries=7, block=3)
    reached = OnPolicyStates(contexts, 0.5, sinks=1, recent=1)
    network = GroupedScorer(2, 4, 8)

    torch.manual_seed(3)
    states = reached.draw(1, lambda inputs, heads: network(inputs, heads).detach(), highest)
    torch.manual_seed(3)
    which, block = torch.randint(2, (1,)).item(), torch.randint(3, ()).item()
    assert block == 2  # a state that two cuts led to
    context, n = contexts[which], len(contexts[which].tokens)

    env = KVEvictVectorEnv(2, contexts, budget=0.5, max_tokens=16)
    seen, _ = env.reset(options={"sequence": which, "head": [0, 1]})
    for done in range(block):
        position = torch.arange(16).expand(2, 16)
        place = torch.stack((position, n + 3 * done - 1 - position), -1).clamp(min=0).float().log1p() / 4
        inputs = torch.cat((torch.from_numpy(seen["key"]), torch.from_numpy(seen["value"]), place), -1)
        seen, *_ = env.step(network(inputs).detach().numpy())
    for row in range(2):
        left = np.flatnonzero(seen["mask"][row])
        may_go = [i for i in left if i >= 1]  # the newest context token is no longer the most recent one
        assert states.mask[row].sum() == len(may_go)
        keys = states.inputs[row, : len(may_go), :4].numpy()
        np.testing.assert_array_equal(keys, seen["key"][row][may_go])
        future = context.continuations[0].future[row, 0, :, block:, 0]
        worth = future.max(-1) if highest else future.sum(-1)
        np.testing.assert_allclose(states.utility[row, : len(may_go)], worth[may_go], rtol=1e-6)
        assert not states.utility[row, len(may_go) :].any()


def silent(context):
    """A context that nobody attends to."""
    nothing = tuple(replace(c, future=np.zeros_like(c.future)) for c in context.continuations)
    return replace(context, continuations=nothing)


def test_a_checkpoint_of_foresight_is_worth_what_the_environment_pays_it():
    contexts = random_contexts((16, 12), layers=2, heads=1, continuations=2, queries=7, block=3)
    network = GroupedScorer(2, 4, 8)
    learner = Foresight(ForesightSettings(budget=0.5), 0, network)

    env = KVEvictVectorEnv(2, contexts, budget=0.5, max_tokens=16)
    paid = []
    for which, context in enumerate(contexts):
        for continuation in range(2):
            options = {"sequence": which, "head": [0, 1], "continuation": continuation}
            seen, _ = env.reset(options=options)
            for block in range(3):
                position = torch.arange(16).expand(2, 16)
                age = len(context.tokens) + 3 * block - 1 - position
                place = torch.stack((position, age), -1).clamp(min=0).float().log1p() / 4
                inputs = torch.cat((torch.from_numpy(seen["key"]), torch.from_numpy(seen["value"]), place), -1)
                seen, reward, *_ = env.step(network(inputs).detach().numpy())
                paid += reward.tolist()
    policy = SimpleNamespace(network=network)
    assert len(set(paid)) > 12
    assert learner.reward(policy, contexts) == pytest.approx(np.mean(paid))
    assert learner.reward(policy, [silent(contexts[0])]) is None  # nothing can be lost there


def test_golden_evictions_lead_where_the_future_says():
    (context,) = random_contexts((12,), layers=1, heads=1, continuations=1, queries=4, block=2)
    reached = OnPolicyStates([context], 6 / 12, sinks=0, recent=0)
    for seed in range(8):  # until a state before the second block is drawn
        torch.manual_seed(seed)
        states = reached.draw(1, None)
        if states.mask.sum() < 12:
            break
    future = context.continuations[0].future[0, 0, :, :, 0]
    best = np.sort(future.max(-1).argsort()[-6:])
    np.testing.assert_array_equal(states.inputs[0, :6, :4].numpy(), context.keys[0, 0, best])


def test_contexts_that_lose_nothing_are_refused():
    with pytest.raises(UserError, match="no continuation of the 1 contexts loses attention"):
        OnPolicyStates([silent(random_contexts((8,))[0])], 0.5, 1, 1)
