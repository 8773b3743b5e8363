"""Summaries against numbers worked out by hand, and against slow loops."""

import random
from statistics import fmean

import pytest

from kv_gym.evaluation.summary import (
    best_heuristics,
    over_contexts,
    over_seeds,
    paired,
    smallest_budgets,
    summarise,
)


def row(policy, budget, right, seed=None, task="t", **more):
    """A row of contexts with four questions each, `right` of which are answered right."""
    contexts = {str(number): [value, 4, 0.5] for number, value in enumerate(right)}
    return {
        "policy": policy, "seed": seed, "budget": budget, "allocation": "uniform", "evicted": "drop", "task": task,
        "accuracy": sum(right) / 4 / len(right), "nll": 0.125, "n": len(right), "questions": 4 * len(right),
        "contexts": contexts, "cache_bytes": 100 * budget, "policy_bytes": 0, "milliseconds": 1.0,
    } | more  # fmt: skip


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
    found = paired([ours], [theirs])
    assert (found.mean, found.low, found.high, found.over) == (0.25, 0.25, 0.25, "contexts")
    assert ours["accuracy"] - theirs["accuracy"] == found.mean


def test_a_difference_joins_the_spread_of_seeds():
    # seeds answer 12 and 8 of 16: mean 10, so 0.625, and t with one degree of freedom is 12.706205
    ours = [row("a", 0.5, [3, 3, 3, 3], seed=0), row("a", 0.5, [2, 2, 2, 2], seed=1)]
    found = paired(ours, [row("b", 0.5, [2, 2, 2, 2])])
    half = 12.706205 * 0.25 / 2**0.5 / 2**0.5
    assert found.mean == pytest.approx(0.125) and found.over == "seeds and contexts"
    assert found.high - found.mean == pytest.approx(half, abs=1e-4) == found.mean - found.low


def test_other_contexts_cannot_be_paired():
    assert paired([row("a", 0.5, [1, 2])], [row("b", 0.5, [1, 2, 3])]) is None
    assert paired([row("a", 0.5, [1, 2], contexts=None)], [row("b", 0.5, [1, 2])]) is None


def test_lines_join_seeds_and_compare_with_the_best_heuristic():
    rows = [
        row("full_cache", 1.0, [4, 4]), row("good", 0.5, [3, 3]), row("poor", 0.5, [1, 1]),
        row("mine", 0.5, [4, 3], seed=0), row("mine", 0.5, [3, 2], seed=1), row("odd", 0.5, [0, 0], refused="no"),
    ]  # fmt: skip
    lines = {line["policy"]: line for line in summarise(rows)}
    assert set(lines) == {"full_cache", "good", "poor", "mine"}
    mine = lines["mine"]
    assert (mine["accuracy"], mine["seeds"], mine["over"], mine["learned"]) == (0.75, 2, "seeds", True)
    assert (mine["low"], mine["high"]) == (0, 1)  # t with one degree of freedom would say more than everything
    assert mine["gain"]["against"] == "good" and mine["gain"]["mean"] == 0
    assert lines["poor"]["gain"]["mean"] == -0.5 and lines["good"]["gain"] is None
    assert lines["full_cache"]["gain"] is None and mine["cache_bytes"] == 50 and mine["nll"] == 0.125


def test_settings_that_were_not_chosen_do_not_compete():
    rows = [
        row("a", 0.5, [4, 4], recent=3), row("a", 0.5, [2, 2], chosen_on_validation=True), row("b", 0.5, [3, 3]),
        row("learned", 0.5, [4, 4], seed=0),
    ]  # fmt: skip
    assert best_heuristics(summarise(rows))["t", (False, 0.5)]["policy"] == "b"
    rows[1]["accuracy"] = 0.9
    rows[1]["contexts"] = {"0": [9, 10, 0], "1": [9, 10, 0]}
    assert best_heuristics(summarise(rows))["t", (False, 0.5)]["policy"] == "a"


def test_the_smallest_budget_has_all_larger_ones_on_its_side():
    right = {0.5: [4, 4], 0.25: [4, 4], 0.125: [4, 3], 0.0625: [4, 4]}
    rows = [row("full_cache", 1.0, [4, 4]), *(row("a", budget, values) for budget, values in right.items())]
    rows += [row("none", 0.5, [0, 4]), row("a", 0.5, [4, 4], task="without a full cache")]
    found = {(place[0], place[1]): budget for place, budget in smallest_budgets(summarise(rows)).items()}
    assert found == {("t", "a"): 0.25, ("t", "none"): None}
    found = smallest_budgets(summarise(rows), tolerance=0.3)
    assert next(budget for place, budget in found.items() if place[1] == "a") == 0.0625


def test_utility_is_a_ratio_of_sums():
    rows = [
        {"policy": "a", "seed": None, "budget": 0.5, "task": "replay", "accuracy": None, "utility_kept": 0.4,
         "contexts": {"x": [1.0, 2.0, None], "y": [1.0, 3.0, None]}, "n": 2},
    ]  # fmt: skip
    (line,) = summarise(rows, "utility_kept")
    assert line["utility_kept"] == pytest.approx(2 / 5) and line["low"] == pytest.approx(1 / 3)
    assert line["high"] == pytest.approx(1 / 2) and line["nll"] is None
    assert summarise(rows) == [] and fmean([line["low"], line["high"]]) != line["utility_kept"]
