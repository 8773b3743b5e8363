"""The page of claims says what the committed results say, and its verdicts follow from intervals."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import less  # noqa: E402
import seeds  # noqa: E402

from kv_gym.evaluation.rows import read_result  # noqa: E402
from kv_gym.files import MODEL  # noqa: E402
from kv_gym.models import load_model  # noqa: E402
from kv_gym.reference.generator import TASKS  # noqa: E402


def test_the_page_is_current():
    page = seeds.page(ROOT / seeds.RESULTS)
    assert (ROOT / seeds.PAGE).read_text() == page, "run `python benchmarks/seeds.py --page`"
    trained = read_result(ROOT / seeds.RESULTS / "less.json")["training"]
    of_less = 2 * len(less.BUDGETS) * sum(map(len, trained.values()))
    verdicts = page.count("| yes |") + page.count("| no |") + page.count("| open |")
    assert verdicts == len(seeds.claims()) + 7 + of_less + len(TASKS)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.01, 0.2, 0.0, "yes"), (-0.2, -0.01, 0.0, "no"), (-0.1, 0.1, 0.0, "open"),
        (-0.01, 0.01, -0.02, "yes"), (-0.2, -0.03, -0.02, "no"), (0.01, 0.2, 0.1, "open"),
    ],
)  # fmt: skip
def test_verdicts(low, high, margin, verdict):
    assert seeds._verdict(low, high, margin) == verdict


def test_keydiff_on_small_sets():
    found = seeds.keydiff_on_small_sets(sets=20, keys=6, kept=3)
    assert found["best"] <= found["keydiff"] < found["mean"] and 0 < found["optimal"] <= 1
    assert seeds.keydiff_on_small_sets(sets=20, keys=4, kept=4)["optimal"] == 1


@pytest.mark.slow
def test_a_fact_that_eviction_loses_stays_in_two_bits():
    """MiKV on one context of eight facts, each asked alone; the cache that drops has a quarter more bytes."""
    if not MODEL.is_dir():
        pytest.skip("the reference model is not in this checkout")
    found = seeds.facts_kept(*load_model(MODEL), contexts=1)
    assert found["facts"] == 8 and found["kept"] >= 4 and found["lost_by_tier_alone"] == 0
