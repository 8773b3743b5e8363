"""Generated pages say what the committed results and policies say: `python benchmarks/publish.py` writes them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_gym.evaluation.leaderboard import page, read_rows, read_spec

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import publish  # noqa: E402
import real_model  # noqa: E402
import real_model_page  # noqa: E402


@pytest.fixture
def checkout(tmp_path):
    """What the pages are made of, and the pages, as they are committed."""
    guides = ("docs/results.md", "docs/real-model.md", "docs/live-cache.md")
    pages = ("README.md", *guides, "BENCHMARK.md", "benchmarks/RESULTS.md", "agents/README.md")
    for name in (*pages, "benchmarks/results", "agents/trained"):
        source, copy = ROOT / name, tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy)
        elif source.is_file():
            shutil.copyfile(source, copy)
    return tmp_path


def stale(root, *names):
    pages = publish.pages(root)
    return {name for name in names if not publish.is_fresh(root / name, pages[root / name]())}


def test_the_benchmark_page_is_that_of_its_rows():
    rows = read_rows(ROOT / "benchmarks" / "results" / "leaderboard")
    assert bool(rows) == (ROOT / "BENCHMARK.md").is_file()
    if rows:
        assert (ROOT / "BENCHMARK.md").read_text() == page(rows)


def change(folder, **changed):
    """Change the first row of a learned policy in a folder of rows."""
    for file in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            if row["task"] == publish.TASK and row.get("seed") == 0 and row["policy"] == "joint":
                row |= changed
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                return
    raise AssertionError("no such row")


def test_a_changed_result_makes_its_pages_stale(checkout):
    results = checkout / "benchmarks" / "results"
    change(results / "headline", accuracy=0.01)
    assert stale(checkout, "docs/results.md", "README.md") == {"docs/results.md"}
    change(results / "leaderboard", accuracy=0.01)
    assert stale(checkout, "agents/README.md", "BENCHMARK.md") == {"agents/README.md", "BENCHMARK.md"}


def test_a_changed_finding_makes_its_page_stale(checkout):
    file = checkout / "benchmarks" / "results" / "transfer.json"
    data = json.loads(file.read_text())
    data["differences"][0]["difference"] += 1
    file.write_text(json.dumps(data))
    assert stale(checkout, "benchmarks/RESULTS.md", "docs/live-cache.md") == {"benchmarks/RESULTS.md"}


def test_a_changed_page_is_stale(checkout):
    for name in ("agents/README.md", "agents/trained/joint/README.md"):
        file = checkout / name
        file.write_text(file.read_text().replace("joint", "jolt", 1))
    front = checkout / "README.md"
    before, table = front.read_text().split(publish.START)
    front.write_text(before + publish.START + table.replace("9", "8", 1))
    changed = {"README.md", "agents/README.md", "agents/trained/joint/README.md"}
    assert stale(checkout, *changed, "agents/trained/rloo/README.md") == changed


def test_what_stands_outside_of_the_markers_is_left_alone(checkout):
    file = checkout / "README.md"
    file.write_text("# Another title\n" + file.read_text())
    assert stale(checkout, "README.md") == set()


@pytest.mark.slow
def test_no_page_is_stale():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "publish.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_portions_of_the_real_benchmark_add_up(tmp_path):
    choices = {
        "agents": "joint,rloo",
        "seeds": 2,
        "long": None,
        "budgets": "1/8,1/16",
        "learned_only": False,
        "fitted": False,
    }
    arguments = SimpleNamespace(out=tmp_path, model="m", portion=4, rows=2, validation=4, **choices)
    counts = {("needle:1024:keys=4", 1024): 10, ("quote:2048", 2048): 4}
    spec = read_spec(real_model.specification(arguments, counts, 3, "kvzip", "layers"))
    assert [task.task for task in spec.tasks] == [
        "needle:1024:keys=4:count=4:rows=2", "quote:2048:count=4:rows=1", "needle:1024:keys=4:count=4:rows=2:first=4",
        "needle:1024:keys=4:count=2:rows=2:first=8",
    ]  # fmt: skip
    assert spec.learned["joint"] == (f"{tmp_path}/joint-layers-{{seed}}",) and spec.allocations_of["h2o"] == ()


def test_the_real_page_compares_the_same_answers():
    rows = real_model_page.rows_of(ROOT / "benchmarks" / "results")
    rows = [row for row in rows if row["task"] == real_model_page.FIRST]
    table = real_model_page.close_look(rows).split("\n\n")[1].splitlines()
    full = next(line for line in table if "| full" in line).split("|")
    assert full[4].strip() == "100.0"  # of the questions that it answers
    assert len(table) == 2 + len({(r["policy"], r["allocation"], r["sinks"]) for r in rows if r.get("answers")})
