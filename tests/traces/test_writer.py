"""A trace set comes back as it was written, survives a kill, and is refused when it is not whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from traced_models import PROMPTS, same, some_prompt, tiny_model

from kv_gym.errors import UserError
from kv_gym.traces import Prompt, open_traces, record, record_sequence, validate
from kv_gym.traces.recorder import make_manifest
from kv_gym.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "set"
    record(tiny_model(), PROMPTS, out, shard_size=2, window=4, progress=False, recipe={"from": "noise"})
    return out


@pytest.fixture
def copy(recorded, tmp_path):
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_exact(dtype, tmp_path):
    import torch

    model = tiny_model().to(getattr(torch, dtype))
    traces = record(model, PROMPTS[:1], tmp_path / "set", progress=False)
    assert same(traces[0], record_sequence(model, PROMPTS[0]))
    assert traces.manifest["storage"] == dtype
    with h5py.File(traces.entries[0].path) as file:
        keys = file["sequences/p0/context/keys"]
        assert keys.dtype.itemsize == (4 if dtype == "float32" else 2)
        assert keys.chunks == (1, 1, 24, 8)
    assert str(tmp_path) not in json.dumps(traces.manifest)


def test_float32_storage_of_a_bfloat16_model_holds_the_same_numbers(tmp_path):
    model = tiny_model().bfloat16()
    wide = record(model, PROMPTS[:1], tmp_path / "wide", storage="float32", progress=False)
    assert same(wide[0], record_sequence(model, PROMPTS[0]))
    with pytest.raises(UserError, match="storage 'float16' is not usable"):
        record(tiny_model(), PROMPTS[:1], tmp_path / "narrow", storage="float16", progress=False)


def test_bfloat16_storage_of_a_float32_model_rounds_what_is_cached_and_not_the_futures(tmp_path):
    exact, rounded = (
        record(tiny_model(), PROMPTS[:1], tmp_path / storage, storage=storage, progress=False)[0]
        for storage in ("float32", "bfloat16")
    )
    for name in ("keys", "values", "queries"):
        expected = torch.from_numpy(getattr(exact, name)).bfloat16().float()
        assert torch.equal(torch.from_numpy(getattr(rounded, name)), expected)
    for mine, theirs in zip(rounded.continuations, exact.continuations, strict=True):
        assert (mine.future == theirs.future).all()
    assert rounded.dtype == "float32"
    assert validate(tmp_path / "bfloat16")["sequences"] == 1


def test_a_set_is_read_in_the_order_of_its_prompts(recorded):
    traces = open_traces(recorded)
    assert traces.ids == [f"p{i}" for i in range(5)]
    assert len(list(recorded.glob("shard-*.h5"))) == 3
    assert [s.id for s in traces.load()] == [s.id for s in traces] == traces.ids
    assert np.array_equal(traces["p3"].tokens, PROMPTS[3].context_ids)
    assert traces[-1].id == "p4"
    with pytest.raises(IndexError):
        traces[5]
    with pytest.raises(UserError, match="no sequence 'q'"):
        traces["q"]


def test_one_shard_is_a_set_of_its_own(recorded):
    shard = sorted(recorded.glob("*.h5"))[1]
    alone = open_traces(shard)
    assert alone.ids == ["p2", "p3"]
    assert alone.manifest == open_traces(recorded).manifest
    assert same(alone[0], open_traces(recorded)["p2"])


def test_select_by_split_and_task(tmp_path):
    ids = PROMPTS[0].context_ids
    prompts = [
        Prompt("a", ids, [[1]], task="x", split="train"),
        Prompt("b", ids, [[1]], task="x", split="test"),
        Prompt("c", ids, [[1]], task="y", split="test"),
    ]
    traces = record(tiny_model(), prompts, tmp_path / "set", progress=False)
    assert traces.select(split="test").ids == ["b", "c"]
    assert traces.select(split="test", task="x").ids == ["b"]
    assert traces.select(task="z").ids == []
    assert traces.select(split="test")["c"].task == "y"


def test_hash_is_that_of_the_content_not_of_the_shards(recorded, tmp_path):
    traces = open_traces(recorded)
    other = record(
        tiny_model(), PROMPTS, tmp_path / "x", shard_size=5, window=4, progress=False, recipe={"from": "noise"}
    )
    assert other.hash == traces.hash
    assert traces.select(split="train").hash == traces.hash
    fewer = record(tiny_model(), PROMPTS[:4], tmp_path / "y", window=4, progress=False)
    assert fewer.hash != traces.hash


def test_light_sequences_lie_beside_full_ones(tmp_path):
    model = tiny_model()
    writer = TraceWriter(tmp_path / "set", make_manifest(model, None, "auto", {}, None))
    with writer.shard(0, ["p0", "p1"]) as shard:
        shard.add(record_sequence(model, PROMPTS[0]), 0)
        shard.add(record_sequence(model, PROMPTS[1], window=0, stats=()), 1)
    traces = open_traces(tmp_path / "set")
    assert traces[1].queries.shape == (3, 4, 0, 8)
    assert traces[1].stats == {}
    assert traces[0].queries.shape == (3, 4, 24, 8)
    assert validate(tmp_path / "set")["arrays"] == 2 * (3 + 4) + 2


def test_recording_again_adds_only_what_is_missing(recorded, copy):
    untouched, removed, _ = sorted(copy.glob("*.h5"))
    before = untouched.stat().st_mtime_ns
    removed.unlink()
    traces = record(tiny_model(), PROMPTS, copy, shard_size=2, window=4, progress=False, recipe={"from": "noise"})
    assert traces.hash == open_traces(recorded).hash
    assert removed.exists()
    assert untouched.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": 5}, "settings"),
        ({"recipe": {"from": "books"}}, "recipe"),
        ({"seed": 1}, "weights hash"),
        ({"num_key_value_heads": 4}, "kv_heads"),
    ],
)
def test_another_recording_may_not_join(copy, changes, reason):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = tiny_model(**{k: v for k, v in changes.items() if k in ("seed", "num_key_value_heads")})
    settings = {"window": 4, "recipe": {"from": "noise"}} | {
        k: v for k, v in changes.items() if k in ("window", "recipe")
    }
    with pytest.raises(UserError, match=reason):
        record(model, [*PROMPTS, some_prompt(name="new")], copy, progress=False, **settings)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_prompts_that_contradict_what_is_there_are_refused(copy):
    settings = {"window": 4, "recipe": {"from": "noise"}, "progress": False}
    with pytest.raises(UserError, match="sequence p0 of other tokens"):
        record(tiny_model(), [some_prompt((5, 18), "p0", seed=9, context=24)], copy, **settings)
    with pytest.raises(UserError, match="two prompts have the id"):
        record(tiny_model(), [PROMPTS[0], PROMPTS[0]], copy, **settings)
    ids = PROMPTS[0].context_ids
    both = [Prompt("a", ids, [], split=split, text_hash="book") for split in ("train",)]
    both.append(Prompt("b", ids, [], split="test", text_hash="book"))
    with pytest.raises(UserError, match="both train and test"):
        record(tiny_model(), both, copy, **settings)


def test_a_recipe_is_json_and_compared_as_such(tmp_path):
    settings = {"window": 4, "recipe": {"lengths": (24, 24)}, "progress": False}  # JSON turns the tuple into a list
    first = record(tiny_model(), PROMPTS[:1], tmp_path / "set", **settings)
    again = record(tiny_model(), PROMPTS[:2], tmp_path / "set", **settings)
    assert (first.ids, again.ids) == (["p0"], ["p0", "p1"])
    assert again.manifest["recipe"] == {"lengths": [24, 24]}
    with pytest.raises(UserError, match="no plain JSON"):
        record(tiny_model(), PROMPTS, tmp_path / "other", recipe={"model": tiny_model}, progress=False)


def test_a_failing_prompt_leaves_the_whole_shards_and_nothing_else(tmp_path):
    bad = Prompt("bad", [1, 2, 999], [[3]])
    out = tmp_path / "deep" / "set"
    with pytest.raises(UserError, match="token id 999"):
        record(tiny_model(), [bad], out, progress=False)
    assert not out.exists()
    with pytest.raises(UserError, match="token id 999"):
        record(tiny_model(), [*PROMPTS[:3], bad], out, shard_size=2, progress=False)
    assert open_traces(out).ids == ["p0", "p1"]
    assert {path.suffix for path in out.iterdir()} == {".h5", ".json"}


def test_two_recorders_with_other_counts_make_one_set(recorded, tmp_path):
    out, settings = tmp_path / "set", {"window": 4, "progress": False, "recipe": {"from": "noise"}}
    record(tiny_model(), PROMPTS[:3], tmp_path / "elsewhere", shard_size=3, **settings)
    record(tiny_model(), PROMPTS, out, shard_size=2, **settings)
    for shard in (tmp_path / "elsewhere").glob("*.h5"):
        shutil.copy(shard, out)
    assert open_traces(out).hash == open_traces(recorded).hash
    assert validate(out)["sequences"] == 5
    assert len(record(tiny_model(), PROMPTS, out, **settings)) == 5


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path):
    script = (
        f"import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
        "from traced_models import PROMPTS, tiny_model\nfrom kv_gym.traces import record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))\n"
        f"try:\n    record(tiny_model(), PROMPTS, {str(tmp_path / 'set')!r}, progress=False)\n"
        "except ValueError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reason = "(File too large): make room, then record again; whole shards are kept"
    assert (run.stdout, run.stderr) == (f"{tmp_path / 'set'} cannot be written to {reason}\n", "")
    assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no trace set"):
        record(tiny_model(), PROMPTS, tmp_path, progress=False)
    with pytest.raises(UserError, match="is a file"):
        record(tiny_model(), PROMPTS, tmp_path / "thesis.txt", progress=False)
    with pytest.raises(UserError, match="no prompts"):
        record(tiny_model(), [], tmp_path / "new", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


KILLED = """
import sys, time
sys.path.insert(0, {support!r})
from traced_models import PROMPTS, tiny_model
from kv_gym.traces import record
from kv_gym.traces import recorder as recording
plain, done = recording._record_prompt, []
def slow(*rest):
    if len(done) == 3:
        print("now", flush=True)
        time.sleep(60)
    done.append(1)
    return plain(*rest)
recording._record_prompt = slow
record(tiny_model(), PROMPTS, {out!r}, shard_size=2, window=4, progress=False, recipe={{"from": "noise"}})
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_shard_and_run_again(recorded, tmp_path):
    out = tmp_path / "set"
    script = KILLED.format(support=str(Path(__file__).parents[1] / "support"), out=str(out))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        os.kill(process.pid, signal.SIGKILL)
    assert len(list(out.glob("*.tmp"))) == 1, "the kill came between two shards and tests nothing"
    assert open_traces(out).ids == ["p0", "p1"]
    traces = record(tiny_model(), PROMPTS, out, shard_size=2, window=4, progress=False, recipe={"from": "noise"})
    assert not list(out.glob("*.tmp"))
    assert traces.ids == open_traces(recorded).ids
    assert traces.hash == open_traces(recorded).hash
    assert all(same(a, b) for a, b in zip(traces, open_traces(recorded), strict=True))
