"""Runs of all agents: seeds repeat, runs resume and start from policies, mistakes are refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from known_traces import write_known_traces
from typer.testing import CliRunner

from kv_gym.cli import app
from kv_gym.errors import UserError
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import Scorer
from kv_gym.traces import open_traces
from kv_gym.training import train, trainer
from kv_gym.training.registry import agent_settings, learner_class, list_agents
from kv_gym.training.trainer import split_validation, weights_hash

FAST = {"steps": 20, "every": 5, "hidden": 8, "rate": 0.02, "progress": False}


FROM_TRACES = [agent for agent in list_agents() if not getattr(learner_class(agent), "needs_model", False)]


SMALL = {
    "ppo": {"envs": 4, "rollout": 4, "batch": 8},
    "grpo": {"refresh": 7},
    "foresight": {"refresh": 4, "distill": 0.2},
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


@pytest.fixture(scope="module")
def start_policy(traces, tmp_path_factory):
    """A policy to start from, and to look at; its folder is `first.folder`."""
    folder = tmp_path_factory.mktemp("first") / "policy"
    return SimpleNamespace(folder=folder, policy=train("joint", traces, folder, **FAST))


def weights(policy):
    return torch.cat([tensor.flatten() for tensor in policy.network.state_dict().values()])


@pytest.mark.parametrize("agent", FROM_TRACES)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(traces, tmp_path, monkeypatch, agent):
    settings = FAST | SMALL.get(agent, {})
    uninterrupted = train(agent, traces, tmp_path / "whole", **settings)
    step, taken = trainer.Trainer.train_step, 0

    def interrupted(run):
        nonlocal taken
        taken += 1
        if taken == 13:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(agent, traces, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "policy.json").exists()
    resumed = train(agent, traces, tmp_path / "cut", resume=True, **settings)
    assert taken == 13 + 10  # it went on from step 10
    assert torch.equal(weights(resumed), weights(uninterrupted))
    unlike = {"seconds"}
    assert {k: v for k, v in resumed.training.items() if k not in unlike} == {
        k: v for k, v in uninterrupted.training.items() if k not in unlike
    }


@pytest.mark.parametrize("agent", FROM_TRACES)
def test_a_seed_repeats_a_run_and_another_changes_it(traces, tmp_path, agent):
    runs = [
        weights(train(agent, traces, tmp_path / str(i), seed=seed, **(FAST | SMALL.get(agent, {}) | {"steps": 3})))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("agent", FROM_TRACES)
def test_any_agent_starts_from_any_policy(traces, start_policy, tmp_path, agent):
    unchanged = train(agent, traces, tmp_path / "still", init=start_policy.folder,
                  **(FAST | SMALL.get(agent, {}) | {"hidden": None, "steps": 1, "rate": 0.0}))  # fmt: skip
    assert torch.equal(
        weights(unchanged), weights(start_policy.policy)
    )  # a rate of 0 moves nothing: it did start there
    assert (
        unchanged.training["start"] == weights_hash(start_policy.policy)
        and start_policy.policy.training["start"] == "scratch"
    )
    assert unchanged.training["settings"]["hidden"] == 8  # the first policy's
    moved = train(
        agent, traces, tmp_path / "moved", init=start_policy.policy, **(FAST | SMALL.get(agent, {}) | {"steps": 3})
    )
    assert (
        not torch.equal(weights(moved), weights(start_policy.policy))
        and moved.training["start"] == unchanged.training["start"]
    )


def test_inputs_of_the_start_may_be_left_out(traces, start_policy, tmp_path):
    settings = FAST | {"hidden": None, "inputs": ["value", "key"]}
    fewer = train(
        "joint", traces, tmp_path / "fewer", init=start_policy.folder, **(settings | {"steps": 1, "rate": 0.0})
    )
    network, whole = fewer.network, start_policy.policy.network
    assert network.inputs == ("value", "key") and fewer.static and not start_policy.policy.static
    key, value = torch.randn(2, whole.heads, 5, 4)
    at_mean = whole.mean[..., 8:].expand(-1, 5, -1)
    torch.testing.assert_close(
        network(torch.cat((value, key), -1)), whole(torch.cat((key, value, at_mean), -1))
    )  # as if the place of every token were the mean
    moved = train("joint", traces, tmp_path / "moved", init=start_policy.folder, **(settings | {"steps": 3}))
    assert not torch.equal(weights(moved), weights(fewer))


def test_a_policy_to_start_from_has_to_fit(traces, start_policy, tmp_path):
    start_policy = start_policy.policy
    with pytest.raises(UserError, match="width 8 and hidden is 9"):
        train("expected", traces, tmp_path / "out", init=start_policy, **(FAST | {"hidden": 9}))
    other = replace(start_policy, fingerprint=replace(start_policy.fingerprint, weights="0" * 64))
    with pytest.raises(UserError, match="the policy to start from was made for a model with weights hash 000000000000"):
        train("expected", traces, tmp_path / "out", init=other, **FAST)
    with pytest.raises(UserError, match=r"holds no policy\.json"):
        train("expected", traces, tmp_path / "out", init=tmp_path / "nowhere", **FAST)
    assert not (tmp_path / "out").exists()
    train("expected", traces, tmp_path / "out", **FAST)
    with pytest.raises(UserError, match="trained otherwise"):  # same folder, another start
        train("expected", traces, tmp_path / "out", init=start_policy, **FAST)


def test_resume_goes_on_or_refuses_and_can_be_switched_off(traces, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint of this agent"):
        train("joint", traces, tmp_path / "new", resume=True, **FAST)
    start_policy = train("joint", traces, tmp_path / "policy", **FAST)
    monkeypatch.setattr(trainer.Trainer, "run", lambda *_: pytest.fail("a finished run was repeated"))
    assert torch.equal(weights(train("joint", traces, tmp_path / "policy", resume=True, **FAST)), weights(start_policy))
    monkeypatch.undo()
    steps, step = 0, trainer.Trainer.train_step

    def counted(run):
        nonlocal steps
        steps += 1
        return step(run)

    monkeypatch.setattr(trainer.Trainer, "train_step", counted)
    again = train("joint", traces, tmp_path / "policy", resume=False, **FAST)
    assert steps == 20 and torch.equal(weights(again), weights(start_policy))


def test_what_a_policy_says_of_its_training(traces, tmp_path):
    policy = train("grpo", traces, tmp_path / "policy", **FAST)
    about = make_policy(tmp_path / "policy").training
    assert about == policy.training == json.loads((tmp_path / "policy" / "policy.json").read_text())["training"]
    assert about["samples"] == 20 * 8 * 4 * 8  # steps, contexts, heads, rankings of each
    assert about["start"] == "scratch" and 0 < about["seconds"] < 60 and 0 < about["held_out_reward"] < 1
    assert not policy.comparable and train("joint", traces, tmp_path / "joint", **FAST).comparable


def test_a_finished_run_is_not_repeated_and_not_overwritten(traces, tmp_path):
    settings = FAST | {"steps": 5}
    train("joint", traces, tmp_path / "policy", **settings)
    before = (tmp_path / "policy" / "policy.safetensors").stat().st_mtime_ns
    train("joint", traces, tmp_path / "policy", **settings)
    with pytest.raises(UserError, match="trained otherwise"):
        train("joint", traces, tmp_path / "policy", seed=1, **settings)
    assert (tmp_path / "policy" / "policy.safetensors").stat().st_mtime_ns == before


def test_a_policy_from_before_starts_were_recorded_counts_as_from_scratch(traces, tmp_path):
    policy = train("joint", traces, tmp_path / "new", **FAST)
    old = {k: v for k, v in policy.training.items() if k not in ("start", "samples", "seconds")}
    Scorer(policy.network, policy.fingerprint, policy.lengths, training=old).save_pretrained(tmp_path / "old")
    assert train("joint", traces, tmp_path / "old", **FAST).training == old


def test_a_damaged_checkpoint_and_a_rate_that_explodes(traces, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"damaged, .*remove it"):
        train("joint", traces, tmp_path / "damaged", **FAST)
    for agent in ("joint", "grpo", "ppo"):
        with pytest.raises(UserError, match=r"lower rate than 1e\+30"):
            train(agent, traces, tmp_path / agent, **(FAST | SMALL.get(agent, {}) | {"rate": 1e30}))


def test_one_long_document_is_enough_and_its_last_contexts_choose_the_checkpoint(traces):
    one = [replace(sequence, text_hash="one book") for sequence in open_traces(traces).select(split="train").load()]
    training, validation = split_validation(one, 0.1)
    assert [s.id for s in validation] == [s.id for s in one[-2:]] and len(training) == 14
    several = open_traces(traces).select(split="train").load()
    training, validation = split_validation(several, 0.25)
    assert not {s.text_hash for s in training} & {s.text_hash for s in validation} and len(validation) == 4
    with pytest.raises(UserError, match="at least 4 contexts"):
        split_validation(one[:3], 0.1)


def test_the_supervised_agents_learn_as_they_did_when_the_shipped_policies_were_made(traces):
    """Losses of the first steps, as the version before this file's other agents gave them."""
    losses = {
        ("joint", ("loss", "softmax"), ("target", "utility")): [
            5.042366,
            5.018621,
            5.024224,
            5.02081,
            4.991484,
            4.993714,
            4.966986,
            4.923386,
        ],
        ("expected",): [0.484689, 0.479233, 0.480594, 0.48026, 0.472142, 0.472582, 0.467346, 0.453874],
    }
    for (agent, *settings), expected in losses.items():
        run = trainer.Trainer(
            agent, agent_settings(agent, steps=20, hidden=8, rate=0.02, **dict(settings)), 0, open_traces(traces)
        )
        run.setup()
        assert [float(run.train_step()["loss"]) for _ in expected] == pytest.approx(expected, rel=1e-4)


def test_the_command_line_starts_from_a_policy_and_resumes(traces, start_policy, tmp_path):
    command = ["train", "distill", "--traces", str(traces), "--steps", "3", "--rate", "0.01", "--no-progress"]
    command += ["--set", "contexts=2", "--set", "protect=[0, 3]"]
    run = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--init", str(start_policy.folder)])
    assert run.exit_code == 0 and "held-out reward" in run.stdout
    made = make_policy(tmp_path / "out")
    assert made.training["start"] == weights_hash(start_policy.policy)
    assert made.protection == (0, 3) and made.training["settings"]["contexts"] == 2
    with pytest.raises(UserError, match="no checkpoint"):
        CliRunner().invoke(app, [*command, "--out", str(tmp_path / "new"), "--resume"], catch_exceptions=False)
