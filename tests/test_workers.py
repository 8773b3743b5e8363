"""Tasks in other processes give what they give in this one, and a worker that dies is replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from worker_tasks import dying, squarer

from kv_gym.errors import UserError
from kv_gym.workers import MOST_TRIES, RayAddress, WorkerPool


def test_results_are_those_of_one_process():
    with WorkerPool(squarer, lambda: (1,)) as alone, WorkerPool(squarer, lambda: (1,), workers=2) as pool:
        assert not alone.elsewhere and pool.elsewhere
        expected = [(task, result[0]) for task, result in alone.run(range(9))]
        pool.start()
        found = list(pool.run(iter(range(9))))
        assert sorted((task, result[0]) for task, result in found) == expected
        processes = {process for _, (_, process) in found}
        assert os.getpid() not in processes and len(processes) == 2
        with pytest.raises(UserError, match="-3 is negative"):
            list(pool.run([1, -3]))


@pytest.mark.parametrize("deaths", [1, MOST_TRIES])
def test_the_task_of_a_worker_that_died_is_tried_again(tmp_path, deaths):
    with WorkerPool(dying, lambda: (str(tmp_path), deaths), workers=2) as pool:
        if deaths < MOST_TRIES:
            assert sorted(task for task, _ in pool.run(range(4))) == [0, 1, 2, 3]
        else:
            with pytest.raises(UserError, match=r"a worker died \(exit code -9\), as did those that tried its task"):
                list(pool.run([2]))
    assert len(list(tmp_path.iterdir())) == deaths


def test_what_cannot_be_run_elsewhere_is_refused():
    with pytest.raises(UserError, match="workers is 0; expected a number from 1 to"):
        WorkerPool(squarer, workers=0)
    with (
        pytest.raises(UserError, match="other processes cannot be sent what they need"),
        WorkerPool(squarer, lambda: (lambda: 0,), workers=2) as pool,
    ):
        list(pool.run([1, 2]))
    assert not WorkerPool(squarer, lambda: (1,), workers=2, tasks=1).elsewhere


def test_the_address_of_a_cluster_has_the_share_of_a_worker():
    assert RayAddress.parse("auto") == RayAddress("auto")
    assert RayAddress.parse("ray://head:10001:gpus=0.25") == RayAddress("ray://head:10001", 1.0, 0.25)
    assert RayAddress.parse("local:cpus=2:gpus=1") == RayAddress("local", 2.0, 1.0)
    for wrong in ("auto:disks=1", "auto:cpus=few", "auto:gpus=-1", "cpus=1"):
        with pytest.raises(UserError, match="ray is '"):
            RayAddress.parse(wrong)


def test_without_the_package_ray_a_sentence_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"need the package ray: pip install 'kv-gym\[ray\]'"):
        WorkerPool(squarer, lambda: (1,), ray="auto")


KILLED = """
import os, signal, sys, threading
from worker_tasks import sleeper
from kv_gym.workers import WorkerPool

if __name__ == "__main__":
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    with WorkerPool(sleeper, lambda: (90,), workers=2) as pool:
        list(pool.run([1, 2]))
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    # workers have the same standard output, which ends with the last process that holds it
    (tmp_path / "killed.py").write_text(KILLED)
    support = Path(__file__).parent / "support"
    environment = os.environ | {"PYTHONPATH": f"{support}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(tmp_path / "killed.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, env=environment)
    assert done.returncode == -9


@pytest.mark.slow
def test_a_script_without_the_guard_is_told_so(tmp_path):
    (tmp_path / "bare.py").write_text(KILLED.replace('if __name__ == "__main__":', "if True:").replace("90", "0"))
    support = Path(__file__).parent / "support"
    environment = os.environ | {"PYTHONPATH": f"{support}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script = (tmp_path / "bare.py").read_text().replace("threading.Timer", "#")
    (tmp_path / "bare.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "bare.py")], capture_output=True, text=True, timeout=60, env=environment
    )
    assert "does so below `if __name__ == '__main__':`" in done.stderr
