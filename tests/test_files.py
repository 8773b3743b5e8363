"""Files: readers of outside data and what they refuse, writing whole or not at all, refusals before any work."""

import errno
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.evaluation.rows import result
from kv_gym.files import (
    atomic_write,
    bundled,
    only_class,
    parse_json,
    parse_yaml,
    read_json,
    read_json_lines,
    read_text,
    read_yaml,
    validated,
)

LONG = "a" * 300 + ".json"  # more than any file system takes; root may write to read-only folders, but not this


def nested(levels):
    return "[" * levels + "]" * levels


REFUSED = {  # what both formats refuse, and the reason
    "a": (b"[1,\n\xff]", "line 2: not UTF-8 text"),
    "b": (nested(65).encode(), "line 1: nested deeper than 64 levels"),
    "c": (nested(100_000).encode(), "line 1: nested deeper than 64 levels"),
    "d": (b"[1,\n" + b"9" * 5000 + b"]", "line 2: a number of 5000 characters"),
    "e": (b'{"a": "x",\n "b": "\\ud83d"}', "line 2: a text holds half of a surrogate pair"),
    "f": (b'{"a": 1,\n "b\\u001b[2J": 2}', "line 2: a key holds control characters"),
    "g": (b'{"a": 1, "b": {"a": 1},\n "a": 2}', "line 2: key 'a' stands twice"),
}
REFUSED_JSON = REFUSED | {
    "number": (b'{"a": "1e999",\n "b": 1e999}', "line 2: the number 1e999 is not finite"),
    "constant": (b'["NaN",\nNaN]', "line 2: the number NaN is not finite"),
    "syntax": (b"[1,\n 2,\n", r"line 3: no JSON \(Expecting value\)"),
    "empty": (b"", "line 1: no JSON"),
}
REFUSED_YAML = REFUSED | {
    "anchor": (b"a: 1\nb: &x [1]\nc: *x", "line 2: aliases and anchors are not read: write the value out"),
    "tag": (b"a: 1\nb: !!python/name:os.system", "line 2: tags are not read: write a plain value"),
    "number": (b"a: 1\nb: .inf", "line 2: a number is not finite"),
    "syntax": (b"a: 1\nb: [", "line 2: no YAML"),
    "date": (b"a: 2020-13-45", "no YAML"),
    "list key": (b"a: 1\n? [1, 2]\n: 3", "line 2: a key is a list or a mapping, not a text"),
    "control": (b"a: \x00", "no YAML"),
}


@pytest.mark.parametrize(
    ("read", "data", "reason"),
    [(read_json, *case) for case in REFUSED_JSON.values()] + [(read_yaml, *case) for case in REFUSED_YAML.values()],
)
def test_readers_refuse_what_plain_data_never_needs_in_a_short_sentence_with_file_and_line(
    tmp_path, read, data, reason
):
    file = tmp_path / "data"
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"^{file}(, |: ){reason}.*; expected rows$") as refused:
        read(file, "expected rows")
    assert len(str(refused.value)) < len(str(file)) + 150


@pytest.mark.parametrize(
    "read", [read_json, read_yaml, read_text, lambda file, said: list(read_json_lines(file, said))]
)
def test_readers_say_why_a_file_cannot_be_opened(tmp_path, read):
    with pytest.raises(UserError, match=r"none cannot be read \(No such file or directory\); expected rows$"):
        read(tmp_path / "none", "expected rows")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); expected rows$"):
        read(tmp_path, "expected rows")


@pytest.mark.parametrize("read", [read_json, read_yaml, read_text])
def test_readers_refuse_files_above_a_size(tmp_path, read):
    file = tmp_path / "data"
    file.write_text("[1, 2, 3]")
    with pytest.raises(UserError, match=f"^{file} is larger than 8 bytes; expected rows$"):
        read(file, "expected rows", largest=8)
    read(file, "expected rows", largest=9)


def test_readers_read_plain_data_exactly(tmp_path):
    plain = {"a": [1, -2.5, 1e300, True, None, "\U0001f600 \\ud83d"], "b": {"": {}}, "c": 10**99}
    text = '{"a": [1, -2.5, 1e300, true, null, "\\ud83d\\ude00 \\\\ud83d"], "b": {"": {}}, "c": ' + str(10**99) + "}"
    file = tmp_path / "data"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_json(file) == plain and parse_json(nested(64), "a text")
    file.write_text("a: [1, -2.5, true, null, x]\nb: {c: 'ü'}\n")
    assert read_yaml(file) == {"a": [1, -2.5, True, None, "x"], "b": {"c": "ü"}}
    assert parse_yaml("[0, 0]", "--set") == [0, 0] and parse_yaml("", "--set") is None and parse_yaml(nested(64), "")
    assert parse_json("[NaN, 1e999, -Infinity]", "a text", non_finite_as_null=True) == [None, None, None]


def test_json_lines_are_numbered_as_editors_number_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\n[1]\n{"a'.encode())
    lines = read_json_lines(file, "expected rows")
    assert [next(lines), next(lines)] == [(1, {"a": "x\u2028y"}), (3, [1])]
    with pytest.raises(UserError, match=f"^{file}, line 4: no JSON .*; expected rows$"):
        next(lines)
    assert len(list(read_json_lines(file, partial_last_line=True))) == 2
    file.write_bytes(b'{"a": 1}\n{"a\n')  # its line is ended, so it is damage
    with pytest.raises(UserError, match="line 2: no JSON"):
        list(read_json_lines(file, partial_last_line=True))


def test_a_file_of_a_registry_defines_one_class():
    assert only_class([int], "a") is int
    with pytest.raises(UserError, match=r"^module a defines int, str; expected one such class in a file$"):
        only_class([int, str], "a")


def test_validation_names_place_field_and_what_is_expected():
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        count: int

    class Outer(BaseModel):
        tasks: list[Inner]

    def sentence(data):
        with pytest.raises(UserError) as refused:
            validated(Outer, data, "a.yml")
        return str(refused.value)

    assert validated(Outer, {"tasks": [{"count": 1}]}, "a.yml").tasks[0].count == 1
    assert sentence({}) == "a.yml has no tasks; expected keys tasks"
    wrong = {"tasks": [{"count": 1}, {"count": "x"}]}
    assert sentence(wrong) == "a.yml, tasks 1: count is 'x'; expected a whole number"
    assert "has unknown key 'other'" in sentence({"tasks": [{"count": 1, "other": 2}]})
    assert sentence([1]) == "a.yml holds list; expected keys tasks"
    assert len(sentence({"tasks": [{"count": ["x" * 10**6] * 1000}]})) < 300


def test_a_written_file_and_its_folder_reach_the_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    calls = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    with atomic_write(tmp_path / "a.json") as part:
        part.write_text("whole")
    assert calls == [str(tmp_path / "a.json.tmp"), "replace", str(tmp_path)]


@pytest.mark.parametrize("read", [read_text, lambda file: list(read_json_lines(file))])
def test_a_device_and_a_pipe_are_no_files(tmp_path, read):
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")  # bytes without end
    os.mkfifo(tmp_path / "b.jsonl")  # which nobody writes to
    for name, what in (("a.jsonl", "a device"), ("b.jsonl", "a named pipe")):
        with pytest.raises(UserError, match=f"{name} is {what} and no file; expected"):
            read(tmp_path / name)


def test_a_sentence_prints_on_one_line_and_is_no_page():
    sentence = str(UserError("task '\x1b[2Ja\nb\u202e\ud83d' in file;\texpected " + "x" * 10**6 + " at the end"))
    assert sentence.startswith("task '□[2Ja b□□' in file; expected xx") and sentence.endswith("xx at the end")
    assert sentence.isprintable() and len(sentence) <= 1500


def test_a_block_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(OSError) as full, atomic_write(file) as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a write, which names no file
    assert full.value.filename == str(file)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as taken, atomic_write(tmp_path / "folder") as part:
        part.write_text("whole")
    assert taken.value.filename == str(tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "earlier")]
    with atomic_write(file) as part:
        part.write_text("later")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("a.json", "later")]


def test_a_file_that_cannot_be_written_is_named_before_the_block_begins(tmp_path):
    begun = False
    with pytest.raises(OSError) as refused, atomic_write(tmp_path / LONG):
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
    monkeypatch.setattr(sys, "argv", ["held_out.py", "--out", str(Path.cwd() / "runs" / "a"), "--model", "/models/b"])
    assert result([])["command"] == "held_out.py --out runs/a --model /models/b"
