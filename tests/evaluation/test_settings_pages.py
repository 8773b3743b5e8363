"""The pages of benchmarks/episodes.py and benchmarks/seed_settings.py say what the committed results say."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import episodes  # noqa: E402
import seed_settings  # noqa: E402

from kv_gym.evaluation.rows import read_result  # noqa: E402


def test_the_pages_are_current():
    page = episodes.page(read_result(ROOT / episodes.RESULTS))
    assert (ROOT / episodes.PAGE).read_text() == page, "run `python benchmarks/episodes.py --page`"
    page = seed_settings.page(read_result(ROOT / seed_settings.RESULTS)["rows"])
    assert (ROOT / seed_settings.PAGE).read_text() == page, "run `python benchmarks/seed_settings.py --page`"
