"""Training on contexts that are recorded when they are drawn, without traces on the disk."""

import json

import pytest
import torch
from traced_models import some_prompt, tiny_model
from typer.testing import CliRunner

from kv_gym import cli
from kv_gym.errors import UserError
from kv_gym.files import MODEL
from kv_gym.policies import make_policy
from kv_gym.traces import StreamedTraces, record
from kv_gym.training import train
from kv_gym.training.registry import agent_settings
from kv_gym.training.trainer import Trainer

PROMPTS = [some_prompt((5, 18), f"p{i}", seed=i, context=60 + i) for i in range(6)]
SETTINGS = {"hidden": 8, "contexts": 2, "every": 4}


def weights(policy):
    return torch.cat([parameter.flatten() for parameter in policy.network.parameters()])


@pytest.mark.parametrize(("agent", "more"), [("kvzap", {"hidden": True}), ("end_to_end", {})])
def test_training_on_a_stream_equals_training_on_written_traces(agent, more, tmp_path):
    model = tiny_model()
    written = record(model, PROMPTS, tmp_path / "set", stats=(), progress=False, **more)
    streamed = StreamedTraces(model, PROMPTS, **more)
    settings = SETTINGS | {"steps": 4, "model": model, "progress": False}
    policies = [train(agent, traces, tmp_path / str(i), **settings) for i, traces in enumerate((written, streamed))]
    assert torch.equal(*map(weights, policies))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "set"]


def test_an_interrupted_run_goes_on(tmp_path):
    model = tiny_model()

    def stream(**changes):
        return StreamedTraces(model, PROMPTS, **({"slots": 32} | changes))

    settings = SETTINGS | {"steps": 8, "every": 8}
    whole = train("rloo", stream(), tmp_path / "whole", progress=False, memory=1e-4, **settings)
    trainer = Trainer("rloo", agent_settings("rloo", **settings), 0, stream(), memory=100_000)  # one context at a time
    trainer.setup()
    for _ in range(5):
        trainer.train_step()
    (tmp_path / "cut").mkdir()
    trainer._save(tmp_path / "cut/checkpoint.pt")
    with pytest.raises(UserError, match="holds no checkpoint of this agent with the same"):
        train("rloo", stream(slot_seed=1), tmp_path / "cut", resume=True, progress=False, **settings)
    # with more memory than before: mean and scale of the inputs stay those of the run
    resumed = train("rloo", stream(), tmp_path / "cut", resume=True, progress=False, memory=1, **settings)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.training["traces"] == whole.training["traces"]


def test_what_cannot_be_streamed(tmp_path):
    with pytest.raises(UserError, match="7 prompts have 6 ids"):
        StreamedTraces(tiny_model(), [*PROMPTS, PROMPTS[0]])
    with pytest.raises(UserError, match="slots is 3"):
        StreamedTraces(tiny_model(), PROMPTS, slots=3)
    with pytest.raises(UserError, match="prompt p5 with its longest continuation has 83 tokens and the model 80"):
        StreamedTraces(tiny_model(max_position_embeddings=80), PROMPTS[5:])
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"context_ids": [1, 2, 3], "continuation_ids": [[4]]}) + "\n")
    for more, reason in (
        ([], "needs either --traces"),
        (["--stream", str(file)], "name the model to record"),
        (["--traces", "x", "--slots", "64"], "are for --stream"),
    ):
        refused = CliRunner().invoke(cli.app, ["train", "rloo", "--out", str(tmp_path / "no"), *more])
        assert isinstance(refused.exception, UserError) and reason in str(refused.exception)


def test_the_command(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"context_ids": [*range(1, 60 + i)], "continuation_ids": [[4, 5, 6]]} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "joint", "--stream", str(file), "--model", str(MODEL), "--out", str(tmp_path / "policy")]
    command += ["--steps", "2", "--hidden", "8", "--set", "contexts=2", "--no-progress"]
    for more in (["--slots", "32"], ["--set", "target=kvzip", "--out", f"{tmp_path}/again"]):
        done = CliRunner().invoke(cli.app, [*command, *more])
        assert done.exit_code == 0 and "held-out reward" in done.output, done.output
    assert make_policy(tmp_path / "policy").training["settings"]["target"] == "mean"  # the rest reads all slots
    taught = make_policy(tmp_path / "again").training
    assert taught["settings"]["target"] == "kvzip"
