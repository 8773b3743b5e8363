"""The exact expected rank cost against the enumeration of all rankings."""

import itertools
import math

import pytest
import torch

from kv_gym.training.plackett_luce import expected_rank_cost


def enumerated_cost(scores, worth):
    n, cost = len(scores), 0.0
    for ranking in itertools.permutations(range(n)):
        probability, left = 1.0, list(range(n))
        for i in ranking:
            probability *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in left)
            left.remove(i)
        cost += probability * sum(worth[i] * (rank + 0.5) / n for rank, i in enumerate(ranking))
    return cost / sum(worth)


@pytest.mark.parametrize("seed", range(5))
def test_cost_equals_the_sum_over_all_rankings(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, generator=generator, dtype=torch.float64) * 2
    worth = torch.rand(5, generator=generator, dtype=torch.float64)
    assert expected_rank_cost(scores, worth).item() == pytest.approx(
        enumerated_cost(scores.tolist(), worth.tolist()), abs=1e-12
    )


def test_gradient_equals_that_of_the_enumeration():
    scores = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([0.1, 0.5, 0.0, 0.4], dtype=torch.float64)
    expected_rank_cost(scores, worth).backward()
    values, step = scores.detach().tolist(), 1e-6
    for i in range(4):
        up, down = list(values), list(values)
        up[i] += step
        down[i] -= step
        slope = (enumerated_cost(up, worth.tolist()) - enumerated_cost(down, worth.tolist())) / (2 * step)
        assert scores.grad[i].item() == pytest.approx(slope, abs=1e-7)


def test_a_random_subset_of_comparisons_is_unbiased():
    scores, worth = torch.randn(3, 12, dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64)
    exact = expected_rank_cost(scores, worth)
    subsets = [torch.tensor(s) for s in itertools.combinations(range(12), 2)]
    mean = torch.stack([expected_rank_cost(scores, worth, subset) for subset in subsets]).mean(0)
    assert torch.allclose(mean, exact, atol=1e-12)


def test_rows_without_worth_cost_nothing():
    assert expected_rank_cost(torch.randn(2, 6), torch.zeros(2, 6)).abs().max() == 0
