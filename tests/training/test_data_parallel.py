"""Processes that torchrun starts train what one process trains with the same batch."""

import os
import subprocess
import sys

import pytest
import torch
from known_traces import write_known_traces
from traced_models import PROMPTS, some_prompt, tiny_model

from kv_gym.errors import UserError
from kv_gym.models import load_model
from kv_gym.policies.scorer import Scorer
from kv_gym.traces import record
from kv_gym.training import train
from kv_gym.training.data_parallel import Processes
from kv_gym.training.joint import Joint, JointSettings

SETTINGS = {"steps": 12, "every": 4, "hidden": 8}


def torchrun(*words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "kv_gym"]
    return subprocess.run([*command, "train", *map(str, words)], capture_output=True, text=True, timeout=200)


def options(settings):
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def test_every_context_belongs_to_one_process():
    for count in (1, 2, 3):
        shares = [list(range(8))[Processes(rank, count).own(8)] for rank in range(count)]
        assert [context for share in shares for context in share] == list(range(8)) and min(
            map(len, shares)
        ) >= 8 // count
    with pytest.raises(UserError, match="9 processes cannot share 8 contexts per step"):
        Processes(0, 9).own(8)


def test_shares_of_a_batch_add_up_to_its_gradient(tmp_path, monkeypatch):
    """What each of three processes computes of one step, summed here as gloo would."""
    parts = []
    monkeypatch.setattr(Processes, "add_gradients", lambda self, parameters, loss: parts.append(loss) or loss)
    from kv_gym.traces import open_traces

    traces = open_traces(write_known_traces(tmp_path / "traces", hidden=False)).load()
    gradients = []
    for processes in (Processes(), *(Processes(rank, 3) for rank in range(3))):
        torch.manual_seed(0)
        network = Joint.make_network(JointSettings(hidden=8), open_traces(tmp_path / "traces").fingerprint, 0)
        learner = Joint(JointSettings(hidden=8), 0, network)
        learner.processes = processes
        learner.prepare(traces[:12])
        monkeypatch.setattr(learner.optimizer, "step", lambda: None)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(0.0))
        learner.step(3)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(sum(gradients[1:]), gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sum(parts[1:]), parts[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_the_policy_of_one(tmp_path):
    model = tmp_path / "model"
    tiny_model(bos_token_id=None, eos_token_id=None, pad_token_id=0).save_pretrained(model)
    prompts = PROMPTS + [some_prompt((5, 18), f"p{i}", seed=i, context=24) for i in range(5, 12)]
    loaded, _ = load_model(model, "cpu")
    record(loaded, prompts, tmp_path / "traces", progress=False)
    for agent, given in (("end_to_end", {"contexts": 3, "largest": 0.5, "smallest": 0.1}), ("joint", {"contexts": 5})):
        settings = SETTINGS | given
        one = train(agent, tmp_path / "traces", tmp_path / f"{agent}-1", model=loaded, progress=False, **settings)
        out = tmp_path / f"{agent}-2"
        done = torchrun(
            agent, "--traces", tmp_path / "traces", "--model", model, "--out", out, "--no-progress", *options(settings)
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("held-out reward") == 1
        two = Scorer.from_pretrained(out)
        for name, tensor in one.network.state_dict().items():
            torch.testing.assert_close(two.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
        assert two.training["held_out_reward"] == pytest.approx(one.training["held_out_reward"], abs=1e-4)
        assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / f"{agent}-1").iterdir()}


def test_what_several_processes_cannot_do_is_refused(tmp_path, monkeypatch):
    traces = write_known_traces(tmp_path / "traces", hidden=False)
    monkeypatch.setattr(Processes, "of_torchrun", classmethod(lambda cls, device: cls(0, 2)))
    for agent, given, sentence in (
        ("rloo", {}, "agent 'rloo' trains in one process"),
        ("joint", {"minutes": 1.0}, "a time is planned for one process"),
        ("joint", {"contexts": 1}, "2 processes cannot share 1 contexts"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(agent, traces, tmp_path / "out", progress=False, **given)
    assert not os.path.exists(tmp_path / "out")
