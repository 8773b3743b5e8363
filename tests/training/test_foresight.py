"""Golden targets, the action of a cut and on-policy states, against the environment."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from env_traces import random_contexts

from kv_gym.envs import KVEvictVectorEnv
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer
from kv_gym.training.distill import golden_utility
from kv_gym.training.foresight import Foresight, ForesightSettings, cut_action
from kv_gym.training.grpo import returns_to_go
from kv_gym.training.on_policy_states import DecisionStates, OnPolicyStates


def test_the_golden_target_is_the_highest_block():
    (sequence,) = random_contexts((6,), layers=2, heads=2, continuations=2, queries=5, block=2)
    utility = golden_utility(sequence)
    for layer in range(2):
        for head in range(2):
            for slot in range(6):
                blocks = [
                    c.future[layer, head, slot, k, 1] / (2, 2, 1)[k] for c in sequence.continuations for k in range(3)
                ]
                assert utility.reshape(2, 2, 6)[layer, head, slot] == pytest.approx(max(blocks))


def states_of(utility, room, mask=None):
    utility = torch.tensor(utility)
    mask = torch.ones_like(utility, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return DecisionStates(torch.zeros(*utility.shape, 1), torch.zeros(len(utility)), mask, torch.tensor(room), utility)


def test_a_cut_is_drawn_from_its_cut_action_and_paid_for_what_stays():
    utility = [[4.0, 1.0, 2.0, 3.0, 9.0], [4.0, 1.0, 2.0, 3.0, 9.0], [4.0, 1.0, 2.0, 0.0, 0.0]]
    mask = [[True] * 5, [True] * 5, [True, True, True, False, False]]
    sign, paid, weights = cut_action(states_of(utility, [2, 4, 3], mask))
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
    on_policy = OnPolicyStates(contexts, 0.5, sinks=1, recent=1)
    network = GroupedScorer(2, 4, 8)

    torch.manual_seed(3)
    states = on_policy.draw(1, lambda inputs, heads: network(inputs, heads).detach(), highest)
    torch.manual_seed(3)
    which, block = torch.randint(2, (1,)).item(), torch.randint(3, ()).item()
    assert block == 2  # a state that two cuts led to
    context, n = contexts[which], len(contexts[which].tokens)

    env = KVEvictVectorEnv(2, contexts, budget=0.5, max_tokens=16)
    observation, _ = env.reset(options={"sequence": which, "head": [0, 1]})
    for done in range(block):
        position = torch.arange(16).expand(2, 16)
        place = torch.stack((position, n + 3 * done - 1 - position), -1).clamp(min=0).float().log1p() / 4
        inputs = torch.cat((torch.from_numpy(observation["key"]), torch.from_numpy(observation["value"]), place), -1)
        observation, *_ = env.step(network(inputs).detach().numpy())
    for row in range(2):
        cached = np.flatnonzero(observation["mask"][row])
        evictable = [i for i in cached if i >= 1]  # the newest context token is no longer the most recent one
        assert states.mask[row].sum() == len(evictable)
        keys = states.inputs[row, : len(evictable), :4].numpy()
        np.testing.assert_array_equal(keys, observation["key"][row][evictable])
        future = context.continuations[0].future[row, 0, :, block:, 0]
        utility = future.max(-1) if highest else future.sum(-1)
        np.testing.assert_allclose(states.utility[row, : len(evictable)], utility[evictable], rtol=1e-6)
        assert not states.utility[row, len(evictable) :].any()


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
            observation, _ = env.reset(options=options)
            for block in range(3):
                position = torch.arange(16).expand(2, 16)
                age = len(context.tokens) + 3 * block - 1 - position
                place = torch.stack((position, age), -1).clamp(min=0).float().log1p() / 4
                inputs = torch.cat(
                    (torch.from_numpy(observation["key"]), torch.from_numpy(observation["value"]), place), -1
                )
                observation, reward, *_ = env.step(network(inputs).detach().numpy())
                paid += reward.tolist()
    policy = SimpleNamespace(network=network)
    assert len(set(paid)) > 12
    assert learner.reward(policy, contexts) == pytest.approx(np.mean(paid))
    assert learner.reward(policy, [silent(contexts[0])]) is None  # nothing can be lost there


def test_golden_evictions_lead_where_the_future_says():
    (context,) = random_contexts((12,), layers=1, heads=1, continuations=1, queries=4, block=2)
    on_policy = OnPolicyStates([context], 6 / 12, sinks=0, recent=0)
    for seed in range(8):  # until a state before the second block is drawn
        torch.manual_seed(seed)
        states = on_policy.draw(1, None)
        if states.mask.sum() < 12:
            break
    future = context.continuations[0].future[0, 0, :, :, 0]
    best = np.sort(future.max(-1).argsort()[-6:])
    np.testing.assert_array_equal(states.inputs[0, :6, :4].numpy(), context.keys[0, 0, best])


def test_contexts_that_lose_nothing_are_refused():
    with pytest.raises(UserError, match="no continuation of the 1 contexts loses attention"):
        OnPolicyStates([silent(random_contexts((8,))[0])], 0.5, 1, 1)
