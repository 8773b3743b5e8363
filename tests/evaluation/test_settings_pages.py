"""The pages of benchmarks/episodes.py and benchmarks/seed_settings.py say what the committed results say."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import episodes  # noqa: E402
import seed_settings  # noqa: E402

from kv_gym.evaluation.rows import read_result  # noqa: E402


def test_the_pages_are_current():
    for benchmark in (episodes, seed_settings):
        page = benchmark.page(read_result(ROOT / benchmark.RESULTS))
        file = Path(benchmark.__file__).name
        assert (ROOT / benchmark.PAGE).read_text() == page, f"run `python benchmarks/{file} --page`"
