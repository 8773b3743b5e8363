"""Verbs are made from their Python twins: what is written there is what the command line shows and passes on."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from kv_gym import cli
from kv_gym.cli import from_signature
from kv_gym.cli.from_signature import FunctionSource, verb

SOURCE = '''
LENGTHS = (1, 2)

def weigh(
    model, name: str, out: str | Path, budgets: Iterable[str | float] = ("1/2", 4), count: int = 3,
    *, rate: float | None = None, fast: bool = False, bar: bool = True, lengths: Sequence[int] = LENGTHS,
    policy: str | Path | Policy = "knorm", split: str | None = "test", notes: Mapping[str, str] | None = None,
    **settings: Any,
):
    """Weigh things.

    A second paragraph about :class:`~kv_gym.policies.Policy`.

    Args:
        model: a transformers decoder.
        name: who; see :func:`kv_gym.policies.make_policy`. In Python, what :func:`kv_gym.policies.make_policy` made,
            or an object.
        out: file to write ``x`` to,
            on two lines.
        budgets, count: how much.
        rate: ``low``, ``high`` ...
        bar: show it.
        **settings: more.

    Returns:
        name: not an argument.
    """
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `kv_gym.scales` with the function `weigh`, as a lazy import from one of its modules."""
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "__init__.py").write_text(
        "from kv_gym.scales.table import HOMES\nHOMES = {'weigh': 'inner'}"
    )
    (tmp_path / "scales" / "inner.py").write_text(SOURCE)
    monkeypatch.setattr(from_signature, "__file__", str(tmp_path / "cli" / "from_signature.py"))
    calls = []
    module = types.SimpleNamespace(weigh=lambda **given: calls.append(given))
    monkeypatch.setattr(from_signature, "import_module", {"kv_gym.scales": module}.__getitem__)
    monkeypatch.setattr(from_signature, "load_named_model", lambda *named: (named, "its tokenizer"))
    FunctionSource.read.cache_clear()
    return calls


def test_the_source_is_read_without_an_import(package):
    source = FunctionSource.read("kv_gym.scales.weigh")
    assert source.description == "Weigh things.\n\nA second paragraph about `kv_gym.policies.Policy`."
    kinds = {name: parameter.kind for name, parameter in source.parameters.items()}
    assert kinds == {
        "model": None, "name": str, "out": Path, "budgets": list, "count": int, "rate": float, "fast": bool,
        "bar": bool, "lengths": list, "policy": str, "split": str, "notes": None,
    }  # fmt: skip
    texts = {name: parameter.help for name, parameter in source.parameters.items() if parameter.help}
    assert texts == {
        "model": "A transformers decoder.", "name": "Who; see `kv_gym.policies.make_policy`.",
        "out": "File to write `x` to, on two lines.", "budgets": "How much.", "count": "How much.",
        "rate": "`low`, `high` ...", "bar": "Show it.",
    }  # fmt: skip
    assert [name for name, parameter in source.parameters.items() if parameter.required] == ["model", "name", "out"]
    with pytest.raises(LookupError, match="has no function weight"):
        FunctionSource.read("kv_gym.scales.weight")


@pytest.fixture
def run(package):
    app = typer.Typer(rich_markup_mode=None)
    app.command("other")(lambda: None)

    @verb(app, "kv_gym.scales.weigh", arguments=("name",), rename={"budgets": "shares"}, defaults={"count": 5})
    def _weigh(call, bar: Annotated[int, typer.Option(help="A bar of another kind.")] = 2) -> None:
        call(settings=bar)
        typer.echo(f"{call['out']} {call['policy']}")

    def run(*arguments):
        done = CliRunner().invoke(app, ["weigh", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done, package[-1] if package else None

    return run


def test_what_is_not_given_is_left_to_the_function(run):
    done, given = run("x", "--model", "m", "--out", "y")
    model = ("m", "cpu", "auto")
    assert given == {"model": model, "name": "x", "out": "y", "count": 5, "settings": 2}
    assert done.stdout == "y knorm\n"


def test_values_are_converted_by_the_annotation(run):
    options = "--model m --out y --shares 1/4,12% --rate 0.5 --fast --split all --bar 4 --device cuda".split()
    _, given = run("x", *options)
    assert given.pop("model") == ("m", "cuda", "auto")
    assert given == {
        "name": "x", "out": "y", "budgets": ["1/4", "12%"], "rate": 0.5, "fast": True, "split": "all", "count": 5,
        "settings": 4,
    }  # fmt: skip


def test_help_shows_texts_and_defaults(run):
    shown = " ".join(run("--help")[0].stdout.split())
    for text in (
        "Weigh things.", "A transformers decoder. Folder, GGUF file, hub id, or `reference`. [required]",
        "--shares A,B,... How much. [default: 1/2,4]", "How much. [default: 5]", "A bar of another kind.",
    ):  # fmt: skip
        assert text in shown
    assert "notes" not in shown and "Python" not in shown


def commands():
    groups = get_command(cli.app).commands
    return {name: command for name, command in groups.items() if name != "trace"} | groups["trace"].commands


@pytest.mark.parametrize("name", commands())
def test_every_option_has_a_help_text(name):
    texts = {option.name: (getattr(option, "help", None) or "").strip() for option in commands()[name].params}
    assert not [option for option, text in texts.items() if not text[:1].isalpha() and not text.startswith("`")]
    assert commands()[name].help


def test_help_is_shown_without_torch():
    code = (
        "import sys; sys.argv = ['kv-gym', 'train', '--help']\nimport kv_gym.cli\n"
        "try: kv_gym.cli.main()\nexcept SystemExit: assert not {'torch', 'transformers', 'h5py'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
