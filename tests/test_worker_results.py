"""What several processes make, of this machine or of a Ray cluster, is what one makes, to the byte."""

import multiprocessing
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
from traced_models import some_prompt, tiny_model
from worker_tasks import dying

from kv_gym.errors import UserError
from kv_gym.evaluation import evaluate
from kv_gym.models import load_model
from kv_gym.pages import compare_page_policies
from kv_gym.traces import record
from kv_gym.workers import WorkerPool

pytestmark = pytest.mark.slow
PROMPTS = [some_prompt((5, 18), f"p{i}", seed=i, context=24) for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model(bos_token_id=None, eos_token_id=None, pad_token_id=0).save_pretrained(folder)
    return load_model(folder, "cpu")[0]


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """Recorded by one process with one thread."""
    out = tmp_path_factory.mktemp("recorded") / "set"
    record(model, PROMPTS, out, shard_size=2, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine whose processes carry a mark; skipped where Ray is not installed."""
    ray = pytest.importorskip("ray", reason="the package ray is not installed: make ray")
    mark = uuid.uuid4().hex
    os.environ["KV_GYM_TEST_CLUSTER"] = mark
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield mark
    ray.shutdown()
    del os.environ["KV_GYM_TEST_CLUSTER"]


def workers_of(mark):
    """Process numbers of the cluster's workers that have begun."""
    for process in Path("/proc").iterdir():
        try:
            own = process.name.isdigit() and mark.encode() in (process / "environ").read_bytes()
            if own and b"ray::_RayWorker" in (process / "cmdline").read_bytes():
                yield int(process.name)
        except OSError:  # it has ended
            continue


def kill_when(ready, processes):
    """Kill one of the processes as soon as `ready()`; returns the thread, whose `killed` is set then."""

    def watch():
        while not ready():
            time.sleep(0.005)
        os.kill(next(iter(processes())), signal.SIGKILL)
        thread.killed = True

    thread = threading.Thread(target=watch, daemon=True)
    thread.killed = False
    thread.start()
    return thread


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_processes_record_the_bytes_of_one_and_one_of_them_is_killed(model, recorded, tmp_path):
    out = tmp_path / "set"
    children = lambda: [child.pid for child in multiprocessing.active_children()]  # noqa: E731
    killer = kill_when(lambda: any(out.glob("*.h5")), children)
    record(model, PROMPTS, out, shard_size=2, workers=2, progress=False)
    assert killer.killed
    assert content(out) == content(recorded)
    next(out.glob("*.h5")).unlink()  # as after an interruption
    record(model, PROMPTS, out, shard_size=2, workers=2, progress=False)
    assert content(out) == content(recorded)


def test_a_cluster_records_the_bytes_of_one_process_and_a_worker_is_killed(model, recorded, tmp_path, cluster):
    out = tmp_path / "set"
    killer = kill_when(lambda: any(out.glob("*.h5")), lambda: workers_of(cluster))
    record(model, PROMPTS, out, shard_size=2, ray="auto", progress=False)
    assert killer.killed
    assert content(out) == content(recorded)


def test_a_cluster_gives_up_a_task_at_which_workers_die(tmp_path, cluster):
    with WorkerPool(dying, lambda: (str(tmp_path), 1), ray="auto") as pool:
        assert pool.count == 2
        assert sorted(task for task, _ in pool.run(range(5))) == list(range(5))
    with (
        pytest.raises(UserError, match="a worker died"),
        WorkerPool(dying, lambda: (str(tmp_path), 9), ray="auto") as pool,
    ):
        list(pool.run([2]))
    with pytest.raises(UserError, match="has room for a worker of 1 CPUs and 1 GPUs"):
        WorkerPool(dying, lambda: (str(tmp_path), 0), ray="auto:gpus=1")


@pytest.mark.parametrize("engine", [{"workers": 2}, {"ray": "auto"}], ids=["processes", "ray"])
def test_rows_are_those_of_one_process(model, recorded, request, engine):
    if "ray" in engine:
        request.getfixturevalue("cluster")
    ask = [
        {"context_ids": prompt.context_ids, "question_ids": [1, 2], "answer_ids": [3]} for prompt in PROMPTS
    ]  # in two batches
    for given in ({"model": model, "tasks": ask}, {"traces": recorded, "split": "all"}):
        one, other = (
            evaluate(["knorm", "h2o"], [0.5, 6], **given, **how, progress=False)["rows"]
            for how in ({"workers": 1}, engine)
        )
        assert [row | {"milliseconds": 0} for row in one] == [row | {"milliseconds": 0} for row in other]
    pages = {"requests": "traces/requests/sample.jsonl.gz", "policies": ("lru", "random_page"), "capacities": (50, 100)}
    assert compare_page_policies(**pages, **engine) == compare_page_policies(**pages)


def test_a_changed_model_is_not_taken_for_the_one_in_its_folder(model, recorded, tmp_path):
    changed, _ = load_model(model.config.name_or_path, "cpu")
    changed.model.layers[0].self_attn.k_proj.weight.data.mul_(2)
    with pytest.raises(UserError, match="the model was changed after it had been loaded"):
        record(changed, PROMPTS, tmp_path / "set", shard_size=2, workers=2, progress=False)
    with pytest.raises(UserError, match="no folder and no name on the Hub"):
        record(tiny_model(), PROMPTS, tmp_path / "set", shard_size=2, workers=2, progress=False)
    assert not (tmp_path / "set").exists()
