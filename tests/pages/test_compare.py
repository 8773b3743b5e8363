"""`kv-gym pages info` and `simulate`, and their Python twins."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.pages import compare_page_policies, summarise_requests

SAMPLE = Path(__file__).parents[2] / "traces" / "requests" / "sample.jsonl.gz"


def run(*arguments):
    return CliRunner().invoke(app, ["pages", *map(str, arguments)])


def test_info_prints_the_summary():
    found = summarise_requests(SAMPLE)
    assert (found["requests"], found["footprint"]) == (1500, 30634)
    shown = run("info", SAMPLE).output.splitlines()
    assert "requests: 1500" in shown and "bytes: -" in shown and f"best_hit_rate: {found['best_hit_rate']}" in shown


def test_simulate_writes_rows(tmp_path):
    keys, out = tmp_path / "keys.txt", tmp_path / "rows.json"
    keys.write_text("".join(f"{key}\n" for key in np.random.default_rng(0).zipf(1.2, 4000).clip(max=10**6)))
    done = run(
        "simulate", keys, "--policies", "lru,random_page,s3_fifo:small=0.2", "--capacity", "500,1000", "--json", out
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert rows == compare_page_policies(keys, ["lru", "random_page", "s3_fifo:small=0.2"], [500, 1000])
    assert [(row["policy"], row["seed"]) for row in rows[:5]] == [
        ("lru", None), ("random_page", 0), ("random_page", 1), ("random_page", 2), ("s3_fifo:small=0.2", None)
    ]  # fmt: skip
    assert all(row["hit_rate"] == row["hits"] / row["accesses"] for row in rows)
    assert "| lru |  | 500 |" in done.output


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"capacities": ["many"]}, "no whole number"),
        ({"capacities": [1.5]}, "no whole number"),
        ({"capacities": [None]}, "no whole number"),
        ({"capacities": []}, "at least one policy"),
        ({"policies": ["lru", "lruu"]}, "did you mean 'lru'"),
        ({"seeds": 0}, "seeds is 0; expected a number from 1 to 10000"),
        ({"format": "tar"}, "request format 'tar'"),
    ],
)
def test_mistakes_are_one_sentence(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        compare_page_policies(SAMPLE, **settings)
