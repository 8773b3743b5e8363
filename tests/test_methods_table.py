"""The table of methods: current, complete, and true of some methods that are known by heart."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kv_gym import list_policies
from kv_gym.budgets import ALLOCATIONS
from kv_gym.cli import app
from kv_gym.live.selection import SELECTIONS
from kv_gym.live.tiers import TIERS
from kv_gym.method_table import method_tables
from kv_gym.policies import Paper, policy_class
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
    tables = [[name.removesuffix(":SHARE") for name in table] for table in rows]
    assert tables == [list_policies(), list(ALLOCATIONS), [*TIERS, "less:FOLDER"], list(SELECTIONS), list_agents()]
    assert len({len(cells) for cells in rows[0].values()}) == 1


@pytest.mark.parametrize("name", list_policies())
def test_every_policy_states_its_paper_or_that_there_is_none(rows, name):
    kind = policy_class(name)
    assert "paper" in vars(kind)
    assert rows[0][name][0] == ("-" if kind.paper is None else kind.paper.link)


@pytest.mark.parametrize(
    ("paper", "link"),
    [
        (Paper("Title", "1234.56789"), "[Title](https://arxiv.org/abs/1234.56789)"),
        (
            Paper("Title", "1234.56789", "section 3", "NIPS 2017"),
            "[Title](https://arxiv.org/abs/1234.56789) (NIPS 2017), section 3",
        ),
        (Paper("Title", venue="A Journal, 1966", url="https://x.org/y"), "[Title](https://x.org/y) (A Journal, 1966)"),
        (Paper("Title"), "Title"),
    ],
)
def test_papers_as_links(paper, link):
    assert paper.link == link


def test_known_methods(rows):
    policies, allocations, tiers, selections, agents = rows
    assert policies["h2o"][0].endswith("(https://arxiv.org/abs/2306.14048) (NeurIPS 2023), section 4 and algorithm 1")
    assert policies["h2o"][1:] == ["statistics", "-", "yes", "yes", "yes", "-"]
    assert policies["snapkv"][1:] == ["a window of 32", "-", "-", "-", "yes", "-"]
    assert policies["kvzip"][1] == "the context repeated" and policies["kvzip"][4] == "-"
    assert policies["keydiff"][1:] == ["none", "-", "-", "yes", "-", "-"]
    assert policies["oracle"][1] == "the future" and policies["oracle"][4] == "replay only"
    assert policies["critical_kv"][1] == "as its base" and "output projection" in policies["critical_kv"][6]
    assert policies["streaming_llm_reindexed"][6] == "positions inside the cache"
    assert policies["scorer"][2] == "yes" and sum(cells[2] == "yes" for cells in policies.values()) == 1
    assert allocations["uniform"][1:4] == ["-", "-", "each layer"]
    assert allocations["cake"][3:] == ["the last layer", "the last queries"]
    assert allocations["ada"][0].endswith("(https://arxiv.org/abs/2407.11550) (NeurIPS 2025)")
    assert tiers["bits:4"][0].endswith("(https://arxiv.org/abs/2402.18096)") and tiers["drop"][0] == "-"
    assert "2406.10774" in selections["quest:SHARE"][0] and selections["all"][0] == "-"
    assert agents["rloo"][0].endswith("(https://arxiv.org/abs/2602.10238) (ICML 2026), section 4")
