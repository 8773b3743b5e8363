"""Page policies in leaderboards and reports."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import compact, leaderboard, page, publish, read_rows
from kv_gym.evaluation.leaderboard.pages import PageCell
from kv_gym.evaluation.report import read_results, report
from kv_gym.evaluation.report.summaries import summaries
from kv_gym.pages import compare_page_policies, read_requests, simulate, train_pages


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("requests") / "keys.txt"
    file.write_text("".join(f"{key}\n" for key in np.random.default_rng(0).zipf(1.2, 1500).clip(max=10**6)))
    return file


def test_a_leaderboard_simulates_pages_once(keys, tmp_path, monkeypatch):
    trained, out = tmp_path / "clone-0", tmp_path / "out"
    train_pages("clone", str(keys), trained, 50, rounds=1, steps=3, decisions=50)
    pages = {
        "requests": str(keys), "capacities": [50, 100], "policies": ["lru", "random_page", "belady", "sglang_leaves"],
        "learned": {"mine": str(tmp_path / "clone-{seed}")}, "warm_up": 0.5,
    }  # fmt: skip
    with pytest.raises(UserError, match="learned policy 'mine' is not in "):
        leaderboard({"pages": [pages], "seeds": [0, 1]}, out, progress=False)
    rows = leaderboard({"pages": [pages], "seeds": [0]}, out, progress=False)
    assert [(row["policy"], row["seed"], row["budget"]) for row in rows[:5]] == [
        ("lru", None, 50), ("random_page", 0, 50), ("belady", None, 50), ("sglang_leaves", None, 50), ("mine", 0, 50)
    ]  # fmt: skip
    assert rows[0]["hit_rate"] == simulate(read_requests(keys), "lru", 50, warm_up=0.5).hit_rate and rows[0]["n"] == 750
    assert "serves prefixes only" in rows[3]["refused"] and rows[3]["hit_rate"] is None
    monkeypatch.setattr(PageCell, "measure", lambda cell: pytest.fail("measured again"))
    assert leaderboard({"pages": [pages], "seeds": [0]}, out, progress=False) == rows
    assert [row["hit_rate"] for row in read_rows(publish(rows, tmp_path / "kept")[0])] == pytest.approx(
        [row["hit_rate"] for row in rows], abs=1e-6
    )
    text = page(compact(rows))
    assert (
        "## Hit rates, pages keys, objects, last 50%" in text and f"| lru | {100 * rows[0]['hit_rate']:.2f} |" in text
    )
    roles = {point["policy"]: point["role"] for point in summaries(rows)}
    assert roles == {"lru": "heuristic", "random_page": "heuristic", "belady": "oracle", "mine": "learned"}


def test_a_report_draws_hits_over_the_capacity(keys, tmp_path):
    file = tmp_path / "rows.json"
    words = ["simulate", str(keys), "--policies", "lru,random_page,belady", "--capacity", "50,100", "--json", str(file)]
    assert CliRunner().invoke(app, ["pages", *words]).exit_code == 0
    found = read_results([file])
    assert [(row["task"], row["budget"], row["n"]) for row in found.rows[:1]] == [("pages keys, objects", 50, 1500)]
    points = {(point["policy"], point["budget"]): point for point in summaries(found.rows)}
    drawn = [row["hit_rate"] for row in compare_page_policies(keys, ["random_page"], [50])]
    assert points["random_page", 50]["hit_rate"] == pytest.approx(np.mean(drawn)) and points["lru", 100]["runs"] == 1
    text = report([file], tmp_path / "report").read_text()
    assert f"| pages keys, objects | lru | 50 | {points['lru', 50]['hit_rate']:.2%} |" in text
    html = (tmp_path / "report" / "report.html").read_text()
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert list(data["specs"]) == ["hit_rate"] and (tmp_path / "report" / "report.png").stat().st_size > 10_000
