"""Trace sets and results at an address of fsspec are those of a folder, also after an interruption."""

import os

import fsspec
import pytest
from traced_models import PROMPTS, tiny_model
from typer.testing import CliRunner

from kv_gym import cli
from kv_gym.errors import UserError
from kv_gym.evaluation.leaderboard import leaderboard, read_rows
from kv_gym.files import bundled
from kv_gym.remote import RemoteFolder, remote_folder
from kv_gym.traces import open_traces, record, validate


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def settings(**more):
    return {"shard_size": 2, "window": 4, "progress": False} | more


def test_a_trace_set_at_an_address_is_that_of_a_folder(tmp_path, memory, monkeypatch):
    local = record(tiny_model(), PROMPTS, tmp_path / "set", **settings())
    there = record(tiny_model(), PROMPTS, "memory://bucket/set", **settings())
    assert there.hash == local.hash
    names = {path.name for path in (tmp_path / "set").iterdir()}
    assert {file.rpartition("/")[2] for file in memory.find("/bucket/set")} == names
    assert all(memory.cat(f"/bucket/set/{name}") == (tmp_path / "set" / name).read_bytes() for name in names)
    first = min(name for name in names if name.endswith(".h5"))
    memory.rm(f"/bucket/set/{first}")  # as after an interruption; the copy of it goes as well
    assert open_traces("memory://bucket/set").ids == ["p2", "p3", "p4"]
    assert record(tiny_model(), PROMPTS, "memory://bucket/set", **settings()).hash == local.hash
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert validate("memory://bucket/set")["hash"] == local.hash
    assert CliRunner().invoke(cli.app, ["trace", "info", "memory://bucket/set"]).exit_code == 0
    with pytest.raises(UserError, match="was recorded with settings"):
        record(tiny_model(), PROMPTS, "memory://bucket/set", **settings(window=5))
    assert open_traces(f"file://{tmp_path}/set").hash == local.hash


def test_a_file_that_changed_is_fetched_again(tmp_path, memory):
    memory.pipe({"/b/a.txt": b"one", "/b/in/c.txt": b"two", "/b/d.log": b"three"})
    folder = RemoteFolder("memory://b")
    assert sorted(file.name for file in folder.fetch(["*.txt"]).rglob("*.txt")) == ["a.txt", "c.txt"]
    memory.pipe("/b/a.txt", b"new")
    written = os.stat(folder.copy / "in" / "c.txt").st_mtime_ns
    folder.fetch(["*.txt"])
    assert (folder.copy / "a.txt").read_bytes() == b"new"
    assert os.stat(folder.copy / "in" / "c.txt").st_mtime_ns == written
    (tmp_path / "e.txt").write_text("more")
    folder.put(tmp_path / "e.txt", "in/e.txt")
    assert memory.cat("/b/in/e.txt") == b"more" == (folder.copy / "in" / "e.txt").read_bytes()
    folder.remove("in/e.txt")
    assert not memory.exists("/b/in/e.txt") and not (folder.copy / "in" / "e.txt").exists()


def test_a_leaderboard_at_an_address_goes_on(tmp_path, memory, monkeypatch):
    spec = {
        "utility": {"traces": "traces/sample", "contexts": 2, "oracles": ["oracle"]},
        "budgets": ["1/2"],
        "policies": ["knorm"],
    }
    rows = leaderboard(spec, "memory://bucket/rows", progress=False)
    (tmp_path / "rows.jsonl").write_bytes(memory.cat("/bucket/rows/rows.jsonl"))
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert not [file for file in memory.find("/bucket/rows") if "batches" in file]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    monkeypatch.setattr(
        "kv_gym.evaluation.leaderboard.run.Runner.measure", lambda *_: pytest.fail("it was measured again")
    )
    assert leaderboard(spec, "memory://bucket/rows", progress=False) == rows


def test_addresses_that_cannot_be_used_are_refused_in_one_sentence(tmp_path, memory, monkeypatch):
    with pytest.raises(UserError, match=r"Protocol not known.*expected a path, or an address"):
        open_traces("nowhere://bucket/set")
    with pytest.raises(UserError, match="there are no traces at memory://bucket/none"):
        open_traces("memory://bucket/none")
    with pytest.raises(UserError, match="names no folder"):
        open_traces("memory://")
    if fsspec.utils.get_protocol("s3://b") and not _installed("s3fs"):
        with pytest.raises(UserError, match="s3fs"):
            open_traces("s3://bucket/set")
    refuse = lambda *_, **__: (_ for _ in ()).throw(PermissionError("read only"))  # noqa: E731
    monkeypatch.setattr(type(memory), "put_file", refuse)
    with pytest.raises(UserError, match=r"memory://bucket/set cannot be written to \(read only\)"):
        record(tiny_model(), PROMPTS, "memory://bucket/set", **settings())
    assert remote_folder(tmp_path) is None and remote_folder("C:/set") is None and remote_folder("a:b") is None


def _installed(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def test_other_commands_refuse_an_address_and_leave_nothing(tmp_path, monkeypatch):
    sample, requests = bundled("traces"), bundled("requests") / "sample.jsonl.gz"
    monkeypatch.chdir(tmp_path)
    for words in (
        "demo --out s3://bucket/new",
        f"evaluate --traces {sample} --policies keydiff --budgets 1/2 --json s3://bucket/new.json",
        "export policy --tensors s3://bucket/new.safetensors",
        "fit --model reference --data reference --count 16 --tokens 64 --tolerance 0.5 --out s3://bucket/new",
        f"pages simulate {requests} --policies lru --capacity 100 --json s3://bucket/new.json",
        f"pages train clone {requests} --capacity 100 --out s3://bucket/new",
        "serve --model reference --port 0 --folder s3://bucket/new",
        f"trace show {sample} --out s3://bucket/new.png",
        f"train joint --traces {sample} --out s3://bucket/new",
    ):
        found = CliRunner().invoke(cli.app, words.split()).exception
        assert isinstance(found, UserError), (words, found)
        assert "s3://bucket/" in str(found) and "is an address; expected a path of this machine" in str(found), words
    assert not list(tmp_path.iterdir())
