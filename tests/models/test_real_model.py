"""The main job on a real pretrained model and real text, where both are at hand."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kv_gym.cli import app

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL, NOVEL = DATA / "models" / "stories260K", DATA / "corpora" / "novels" / "Kipling_Kim_1901.txt"

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and NOVEL.is_file()), reason="the pretrained model stories260K and the novels are not here"
)


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "traces"
    run(
        "record", "--model", MODEL, "--text", NOVEL, "--tokens", 192, "--continuation-tokens", 64, "--count", 6,
        "--out", folder, "--no-progress",
    )  # fmt: skip
    return folder


def test_a_novel_is_recorded_validated_and_replayed(traces, tmp_path):
    assert "sequences: 6" in run("trace", "validate", traces)
    run(
        "evaluate", "--traces", traces, "--split", "all", "--policies", "oracle,h2o,snapkv,random",
        "--budgets", "1/4,1.0", "--json", tmp_path / "result.json", "--no-progress",
    )  # fmt: skip
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    kept = {(row["policy"], row["budget"]): row["utility_kept"] for row in rows}
    assert all(kept[name, 1.0] == pytest.approx(1.0) for name in ("oracle", "h2o", "snapkv", "random"))
    assert kept["oracle", 0.25] > kept["h2o", 0.25] > kept["random", 0.25]


def test_it_goes_on_with_a_story_from_a_quarter_of_the_cache():
    prompt = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    said = run(
        "generate", "--model", MODEL, "--policy", "h2o", "--budget", 0.25, "--trigger", "every:8", "--prompt", prompt
    )
    text, _, note = said.rpartition("[cache: ")
    assert len(text.split()) > 10 and "bytes" in note


def test_live_and_replay_keep_the_same_tokens(traces):
    from kv_gym import EvictingCache
    from kv_gym.budgets import protection_for, select
    from kv_gym.models import load_model
    from kv_gym.policies import make_policy
    from kv_gym.traces import open_traces

    model, _ = load_model(MODEL)
    sequence = open_traces(traces)[0]
    for name in ("h2o", "snapkv", "keydiff"):
        policy = make_policy(name)
        with EvictingCache(model, policy=policy, budget=0.25) as cache, torch.no_grad():
            model(input_ids=torch.from_numpy(sequence.tokens)[None], past_key_values=cache)
            for place, layer in enumerate(sequence.layers):
                keep = select(policy, sequence.view(place, 0.25, name), *protection_for(policy, None, None))
                expected = keep.nonzero()[:, -1].view(1, model.config.num_key_value_heads, -1)
                assert torch.equal(cache.kept_positions(layer), expected)
