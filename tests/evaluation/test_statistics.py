"""Statistics against numbers worked out by hand, published tables, and slow loops."""

import math
import random

import pytest
import torch
from slow_statistics import row, slow_auc, slow_ranks, slow_spearman

from kv_gym.evaluation.statistics import (
    auc,
    average_ranks,
    mean_interval,
    over_contexts,
    over_seeds,
    paired_difference,
    smallest_sufficient_budget,
    spearman,
    student_t,
)


def test_students_interval_over_seeds_by_hand():
    # mean 2, standard deviation 1, t with two degrees of freedom is 4.302653
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.over) == (2.0, "seeds")
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5, abs=1e-4) == 2 - found.low


def test_one_seed_has_no_width():
    assert (over_seeds([0.7]).low, over_seeds([0.7]).high) == (0.7, 0.7)


def test_contexts_are_drawn_whole():
    """Against a loop that draws contexts one by one with another generator."""
    parts, wholes = [4, 0, 4, 1, 3, 2, 4, 0], [4, 4, 4, 4, 8, 4, 4, 2]
    stream, ratios = random.Random(3), []
    for _ in range(20_000):
        drawn = [stream.randrange(8) for _ in range(8)]
        ratios.append(sum(parts[i] for i in drawn) / sum(wholes[i] for i in drawn))
    ratios.sort()
    found = over_contexts(parts, wholes)
    assert found.mean == pytest.approx(18 / 34)
    assert found.low == pytest.approx(ratios[500], abs=0.015) and found.high == pytest.approx(ratios[-500], abs=0.015)


def test_contexts_that_do_not_differ_leave_no_doubt():
    assert over_contexts([2, 2, 2], [4, 4, 4]) == over_contexts([2, 2], [4, 4])
    assert over_contexts([2, 2, 2], [4, 4, 4]).low == over_contexts([2, 2, 2], [4, 4, 4]).high == 0.5


def test_a_constant_difference_is_certain_however_contexts_vary():
    ours, theirs = row("a", 0.5, [4, 2, 3, 1]), row("b", 0.5, [3, 1, 2, 0])
    found = paired_difference([ours], [theirs])
    assert (found.mean, found.low, found.high, found.over) == (0.25, 0.25, 0.25, "contexts")
    assert ours["accuracy"] - theirs["accuracy"] == found.mean


def test_a_difference_joins_the_spread_of_seeds():
    # seeds answer 12 and 8 of 16: mean 10, so 0.625, and t with one degree of freedom is 12.706205
    ours = [row("a", 0.5, [3, 3, 3, 3], seed=0), row("a", 0.5, [2, 2, 2, 2], seed=1)]
    found = paired_difference(ours, [row("b", 0.5, [2, 2, 2, 2])])
    half = 12.706205 * 0.25 / 2**0.5 / 2**0.5
    assert found.mean == pytest.approx(0.125) and found.over == "seeds and contexts"
    assert found.high - found.mean == pytest.approx(half, abs=1e-4) == found.mean - found.low


def test_other_contexts_cannot_be_paired_difference():
    assert paired_difference([row("a", 0.5, [1, 2])], [row("b", 0.5, [1, 2, 3])]) is None
    assert paired_difference([row("a", 0.5, [1, 2], contexts=None)], [row("b", 0.5, [1, 2])]) is None


def test_the_walk_down_the_budgets_ends_at_the_first_that_fails():
    losses = {1 / 8: 0.005, 1 / 2: 0.001, 1 / 6: 0.02, 1 / 4: 0.01}
    smallest = [smallest_sufficient_budget((b, loss <= most) for b, loss in losses.items()) for most in (0.01, 0.03, 0)]
    assert smallest == [1 / 4, 1 / 8, None]  # 1/8 was lucky


def test_shares_and_slots_are_walked_apart():
    assert smallest_sufficient_budget([(16, False), (0.5, True), (64, False)]) == 0.5
    assert smallest_sufficient_budget([(16, True), (0.5, False), (64, True)]) == 16
    assert smallest_sufficient_budget([(1, True), (1.0, False)]) == 1


def test_ranks_with_ties_equal_counting():
    draw = random.Random(0)
    for _ in range(20):
        scores = [[float(draw.randint(0, 5)) for _ in range(12)] for _ in range(3)]
        worth = [[float(draw.randint(0, 3)) for _ in range(12)] for _ in range(3)]
        wanted = [[x > 1 for x in row] for row in worth]
        torch.testing.assert_close(
            average_ranks(torch.tensor(scores)), torch.tensor([slow_ranks(s) for s in scores]).double()
        )
        found = spearman(torch.tensor(scores), torch.tensor(worth))
        assert found.tolist() == pytest.approx([slow_spearman(s, w) for s, w in zip(scores, worth, strict=True)])
        found = auc(torch.tensor(scores), torch.tensor(wanted))
        assert found.tolist() == pytest.approx([slow_auc(s, w) for s, w in zip(scores, wanted, strict=True)])
    assert auc(torch.ones(1, 4), torch.tensor([[True, False, True, False]])).item() == 0.5
    assert math.isnan(auc(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool)).item())
    assert math.isnan(spearman(torch.ones(1, 4), torch.arange(4.0)[None]).item())


def test_students_t_and_the_interval():
    # published tables
    for degrees, quantile in {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}.items():
        assert student_t(degrees) == pytest.approx(quantile, abs=6e-4)
    assert mean_interval([1.0, 2.0, math.nan, 6.0]) == (
        3.0,
        pytest.approx(4.302653 * math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)),
    )
    assert mean_interval([2.0]) == (2.0, None) and mean_interval([math.nan]) == (None, None)
