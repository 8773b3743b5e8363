"""The guides do what they say: their blocks run in a reader's folder, all are listed, every link leads somewhere.

Commands run with small numbers (:func:`pages.small`), so that a page takes seconds; their options are those written.
"""

import json
import re
import shlex
from itertools import pairwise

import pytest
from pages import ROOT, Page, blocks, check_other, commands, enter, links, missing_names, options, small
from typer.main import get_command
from users_files import write_users_files

from kv_gym.cli import app
from kv_gym.evaluation.tasks import list_tasks, parse_tasks, read_tasks
from kv_gym.files import MODEL
from kv_gym.live.guard import REACTIONS, SIGNALS
from kv_gym.models import load_model
from kv_gym.pages import list_page_policies
from kv_gym.pages.features import FEATURES
from kv_gym.policies.scoring.inputs import INPUTS
from kv_gym.traces import read_prompts
from kv_gym.training.joint import LOSSES
from kv_gym.training.targets import TARGETS

DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
GENERATED = ("clients.md", "methods.md", "seeds.md", "episodes.md", "seed-settings.md")
TYPED = [page for page in GUIDES if page.name not in GENERATED]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *GUIDES]
LONGEST_LINE = 120


@pytest.fixture
def folder(tmp_path, monkeypatch):
    if not MODEL.is_dir():
        pytest.skip("the reference model is not in this checkout")
    enter(tmp_path, monkeypatch)
    write_users_files(tmp_path)
    return tmp_path


def block_page(page):
    """A page whose blocks are run; the ones that take long, only with the slow tests."""
    slow = page.parent.name == "benchmarks" or page.stem == "publish-results"
    return pytest.param(page, id=f"{page.parent.name}/{page.stem}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [block_page(page) for page in (*TYPED, *PAGES[1:3])])
def test_every_block_runs(page, folder):
    Page(page).run()


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_lines_are_short(page):
    """Except those of tables, JSON lines and generated results."""
    lines = re.sub(r"<!-- results -->.*<!-- /results -->", "", page.read_text(), flags=re.S).splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "{"))] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_names_that_a_page_mentions_exist(page):
    """Dotted names of the package, and files of the repository; see :func:`pages.missing_names`."""
    assert missing_names(page.read_text()) == []


def test_the_glossary_has_at_most_fifteen_terms():
    terms = [line for line in (DOCS / "concepts.md").read_text().splitlines() if line.startswith("| ")]
    assert 10 <= len(terms) - 1 <= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    assert [link for link in links(page) if not link.exists()] == []


def test_the_index_lists_every_guide():
    listed = {link.name for link in links(DOCS / "README.md")}
    assert {page.name for page in GUIDES} - {"README.md"} <= listed


def test_the_site_lists_every_guide():
    """In the navigation of mkdocs.yml, without which a page is found by search only."""
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in GUIDES if f"docs/{page.name}" not in listed] == []


@pytest.mark.parametrize(
    "page, known",
    [
        ("use-your-data", set(list_tasks()) - {"file"}),
        ("change-the-reward", {*TARGETS, *LOSSES}),
        ("write-an-agent", INPUTS),
        ("live-cache", {*SIGNALS, *REACTIONS}),
        ("evict-pages", {*list_page_policies(), *FEATURES}),
    ],
)
def test_lists_of_names_are_complete(page, known):
    words = set(re.findall(r"\w+", (DOCS / f"{page}.md").read_text()))
    assert set(known) - words == set()


def test_every_verb_is_shown_somewhere():
    shown = {words.split()[1] for page in PAGES for block in blocks(page) if block.language in ("bash", "console")
             for words, _ in commands(block) if words.startswith("kv-gym ")}  # fmt: skip
    assert set(get_command(app).commands) - shown == {"demo"}  # which is `make demo`


def test_every_json_line_of_the_guides_is_read(folder):
    """By the reader of its form: questions, continuations, RULER, LongBench; messages by a chat template."""
    _, tokenizer = load_model("path/to/your-model")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    read = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language != "json":
                continue
            for line in block.text.splitlines():
                file = folder / "line.jsonl"
                file.write_text(line + "\n")
                held = set(json.loads(line))
                chat = "messages" in held
                if held & {"continuations", "continuation_ids"}:
                    assert len(list(read_prompts(file, tokenizer, chat))) == 1
                elif "outputs" in held or "dataset" in held:
                    (task,) = parse_tasks(f"{'ruler' if 'outputs' in held else 'longbench'}:{file}", tokenizer)
                    assert task.contexts == 1
                else:
                    assert len(read_tasks(file, tokenizer, chat)) == 1
                read += 1
    assert read >= 6


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_within_sentences_have_the_options_they_name(page):
    """Whole commands: a verb alone, or with words that stand for something in CAPITALS in its place, is none."""
    for command in re.findall(r"`((?:python|kv-gym) [^`]+)`", page.read_text()):
        words = [word.strip("[]") for word in shlex.split(command.split(" > ")[0])]
        if words[0] == "kv-gym" and not words[1].isupper():
            assert {word for word in words if word.startswith("--")} <= options(words[1:]), command
        elif words[0] == "python" and words[1] != "-c":
            check_other(words)


def test_every_benchmark_is_listed_with_its_command():
    """In benchmarks/README.md; modules that others import are named by those."""
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = [file for file in (ROOT / "benchmarks").glob("*.py") if "ArgumentParser(" in file.read_text()]
    specs = list((ROOT / "benchmarks").glob("*.yml"))
    assert len(scripts) > 15 and specs
    assert [file.name for file in (*scripts, *specs) if f"benchmarks/{file.name}" not in listed] == []


@pytest.mark.parametrize(
    "text, missing",
    [
        ("`kv_gym.live.EvictingCache` and `kv_gym/live/cache.py` and `benchmarks/publish.py`", []),
        ("`kv_gym.live.EvictingCash`", ["kv_gym.live.EvictingCash"]),
        ("help(kv_gym.dream.Dream)", ["kv_gym.dream.Dream"]),
        ("`kv_gym/live/cash.py`", ["kv_gym/live/cash.py"]),
        ("see tests/test_dreams.py", ["tests/test_dreams.py"]),
        ("`kv_gym/policies/<name>.py`", []),
    ],
)
def test_a_missing_name_is_noticed(text, missing):
    assert missing_names(text) == missing


# -- what the other tests can see -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block, seen",
    [
        ("```bash\nkv-gym evaluate --polices h2o\n```", "No such option"),
        ("```bash\nkv-gym evaluate --budgets 1/4\n```", "Missing parameter: policies"),
        ("<!-- parsed: slow -->\n```bash\nkv-gym train joint --traces x --out y --pace 3\n```", "No such option"),
        ("```bash\nkv-gym dream\n```", "no verb 'dream'"),
        ("```bash\nkv-gym trace info nowhere\n```", "nowhere"),
        ("```console\n$ kv-gym policies\nh2o      Recency: keep the newest tokens.\n```", "is not in what"),
        ("```bash\nmake coffee\n```", "coffee"),
        ("```bash\npip install '.[tpu]'\n```", "tpu"),
        ("```bash\npython examples/train_ppo.py --pace 3\n```", "--pace"),
        ("```bash\nrm -r /\n```", "what does 'rm' do"),
        ("```python\nfrom kv_gym import EvictingCash\n```", "EvictingCash"),
        ("<!-- parsed: GPU -->\n```python\nif True\n```", "expected ':'"),
        ("```javascript\n1\n```", "language 'javascript'"),
    ],
)
def test_a_wrong_page_is_noticed(block, seen, folder):
    page = folder / "page.md"
    page.write_text(f"# A page\n\n{block}\n")
    with pytest.raises(BaseException) as caught:  # whatever its command raises
        Page(page).run()
    notes = getattr(caught.value, "__notes__", [])
    line = 5 if block.startswith("<!--") else 4  # where the code begins
    assert seen in str(caught.value) and f"page.md, line {line}" in f"{caught.value} {notes}"


def test_blocks_of_a_page_share_names_and_files(folder):
    page = folder / "page.md"
    first = "<!-- file: mine.py -->\n```python\nanswer = 42\n```"
    second = "```python\nimport mine\n\nassert mine.answer == answer == 42\nanswer += 1\n```"
    page.write_text(f"{first}\n\n{second}\n\n```console\n$ kv-gym --version\nkv-gym \n```\n")
    run = Page(page)
    run.run()
    assert run.names["answer"] == 43 and (folder / "mine.py").read_text() == "answer = 42\n"
    assert [block.line for block in blocks(page)] == [3, 7, 14]


def test_commands_run_with_small_numbers():
    words = "fit --model m --data q.jsonl --out o --count 160 --tolerance 0.01".split()
    given = dict(pairwise(small(words)))
    assert (given["--count"], given["--steps"], given["--tolerance"]) == ("8", "3", "0.5") and "--tokens" not in given
    words = "evaluate --model m --policies a --tasks multi_key:512:seen,copy:16".split()
    assert dict(pairwise(small(words)))["--tasks"] == "multi_key:64:seen,copy:16"
