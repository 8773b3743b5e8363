"""Both agents learn a problem whose best answer is known; runs repeat, differ by seed, and resume."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym.errors import UserError
from kv_gym.evaluation.replay import replay
from kv_gym.policies import make_policy
from kv_gym.traces import Continuation, Sequence, open_traces
from kv_gym.traces.recording import manifest_of
from kv_gym.traces.writer import TraceWriter
from kv_gym.training import train
from kv_gym.training.settings import Settings

LAYERS, HEADS, TOKENS, DIM = 2, 2, 40, 4
FAST = {"steps": 60, "hidden": 16, "rate": 0.02, "progress": False}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Utility is a known function of one coordinate of the value, another one in every head."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM,
    )  # fmt: skip
    manifest = manifest_of(LlamaForCausalLM(config), None, "auto", {"window": 1, "stats": [], "blocks": 1}, None)
    folder = tmp_path_factory.mktemp("known") / "traces"
    random = np.random.default_rng(0)
    ids = [f"s{i}" for i in range(24)]
    with TraceWriter(folder, manifest).shard(0, ids) as shard:
        for i, name in enumerate(ids):
            keys, values = random.standard_normal((2, LAYERS, HEADS, TOKENS, DIM)).astype(np.float32)
            future = np.zeros((LAYERS, HEADS, TOKENS, 1, 2), np.float32)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    worth = np.exp(3 * values[layer, head, :, layer * HEADS + head])
                    future[layer, head, :, 0, :] = (worth / worth.sum())[:, None]
            continuations = (Continuation(np.zeros(1, int), future, 1),)
            split = "train" if i < 16 else "test"
            sequence = Sequence(
                name, np.arange(TOKENS) % 8, keys, values, keys[:, :, -1:], continuations, (0, 1), (0.5, 0.5),
                task="known", split=split, text_hash=name,
            )  # fmt: skip
            shard.add(sequence, i)
    return folder


@pytest.mark.parametrize("agent", ["joint", "expected"])
def test_agents_learn_the_known_best_ranking(traces, tmp_path, agent):
    policy = train(agent, traces, tmp_path / "policy", **FAST)
    arms = {"learned": policy, "oracle": make_policy("oracle"), "random": make_policy("uniform_order")}
    rows = replay(arms, open_traces(traces).select(split="test"), [0.25], sinks=0, recent=0)
    kept = {row["policy"]: row["utility_kept"] for row in rows}
    assert kept["random"] < 0.4
    assert kept["learned"] > 0.95 * kept["oracle"]
    assert policy.comparable == (agent == "joint")
    reloaded = make_policy(tmp_path / "policy")
    assert reloaded.training["agent"] == agent and reloaded.training["held_out_reward"] > 0
    assert list((tmp_path / "policy" / "tensorboard").glob("events*"))


def test_joint_scores_compare_across_heads():
    """A head with more at stake gets more of one common budget: the joint agent sees it, by construction."""
    from kv_gym.training.joint import joint_loss

    scores = torch.zeros(1, 2, 3, requires_grad=True)
    joint_loss(scores, torch.tensor([[[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]]])).backward()
    # gradient of softmax cross-entropy: softmax minus target, over all six slots at once
    expected = torch.full((6,), 1 / 6) - torch.tensor([4.0, 0, 0, 1, 1, 0]) / 6
    assert torch.allclose(scores.grad.flatten(), expected, atol=1e-6)


def test_a_seed_repeats_a_run_and_another_changes_it(traces, tmp_path):
    weights = []
    for run, seed in enumerate((0, 0, 1)):
        policy = train("joint", traces, tmp_path / str(run), seed=seed, **(FAST | {"steps": 5}))
        weights.append(policy.network.weights[0].detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_interrupted_run_ends_as_an_uninterrupted_one(traces, tmp_path, monkeypatch):
    settings = FAST | {"steps": 20, "every": 5}
    whole = train("expected", traces, tmp_path / "whole", **settings)

    from kv_gym.training import fit

    step, taken = fit._Run._one_step, 0

    def interrupted(run):
        nonlocal taken
        taken += 1
        if taken == 13:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(fit._Run, "_one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("expected", traces, tmp_path / "cut", **settings)
    assert not (tmp_path / "cut" / "policy.json").exists()
    resumed = train("expected", traces, tmp_path / "cut", **settings)
    assert taken == 13 + 10  # it went on from step 10
    for mine, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert resumed.training["held_out_reward"] == whole.training["held_out_reward"]


def test_settings_come_from_the_zoo_and_unknown_ones_are_refused(traces, tmp_path):
    assert Settings.load("joint", steps=None) == Settings.load("joint")
    assert Settings.load("joint", steps=7).steps == 7
    with pytest.raises(UserError, match="unknown setting 'stesp'"):
        train("joint", traces, tmp_path / "out", stesp=5)
    with pytest.raises(UserError, match="setting steps is 'many'"):
        Settings.load("joint", steps="many")
    with pytest.raises(UserError, match="known: distill, expected"):
        train("ppo2", traces, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_not_repeated_and_not_overwritten(traces, tmp_path):
    settings = FAST | {"steps": 5}
    train("joint", traces, tmp_path / "policy", **settings)
    before = (tmp_path / "policy" / "policy.safetensors").stat().st_mtime_ns
    train("joint", traces, tmp_path / "policy", **settings)
    with pytest.raises(UserError, match="trained otherwise"):
        train("joint", traces, tmp_path / "policy", seed=1, **settings)
    assert (tmp_path / "policy" / "policy.safetensors").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_and_a_rate_that_explodes(traces, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged: remove it"):
        train("joint", traces, tmp_path / "damaged", **FAST)
    with pytest.raises(UserError, match="lower rate than 1e\\+30"):
        train("joint", traces, tmp_path / "exploded", **(FAST | {"rate": 1e30}))


def test_one_long_document_is_enough_and_its_last_contexts_choose_the_checkpoint(traces):
    from dataclasses import replace

    from kv_gym.training.contexts import held_out

    one = [replace(sequence, text_hash="one book") for sequence in open_traces(traces).select(split="train").load()]
    training, validation = held_out(one, 0.1)
    assert [s.id for s in validation] == [s.id for s in one[-2:]] and len(training) == 14
    several = open_traces(traces).select(split="train").load()
    training, validation = held_out(several, 0.25)
    assert not {s.text_hash for s in training} & {s.text_hash for s in validation} and len(validation) == 4
    with pytest.raises(UserError, match="at least 4 contexts"):
        held_out(one[:3], 0.1)
