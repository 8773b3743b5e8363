"""Plackett-Luce against its definition and the enumeration of all rankings."""

import itertools
import math

import pytest
import torch

from kv_gym.training.plackett_luce import PADDING_SCORE, RankingStages, expected_rank_cost, sample_rankings


def enumerated_cost(scores, utility):
    n, cost = len(scores), 0.0
    for ranking in itertools.permutations(range(n)):
        probability, left = 1.0, list(range(n))
        for i in ranking:
            probability *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in left)
            left.remove(i)
        cost += probability * sum(utility[i] * (rank + 0.5) / n for rank, i in enumerate(ranking))
    return cost / sum(utility)


@pytest.mark.parametrize("seed", range(5))
def test_cost_equals_the_sum_over_all_rankings(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, generator=generator, dtype=torch.float64) * 2
    utility = torch.rand(5, generator=generator, dtype=torch.float64)
    assert expected_rank_cost(scores, utility).item() == pytest.approx(
        enumerated_cost(scores.tolist(), utility.tolist()), abs=1e-12
    )


def test_gradient_equals_that_of_the_enumeration():
    scores = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    utility = torch.tensor([0.1, 0.5, 0.0, 0.4], dtype=torch.float64)
    expected_rank_cost(scores, utility).backward()
    values, step = scores.detach().tolist(), 1e-6
    for i in range(4):
        up, down = list(values), list(values)
        up[i] += step
        down[i] -= step
        slope = (enumerated_cost(up, utility.tolist()) - enumerated_cost(down, utility.tolist())) / (2 * step)
        assert scores.grad[i].item() == pytest.approx(slope, abs=1e-7)


def test_a_random_subset_of_comparisons_is_unbiased():
    scores, utility = torch.randn(3, 12, dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64)
    exact = expected_rank_cost(scores, utility)
    subsets = [torch.tensor(s) for s in itertools.combinations(range(12), 2)]
    mean = torch.stack([expected_rank_cost(scores, utility, subset) for subset in subsets]).mean(0)
    assert torch.allclose(mean, exact, atol=1e-12)


def test_rows_without_worth_cost_nothing():
    assert expected_rank_cost(torch.randn(2, 6), torch.zeros(2, 6)).abs().max() == 0


def draws(scores, ranking):
    """Probabilities of every next draw before each stage of a ranking, slot -> probability, by the definition."""
    left = list(range(len(scores)))
    for i in ranking:
        total = sum(math.exp(scores[j]) for j in left)
        yield {j: math.exp(scores[j]) / total for j in left}
        left.remove(i)


def test_stages_tell_what_the_definition_tells():
    torch.manual_seed(0)
    scores, other = torch.randn(2, 4, dtype=torch.float64) * 2
    total = 0.0
    for ranking in itertools.permutations(range(4)):
        order = torch.tensor(ranking)
        stages, other_stages = RankingStages.of(scores, order), RankingStages.of(other, order)
        total += stages.log_prob.sum().exp().item()
        for t, (p, q) in enumerate(zip(draws(scores.tolist(), ranking), draws(other.tolist(), ranking), strict=True)):
            assert stages.log_prob[t].item() == pytest.approx(math.log(p[ranking[t]]))
            assert stages.entropy[t].item() == pytest.approx(-sum(p[j] * math.log(p[j]) for j in p), abs=1e-12)
            divergence = sum(p[j] * math.log(p[j] / q[j]) for j in p)
            assert stages.divergence(other_stages)[t].item() == pytest.approx(divergence, abs=1e-12)
    assert total == pytest.approx(1)


def test_absent_slots_change_nothing_and_have_no_gradient():
    scores = torch.tensor([0.5, -1.0, 2.0, PADDING_SCORE, PADDING_SCORE], requires_grad=True)
    with_absent = RankingStages.of(scores, torch.tensor([2, 0, 1, 4, 3]), 3)
    without = RankingStages.of(scores[:3], torch.tensor([2, 0, 1]))
    for name in ("log_prob", "entropy"):
        assert torch.allclose(getattr(with_absent, name), getattr(without, name), atol=1e-6)
    (with_absent.log_prob.sum() + with_absent.entropy.sum()).backward()
    assert scores.grad[3:].abs().max() < 1e-20 and scores.grad.isfinite().all()
    assert set(sample_rankings(scores.detach(), 50)[:, :3].flatten().tolist()) == {0, 1, 2}


def test_only_the_prefix_is_the_action():
    scores = torch.randn(6)
    one, other = (
        RankingStages.of(scores, torch.tensor(order), 2) for order in ([3, 1, 0, 2, 4, 5], [3, 1, 5, 4, 0, 2])
    )
    assert torch.allclose(one.log_prob, other.log_prob, atol=1e-6) and one.log_prob.shape == (2,)
    assert torch.allclose(one.entropy, other.entropy, atol=1e-6)


def test_samples_come_as_often_as_their_probability_says():
    torch.manual_seed(0)
    scores, count = torch.tensor([1.0, 0.0, -0.5]), 20_000
    sampled = [tuple(ranking) for ranking in sample_rankings(scores, count).tolist()]
    for ranking in itertools.permutations(range(3)):
        p = math.prod(stage[i] for stage, i in zip(draws(scores.tolist(), ranking), ranking, strict=True))
        assert abs(sampled.count(ranking) / count - p) < 5 * math.sqrt(p * (1 - p) / count)
