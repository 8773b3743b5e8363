"""Summaries against numbers worked out by hand."""

from statistics import fmean

import pytest
from slow_statistics import row

from kv_gym.evaluation.summary import best_heuristics, smallest_budgets, summarise


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
