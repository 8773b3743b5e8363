"""The table of methods: current, complete, and true of some methods that are known by heart."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kv_gym import list_policies
from kv_gym.budgets.registry import NAMES as ALLOCATIONS
from kv_gym.cli import app
from kv_gym.live.tiers import TIERS
from kv_gym.method_table import method_tables, source
from kv_gym.policies import policy_class
from kv_gym.training.registry import list_agents

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


@pytest.fixture(scope="module")
def rows():
    """Table number -> name -> the other cells."""
    tables = re.findall(r"(?:^\|.*\n)+", method_tables(), re.MULTILINE)
    cells = [[[cell.strip() for cell in line.strip("|").split(" | ")] for line in t.splitlines()[2:]] for t in tables]
    return [{name.strip("| "): [cell.strip("| ") for cell in rest] for name, *rest in table} for table in cells]


def test_the_page_is_current():
    assert PAGE.read_text() == method_tables(), "run `kv-gym policies --table > docs/methods.md`"


def test_the_command_prints_the_page():
    result = CliRunner().invoke(app, ["policies", "--table"])
    assert result.exit_code == 0 and result.output == method_tables()


def test_nothing_is_missing(rows):
    assert [list(table) for table in rows] == [list_policies(), list(ALLOCATIONS), list(TIERS), list_agents()]
    assert len({len(cells) for cells in rows[0].values()}) == 1


@pytest.mark.parametrize("name", list_policies())
def test_every_policy_names_its_paper_or_says_that_there_is_none(rows, name):
    about = sys.modules[policy_class(name).__module__].__doc__
    assert (rows[0][name][0] == "-") == ("No paper." in about)


def test_known_methods(rows):
    policies, allocations, tiers, agents = rows
    linked = "[arXiv {0}](https://arxiv.org/abs/{0})"
    assert policies["h2o"] == [
        linked.format("2306.14048") + " (NeurIPS 2023)", "statistics", "-", "yes", "yes", "yes", "-"
    ]  # fmt: skip
    assert policies["snapkv"][1:] == ["a window of 32", "-", "-", "-", "yes", "-"]
    assert policies["kvzip"][1] == "the context repeated" and policies["kvzip"][4] == "-"
    assert policies["keydiff"][1:] == ["none", "-", "-", "yes", "-", "-"]
    assert policies["oracle"][1] == "the future" and policies["oracle"][4] == "replay only"
    assert policies["critical_kv"][1] == "as its base" and "output projection" in policies["critical_kv"][6]
    assert policies["streaming_llm_reindexed"][6] == "positions inside the cache"
    assert policies["scorer"][2] == "yes" and sum(cells[2] == "yes" for cells in policies.values()) == 1
    assert allocations["uniform"][1:4] == ["-", "-", "each layer"]
    assert allocations["cake"][3:] == ["the last layer", "the last queries"]
    assert allocations["ada"][0] == linked.format("2407.11550") + " (NeurIPS 2025)"
    assert tiers["bits:4"][0] == "MiKV, " + linked.format("2402.18096")
    assert agents["rloo"][0] == linked.format("2602.10238") + " (ICML 2026)"


LINK = "[arXiv 1234.56789](https://arxiv.org/abs/1234.56789)"


@pytest.mark.parametrize(
    ("about", "found"),
    [
        ("A. B.\n\nPaper: Good Name, arXiv 1234.56789 (NIPS 2017), section 3.", f"Good Name, {LINK} (NIPS 2017)"),
        ("Source: Name's form (arXiv 1234.56789), and more", LINK),
        ("Paper: OpenReview aB3 (X 2026; other).", "[OpenReview aB3](https://openreview.net/forum?id=aB3) (X 2026)"),
        ("A thing.\nSource: Who, \"A title\", 1966. More.", 'Who, "A title", 1966'),
        ("Nearest: arXiv 1234.56789. No paper.", ""),
    ],
)  # fmt: skip
def test_sources(about, found):
    assert source(about) == found
