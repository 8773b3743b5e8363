"""The page of clients says what its results say, and nothing that was run came out wrong."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import clients  # noqa: E402


def test_the_page_is_current_and_every_row_works_or_is_refused():
    rows = json.loads((ROOT / clients.RESULTS).read_text())["rows"]
    assert (ROOT / clients.PAGE).read_text() == clients.page(ROOT / clients.RESULTS), "run benchmarks/clients.py --page"
    assert [row["run"] for row in rows if row["result"] == "fails"] == []
    ways = {(row.client, row.run): row.instead for row in clients.ROWS}
    refused = [(row["client"], row["run"]) for row in rows if row["result"] != "works"]
    assert refused and all(ways[key] for key in refused)  # each names the way that works


def test_outcomes():
    def wrong():
        assert 1 == 2, "another text"

    def refuse():
        raise clients.UserError("no: do that")

    result, text = clients.outcome(wrong)
    assert result == "fails" and text.startswith("another text")
    assert clients.outcome(refuse) == ("refused", "no: do that")
    assert clients.outcome(lambda: {}["key"]) == ("refused by the library", "KeyError: 'key'")
