"""Plain tensors of a trained policy: three NumPy products give the scores of the policy itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

from kv_gym import CacheView, cli, make_policy, open_traces
from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.interop import export_tensors, score_numpy
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer

LAYERS, HEADS, D = (1, 4), 3, 8
TRAINED = Path(__file__).parents[2] / "agents" / "trained" / "joint"


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    network = GroupedScorer(len(LAYERS) * HEADS, D, hidden=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.standardise(torch.randn(len(LAYERS) * HEADS, 50, 2 * D + 2) * 3 + 2)
    fingerprint = Fingerprint("llama", "a" * 64, "{}", LAYERS, query_heads=6, kv_heads=HEADS, head_dim=D)
    return Scorer(network, fingerprint, (64, 128), protect=(2, 5), calibrated=True)


def ragged_view(layer, n=20, seen=90):
    """Heads that hold other tokens of a longer text."""
    torch.manual_seed(layer)
    positions = torch.stack([torch.randperm(seen)[:n].sort().values for _ in range(HEADS)])[None]
    valid = torch.ones_like(positions, dtype=torch.bool)
    keys, values = torch.randn(2, 1, HEADS, n, D) * 3
    return CacheView(keys, values, positions, valid, torch.tensor([seen]), torch.full((1, HEADS), 5), layer=layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_equal_those_of_the_policy(scorer, tmp_path, layer):
    tensors = load_file(export_tensors(scorer, tmp_path / "out" / "policy.safetensors"))
    view = ragged_view(layer)
    found = score_numpy(
        tensors, layer, view.keys[0].numpy(), view.values[0].numpy(), view.positions[0].numpy(), int(view.seen)
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, scorer.score(view)[0].numpy(), rtol=1e-5, atol=1e-5)


def test_scores_of_a_whole_cache_with_one_row_of_positions(scorer, tmp_path):
    tensors = load_file(export_tensors(scorer, tmp_path / "policy.safetensors"))
    view = CacheView.of(torch.randn(1, HEADS, 9, D), torch.randn(1, HEADS, 9, D), layer=4)
    found = score_numpy(tensors, 4, view.keys[0].numpy(), view.values[0].numpy(), np.arange(9), 9)
    np.testing.assert_allclose(found, scorer.score(view)[0].numpy(), rtol=1e-5, atol=1e-5)


def test_the_file_is_as_documented(scorer, tmp_path):
    file = export_tensors(scorer, tmp_path / "policy.safetensors")
    shapes = {name: (tensor.shape, tensor.dtype.name) for name, tensor in load_file(file).items()}
    assert shapes == {
        "layers": ((2,), "int64"),
        "weights.0": ((2, 3, 18, 16), "float32"),
        "biases.0": ((2, 3, 16), "float32"),
        "weights.1": ((2, 3, 16, 16), "float32"),
        "biases.1": ((2, 3, 16), "float32"),
        "weights.2": ((2, 3, 16, 1), "float32"),
        "biases.2": ((2, 3, 1), "float32"),
    }
    with safe_open(file, "numpy") as stored:
        about = json.loads(stored.metadata()["kv_gym"])
    assert about["protect"] == {"sinks": 2, "recent": 5} and about["comparable"] and about["lengths"] == [64, 128]
    assert (about["format"], about["layers"], about["kv_heads"], about["head_dim"], about["hidden"]) == (1, 2, 3, 8, 16)
    assert len(about["inputs"]) == 4 and about["activation"] == "relu"
    assert Fingerprint.from_json(about["fingerprint"]) == scorer.fingerprint


def test_a_folded_weight_worked_out_by_hand(scorer, tmp_path):
    tensors = load_file(export_tensors(scorer, tmp_path / "policy.safetensors"))
    network, agent = scorer.network.requires_grad_(False), 1 * HEADS + 2  # the second layer's last head
    mean, scale, weight = network.mean[agent, 0], network.scale[agent, 0], network.weights[0][agent]
    assert tensors["weights.0"][1, 2, 5, 7] == pytest.approx(float(scale[5] * weight[5, 7]), rel=1e-6)
    shift = sum(float(mean[i] * scale[i] * weight[i, 7]) for i in range(2 * D + 2))
    assert tensors["biases.0"][1, 2, 7] == pytest.approx(float(network.biases[0][agent, 0, 7]) - shift, abs=1e-5)


@pytest.mark.skipif(not TRAINED.is_dir(), reason="no trained agent in this checkout")
def test_the_trained_agent_on_the_bundled_traces(tmp_path):
    policy = make_policy(TRAINED)
    tensors = load_file(export_tensors(TRAINED, tmp_path / "joint.safetensors"))
    sequence = open_traces(bundled("traces"))[0]
    assert set(sequence.layers) <= set(policy.fingerprint.layers)
    for row, layer in enumerate(sequence.layers):
        keys, values = sequence.keys[row], sequence.values[row]
        n = keys.shape[1]
        whole = CacheView.of(torch.from_numpy(keys)[None], torch.from_numpy(values)[None], layer=layer)
        found = score_numpy(tensors, layer, keys, values, np.arange(n), n)
        np.testing.assert_allclose(found, policy.score(whole)[0].numpy(), rtol=1e-5, atol=1e-5)


def test_a_folder_is_refused(scorer, tmp_path):
    with pytest.raises(UserError, match="is a folder; name a file"):
        export_tensors(scorer, tmp_path)


def test_a_policy_with_other_inputs_is_refused(scorer, tmp_path):
    scorer.network.weights[0] = torch.nn.Parameter(torch.zeros(6, 2 * D + 5, 16))
    with pytest.raises(UserError, match="reads more than keys, values and positions"):
        export_tensors(scorer, tmp_path / "policy.safetensors")


def test_the_command_line_writes_tensors(scorer, tmp_path):
    folder = scorer.save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy.safetensors"
    done = CliRunner().invoke(cli.app, ["export", str(folder), "--tensors", str(file)])
    assert done.exit_code == 0 and str(file) in done.stdout
    again = export_tensors(scorer, tmp_path / "again.safetensors")
    assert file.read_bytes() == again.read_bytes()


def test_the_command_line_asks_for_something_to_write(scorer, tmp_path):
    folder = scorer.save_pretrained(tmp_path / "policy")
    done = CliRunner().invoke(cli.app, ["export", str(folder)])
    assert isinstance(done.exception, UserError) and "--out FOLDER or --tensors FILE" in str(done.exception)
