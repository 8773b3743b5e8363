"""Rewards, baseline and gradient of `rloo`, against enumeration."""

import pytest
import torch

from kv_gym.policies.scorer import GroupedScorer
from kv_gym.training.rloo import RLOO, RLOOSettings, leave_one_out, rank_cost_ratio


def test_rloo_pays_the_loss_of_all_budgets_over_that_of_the_ideal_order():
    utility = torch.tensor([0.5, 0.0, 0.2, 0.3])
    order = torch.tensor([[1, 0, 3, 2], [0, 3, 2, 1]])

    def lost(ranking):  # evicted at every budget from 1 to n - 1
        return sum(utility[i].item() for budget in (1, 2, 3) for i in ranking[budget:])

    expected = [lost([1, 0, 3, 2]) / lost([0, 3, 2, 1]), 1.0]
    assert rank_cost_ratio(order, utility).tolist() == pytest.approx(expected)
    assert rank_cost_ratio(order, torch.tensor([0.0, 0.0, 1.0, 0.0]))[1] == 1  # the ideal order costs nothing


def test_the_baseline_is_the_mean_of_the_others():
    reward = torch.tensor([1.0, 2.0, 6.0])
    assert leave_one_out(reward).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_rloo_estimates_the_gradient_of_the_expected_cost():
    """Averaged over many samples, against central differences of the enumerated expectation."""
    import itertools

    torch.manual_seed(0)
    scores, utility = torch.tensor([0.3, -0.4, 0.1]), torch.tensor([0.2, 0.7, 0.1])

    def expectation(f):
        total = 0.0
        for ranking in itertools.permutations(range(3)):
            left, p = [0, 1, 2], 1.0
            for i in ranking:
                p *= (f[i].exp() / sum(f[j].exp() for j in left)).item()
                left.remove(i)
            total += p * -rank_cost_ratio(torch.tensor([ranking]), utility).item()
        return total

    slope = torch.tensor(
        [(expectation(scores + 1e-2 * e) - expectation(scores - 1e-2 * e)) / 2e-2 for e in torch.eye(3)]
    )
    network = GroupedScorer(1, 1, 1)
    rloo = RLOO(RLOOSettings(group=60_000), 0, network)
    scores = scores.view(1, 1, 3).requires_grad_()
    rloo.loss(scores, utility.view(1, 1, 3))[0].backward()
    direction = -scores.grad.flatten()
    assert torch.nn.functional.cosine_similarity(direction, slope, dim=0) > 0.99
