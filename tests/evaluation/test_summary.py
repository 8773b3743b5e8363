"""Summaries against numbers worked out by hand."""

from statistics import fmean

import pytest
from slow_statistics import row

from kv_gym.evaluation.summary import best_heuristics, join_portions, regrade, smallest_budgets, summarise


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


def portion(policy, right, first, **more):
    made = row(policy, 0.5, right, parts={"a": {"questions": 4, "correct": right[0]}}, **more)
    made["contexts"] = {str(first + number): entry for number, entry in enumerate(made["contexts"].values())}
    made["answers"] = {
        name: [[2, 0.5]] * entry[0] + [[0, 3.0]] * (4 - entry[0]) for name, entry in made["contexts"].items()
    }
    return made | {"slots": [[8.0 * len(right)]]}


def test_portions_of_a_task_become_one_row():
    rows = [portion("a", [4], 0), portion("b", [1], 0), portion("a", [2, 0], 1), portion("a", [3], 0, seed=1)]
    joined, other, seed = join_portions(rows)
    assert other is rows[1] and seed is rows[3]
    assert (joined["n"], joined["questions"], joined["accuracy"]) == (3, 12, 0.5)
    assert list(joined["contexts"]) == ["0", "1", "2"] and list(joined["answers"]) == ["0", "1", "2"]
    assert joined["parts"] == {"a": {"questions": 8, "correct": 6}}
    assert joined["slots"] == [[pytest.approx((8 + 2 * 16) / 3)]] and joined["nll"] == pytest.approx(1.5 / 12)


def test_answers_are_graded_again_by_first_tokens_and_by_what_the_full_cache_answers():
    rows = [portion("full_cache", [3, 0], 0), portion("a", [2, 1], 0), row("b", 0.5, [1])]
    rows[1]["answers"] = {"0": [[2, 0.1], [0, 4.0], [1, 1.0], [2, 0.2]], "1": [[0, 4.0]] * 4}
    of = {graded["policy"]: graded for graded in regrade(rows, first_token=True)}
    assert set(of) == {"full_cache", "a"} and of["a"]["contexts"]["0"] == [3, 4, pytest.approx(5.3)]
    assert of["a"]["accuracy"] == 3 / 8
    of = {graded["policy"]: graded for graded in regrade(rows, where_full_is_right=True)}
    assert of["full_cache"]["accuracy"] == 1 and of["a"]["contexts"] == {
        "0": [1, 3, pytest.approx(5.1)],
        "1": [0, 0, 0],
    }
    assert of["a"]["accuracy"] == 1 / 3 and of["a"]["questions"] == 3
