"""The README does what it says: every block runs, and the first screen shows what the project is for."""

import contextlib
import io

import pytest
from pages import ROOT, Page, blocks, enter, is_class_with_score, links
from users_files import write_users_files

from kv_gym.files import MODEL

README = ROOT / "README.md"
EXAMPLES = [block.text for block in blocks(README) if block.language == "python"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    if not MODEL.is_dir():
        pytest.skip("the reference model is not in this checkout")
    enter(tmp_path, monkeypatch)
    return tmp_path


def test_every_block_runs(folder):
    write_users_files(folder)
    Page(README).run()


def test_the_first_example_answers_from_half_the_cache():
    assert len([line for line in EXAMPLES[0].splitlines() if line.strip()]) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLES[0], str(README), "exec"), {})
    assert printed.getvalue() == "4 7\n13 of 25 tokens in 88704 bytes\n"


def test_the_policy_example_keeps_the_contract():
    from kv_gym.testing import check_policy

    (example,) = (text for text in EXAMPLES if is_class_with_score(text))
    names: dict = {"__name__": "my_policy"}
    exec(compile(example, str(README), "exec"), names)
    check_policy(names["LargestValues"]())
    assert issubclass(names["LargestValues"], names["Policy"])


def test_the_environment_example_gives_a_reward():
    (example,) = (text for text in EXAMPLES if "gym.make" in text)
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert 0 <= names["reward"] <= 1 and names["terminated"]


def test_what_it_links_to_is_there():
    assert [link for link in links(README) if not link.exists()] == []


def test_the_first_screen_has_its_order():
    """One sentence, a picture of the result, how to install it, a short example, two commands, where to go next."""
    text = README.read_text()
    parts = ("# kv_gym", "![", "## Install", "## Quickstart", "make demo", "kv-gym fit", "**Next:**", "## Results")
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and text[: places[-1]].count("\n") < 70


def test_it_has_the_headings_that_people_search_for():
    headings = [line[3:] for line in README.read_text().splitlines() if line.startswith("## ")]
    assert headings == "Install,Quickstart,Results,Concepts,Command line,Python API,Guides,Limits".split(",")
