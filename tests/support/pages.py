"""Documentation pages as programs: their code blocks in order, each run or checked for what it is.

A block may have a mark in the line above it, which readers of the rendered page do not see:

- ``<!-- file: my_policy.py -->``: the block is written to that file of the working folder, and Python is run too;
- ``<!-- parsed: why -->``: nothing is run: Python is compiled, and a command's options are checked.
"""

import ast
import configparser
import gzip
import importlib
import os
import re
import shlex
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import typer
from typer.testing import CliRunner

from kv_gym.cli import app

ROOT = Path(__file__).parents[2]
LANGUAGES = {"python", "bash", "console", "json", "yaml", "text"}
_BLOCK = re.compile(r"^(?:<!-- (file|parsed): (.*?) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
_GENERATED = re.compile(r"<!-- results -->.*<!-- /results -->", re.S)
# what a command takes at most here, and what it is given where the page does not say it: the same verbs, little work
_MOST = {"--count": 8, "--steps": 3, "--tokens": 64, "--continuation-tokens": 8, "--max-new-tokens": 4, "--workers": 1}
_FOLDERS = "kv_gym|tests|benchmarks|examples|agents|traces/recipes|docs"
_TOLERANCE = 0.5  # so few questions cannot tell less
_WORDS = {"multi_key": 64, "dialogue": 128, "copy": 32, "fact": 128}
_REQUESTS = "sample.jsonl.gz"
_MADE = re.compile(rf"\b({'|'.join(_WORDS)}):(\d+)")
_VERBS = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: behind the opening fence.
        text: what stands in it.
        line: of the page, where it begins.
        mark: ``file``, ``parsed`` or "", and `what` it says.
    """

    language: str
    text: str
    line: int
    mark: str = ""
    what: str = ""


def blocks(page):
    """The code blocks of a page, in order; those between the markers of generated results are none of ours."""
    text = _GENERATED.sub(lambda made: "\n" * made[0].count("\n"), page.read_text(encoding="utf-8"))
    return [
        Block(m[3], m[4], text.count("\n", 0, m.start(4)) + 1, m[1] or "", m[2] or "") for m in _BLOCK.finditer(text)
    ]


def commands(block):
    """The command lines of a block, and for ``console`` the lines printed after each: `[(command, [line, ...])]`."""
    said = block.text.replace("\\\n", " ")
    if block.language == "bash":
        return [(line, []) for line in said.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    first, *rest = said.split("$ ") if said.startswith("$ ") else ["", said]
    assert not first
    return [(command, printed.splitlines()) for command, _, printed in (each.partition("\n") for each in rest)]


class Page:
    """Runs the blocks of a page one after the other, in the folder where it stands."""

    def __init__(self, page):
        self.page = page
        self.names = {"__name__": "page"}

    def run(self):
        """Every block; an error names the line of the page."""
        for block in blocks(self.page):
            where = f"{self.page.name}, line {block.line}"
            assert block.language in LANGUAGES, f"{where}: language {block.language!r}"
            try:
                self._block(block, where)
            except BaseException as error:
                error.add_note(f"in {where}")
                raise

    def _block(self, block, where):
        if block.mark == "file":
            Path(block.what).parent.mkdir(parents=True, exist_ok=True)
            Path(block.what).write_text(block.text)
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
            if block.mark != "parsed":
                exec(code, self.names)
        elif block.language in ("bash", "console"):
            for command, printed in commands(block):
                self._command(command, printed, block.mark == "parsed", where)

    def _command(self, command, printed, parsed, where):
        words = shlex.split(command, comments=True)
        if words[0] != "kv-gym":
            check_other(words)
            return
        check(words[1:])
        if parsed:
            return
        done = CliRunner().invoke(app, small(words[1:]))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, f"{where}: {command}\n{done.output}"
        for line in printed:
            assert line.strip() in done.output, f"{where}: {line!r} is not in what {command!r} says:\n{done.output}"


def verb(words):
    """The command that `words` call, and the words behind its name."""
    command, rest = _VERBS, list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name, *rest = rest
        assert name in command.commands, f"kv-gym has no verb {name!r}"
        command = command.commands[name]
    return command, rest


def options(words):
    """Names of the options that the command which `words` call knows."""
    return {"--help"} | {name for parameter in verb(words)[0].params for name in parameter.opts}


def check(words):
    """Parse a call as `kv-gym` would, and run nothing."""
    command, rest = verb(words)
    if not hasattr(command, "commands"):  # else --help or --version
        with typer.Context(_VERBS) as above:
            command.make_context("kv-gym", rest, parent=above)


def small(words):
    """The same call with little work: see `_MOST`."""
    known = options(words)
    words = [_MADE.sub(lambda made: f"{made[1]}:{min(int(made[2]), _WORDS[made[1]])}", word) for word in words]
    words = [_write_few_requests(word) if Path(word).name == _REQUESTS else word for word in words]
    given = dict(pairwise(words))
    wanted = {name: most for name, most in _MOST.items() if name in known}
    if given.get("--data", "").endswith(".jsonl"):  # whose lines have lengths of their own
        wanted = {name: most for name, most in wanted.items() if "tokens" not in name}
    if given.get("--data") == "reference":
        wanted.pop("--continuation-tokens")
    if "--tolerance" in known:
        wanted |= {"--tolerance": max(_TOLERANCE, float(given.get("--tolerance", 0))), "--budgets": "1/2,1/4"}
    for name, most in wanted.items():
        if name in given:
            at = words.index(name) + 1
            words[at] = str(most if isinstance(most, str | float) else min(most, int(words[at])))
        else:
            words += [name, str(most)]
    return [*words, *(["--no-progress"] if "--progress" in known else [])]


def _write_few_requests(file):
    """The first requests of a trace, in a file in the working folder."""
    with gzip.open(file, "rt") as lines:
        Path("few_requests.jsonl").write_text("".join(islice(lines, 300)))
    return "few_requests.jsonl"


def check_other(words):
    """A command that is not ours is not run: what it names must be there."""
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), words
    elif program == "python":
        script = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
        source = script.read_text()
        if words[1] == "-m" and words[2].startswith("kv_gym.interop."):
            return  # whose options are another library's
        beside = [script.parent / f"{name}.py" for name in re.findall(r"^from (\w+) import", source, re.M)]
        source += "".join(file.read_text() for file in beside if file.is_file())  # where options are shared
        for name in (word for word in words if word.startswith("--")):
            assert f'"{name}"' in source, f"{words[1]} has no option {name}"
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", words[-1])
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        unknown = set(",".join(extras).split(",")) - {"", *config["options.extras_require"]}
        assert words[1] == "install" and not unknown, f"{words}: no extra {unknown}"
    elif program == "torchrun":
        assert words[words.index("-m") + 1] == "kv_gym", words
        check(words[words.index("kv_gym") + 1 :])
    else:
        assert program in ("source", "tensorboard", "ray"), f"what does {words[0]!r} do in a page?"


def links(page):
    """Relative files that a page points to."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    return [page.parent / link.split("#")[0] for link in found if "://" not in link and link.split("#")[0]]


def missing_names(text):
    """Dotted names `kv_gym.x.y` and files of the repository that a page mentions and that do not exist."""
    dotted = dict.fromkeys(re.findall(r"\bkv_gym(?:\.[A-Za-z_]\w*)+", text))
    files = dict.fromkeys(re.findall(rf"(?<![\w/.])(?:{_FOLDERS})/[\w./-]+\.(?:py|md|yml|json)\b", text))
    return [name for name in dotted if not _resolves(name)] + [name for name in files if not (ROOT / name).exists()]


def _resolves(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        try:
            for attribute in parts[size:]:
                value = getattr(value, attribute)
        except AttributeError:
            return False
        return True
    return False


def is_class_with_score(text):
    """Whether Python text defines a class with a method `score`."""
    return any(
        isinstance(node, ast.ClassDef) and any(getattr(each, "name", "") == "score" for each in node.body)
        for node in ast.parse(text).body
    )


def enter(folder, monkeypatch):
    """Work in `folder` as in a checkout, which modules written there are imported from."""
    for name in ("agents", "benchmarks", "examples", "traces"):
        os.symlink(ROOT / name, folder / name)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
