"""The demo from end to end, made small: it fits, compares with KVP and heuristics, and depends on its seed."""

import json

import pytest

from kv_gym.errors import UserError
from kv_gym.files import MODEL
from kv_gym.fit import demo

needs_model = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference model is not here")


@pytest.fixture
def small(monkeypatch):
    sizes = {"TRAINING_CONTEXTS": 24, "TOKENS": 128, "AGENT_STEPS": 40, "KVP_STEPS": 20, "TOLERANCE": 0.1}
    for name, value in (sizes | {"BUDGETS": ("1/4", "1/8")}).items():
        monkeypatch.setattr(demo, name, value)


@needs_model
@pytest.mark.slow
def test_it_ends_with_smallest_budgets_and_a_picture(small, tmp_path, capsys):
    learned = []
    for folder, seed in (("first", 0), ("again", 0), ("first", 1)):
        report = demo.demo(tmp_path / folder, seed=seed, progress=False)
        results = json.loads((tmp_path / folder / "rows.json").read_text())
        accuracy = {(row["policy"], row["budget"]): row["accuracy"] for row in results["rows"]}
        assert accuracy["full_cache", 1.0] > 0.95
        assert accuracy["learned", 0.25] > max(accuracy[name, 0.25] for name in ("random", "recency", "h2o"))
        assert {"learned", "kvp", "kvzip", "keydiff"} <= set(results["smallest_sufficient_budget"])
        learned.append([row["nll"] for row in results["rows"] if row["policy"] == "learned"])
        assert (tmp_path / folder / "accuracy.png").is_file()
        assert "Smallest cache within 10 points" in report.read_text()
    assert learned[0] == learned[1] != learned[2]
    printed = capsys.readouterr().out
    assert printed.count("question ") >= 12 and printed.count("Smallest cache within 10 points") == 3


@needs_model
def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "novel.txt").write_text("The lamp was old.")
    with pytest.raises(UserError, match="other files"):
        demo.demo(tmp_path)


def test_the_conclusion_names_learned_policy_best_heuristic_and_kvp():
    smallest = {"learned": 1 / 32, "kvp": 1 / 4, "keydiff": 1 / 8, "kvzip": 1 / 16, "random": None}
    assert demo._conclusion(smallest) == (
        "Smallest cache within 2 points of the full cache's accuracy: 1/32 for the learned policy, 1/16 for the best "
        "heuristic (kvzip), 1/4 for KVP."
    )
