"""Files that are written whole or not at all, and the refusal, before any work, of those that cannot be written."""

import shlex
import sys
from importlib import import_module

import pytest

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.rows import result
from kv_gym.files import bundled, whole_file

LONG = "a" * 300 + ".json"  # more than any file system takes; root may write to read-only folders, but not this


def test_a_block_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), whole_file(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "earlier")]
    with whole_file(file) as part:
        part.write_text("later")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "later")]


def test_a_file_that_cannot_be_written_is_named_before_the_block_begins(tmp_path):
    begun = False
    with pytest.raises(OSError) as refused, whole_file(tmp_path / LONG):
        begun = True
    assert refused.value.filename == str(tmp_path / LONG) and refused.value.strerror and not begun


@pytest.mark.parametrize("json", [LONG, "a" * 252 + ".b"])  # the second is too long with the ending of its partial file
def test_evaluate_refuses_a_file_that_it_could_not_write_before_it_measures(tmp_path, monkeypatch, json):
    monkeypatch.setattr(import_module("kv_gym.evaluation.evaluate"), "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"^cannot write .*aaa\.\w+ \(File name too long\); name another file$"):
        evaluate(["keydiff"], ["1/4"], traces=bundled("traces"), split=None, json=tmp_path / json, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_a_result_is_made_by_can_be_typed_again(monkeypatch):
    said = ["evaluate", "--tasks", "multi_key:64:count=2", "--budgets", "1/4,12%", "--json", "my runs/a.json"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/kv_gym/cli/__main__.py", *said])
    command = result([])["command"]
    assert command == "kv-gym evaluate --tasks multi_key:64:count=2 --budgets 1/4,12% --json 'my runs/a.json'"
    assert shlex.split(command) == ["kv-gym", *said]
    monkeypatch.setattr(sys, "argv", ["/somewhere/kv_gym/__main__.py", *said])
    assert result([])["command"] == command
    monkeypatch.setattr(sys, "argv", ["benchmarks/held_out.py", "--out", "runs"])
    assert result([])["command"] == "held_out.py --out runs"
