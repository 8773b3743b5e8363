"""The learned policy: the batched network against a loop, saving and loading, and files that must be refused."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from traced_models import tiny_model

from kv_gym import EvictingCache
from kv_gym.cache_view import CacheView
from kv_gym.checksums import described_data_hash
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.rows import complete
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.testing import check_policy

FINGERPRINT = Fingerprint("llama", "a" * 64, "{}", layers=(0, 2), query_heads=6, kv_heads=3, head_dim=8)


@pytest.fixture
def scorer():
    torch.manual_seed(0)
    network = GroupedScorer(6, 8, hidden=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.standardise(torch.randn(6, 50, 18) * 2 + 1)
    return Scorer(network, FINGERPRINT, lengths=(64, 128), training={"agent": "joint", "seed": 0})


def view(layer=2, batch=2, n=20):
    torch.manual_seed(1)
    return CacheView.of(torch.randn(batch, 3, n, 8), torch.randn(batch, 3, n, 8), 5, layer=layer)


def test_scores_equal_a_loop_over_rows_heads_and_slots(scorer):
    seen = view(layer=2)
    scores = scorer.score(seen)
    network = scorer.network
    for row in range(2):
        for head in range(3):
            agent = 3 + head  # layer 2 is the second recorded layer
            for slot in (0, 7, 19):
                place = torch.tensor([slot, 19 - slot], dtype=torch.float32).log1p() / 4
                x = torch.cat([seen.keys[row, head, slot], seen.values[row, head, slot], place])
                x = (x - network.mean[agent, 0]) * network.scale[agent, 0]
                for i in range(3):
                    x = x @ network.weights[i][agent] + network.biases[i][agent, 0]
                    x = x.relu() if i < 2 else x
                assert scores[row, head, slot].item() == pytest.approx(x.item(), abs=1e-5)


def test_standardised_inputs_have_mean_zero_and_deviation_one():
    network, sample = GroupedScorer(2, 4), torch.randn(2, 500, 10) * 3 + 5
    network.standardise(sample)
    standard = (sample - network.mean) * network.scale
    assert standard.mean(1).abs().max() < 1e-4 and (standard.std(1) - 1).abs().max() < 1e-4


def test_two_trained_policies_are_two(scorer):
    other = Scorer(GroupedScorer(6, 8), FINGERPRINT, (64, 128))
    assert scorer != other and len({scorer, other}) == 2 and scorer == scorer
    assert make_policy("knorm") == make_policy("knorm") and make_policy("snapkv", window=8) != make_policy("snapkv")


def test_a_fork_refuses_a_policy_of_another_model_beside_one_of_its_own():
    models = [tiny_model("llama", seed=seed) for seed in (0, 5)]
    config = models[0].config
    heads = config.num_hidden_layers * config.num_key_value_heads
    ours, foreign = (Scorer(GroupedScorer(heads, config.head_dim), Fingerprint.of(m), (1, 99)) for m in models)
    with EvictingCache(models[0], policy=ours) as cache, pytest.raises(UserError, match="weights hash"):
        cache.fork(policy=foreign)


def test_keeps_the_contract_of_policies(scorer):
    check_policy(scorer, kv_heads=3, query_heads=6, head_dim=8, layers=FINGERPRINT.layers)
    assert scorer.fingerprint.layers == (0, 2)


def test_what_was_saved_is_what_is_loaded(scorer, tmp_path):
    scorer.save_pretrained(tmp_path / "policy")
    loaded = make_policy(tmp_path / "policy")
    assert torch.equal(loaded.score(view()), scorer.score(view()))
    assert (loaded.fingerprint, loaded.lengths, loaded.protection) == (FINGERPRINT, (64, 128), (1, 1))
    assert sorted(file.name for file in (tmp_path / "policy").iterdir()) == [
        "README.md", "policy.json", "policy.safetensors",
    ]  # fmt: skip


def test_a_layer_it_does_not_know_is_refused(scorer):
    with pytest.raises(UserError, match=r"knows layers \[0, 2\] and was asked about layer 1"):
        scorer.score(view(layer=1))


def test_a_folder_with_other_things_is_left_untouched(scorer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files and no trained policy; name a new folder"):
        scorer.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("left", [["checkpoint.pt.tmp"], ["policy.safetensors", "README.md.tmp"], ["tensorboard"]])
def test_what_a_killed_run_left_is_not_in_the_way(scorer, tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    assert Scorer.from_pretrained(scorer.save_pretrained(tmp_path)).fingerprint == scorer.fingerprint


def _edit(folder, **changes):
    """Change policy.json, with a checksum that holds."""
    file = folder / "policy.json"
    content = json.loads(file.read_text()) | changes
    del content["sha256"]
    content["sha256"] = described_data_hash(content, (folder / "policy.safetensors").read_bytes())
    file.write_text(json.dumps(content))


DAMAGE = {
    "newer format": (lambda folder: _edit(folder, format=99), "newer than 3"),
    "no JSON": (lambda folder: (folder / "policy.json").write_text("{"), "no JSON"),
    "no weights": (lambda folder: (folder / "policy.safetensors").unlink(), "cannot be read"),
    "truncated weights": (
        lambda folder: (folder / "policy.safetensors").write_bytes((folder / "policy.safetensors").read_bytes()[:-40]),
        "changed or damaged",
    ),
    "another protection": (
        lambda folder: (folder / "policy.json").write_text(
            (folder / "policy.json").read_text().replace('"protect": [\n  ', '"protect": [\n  1')
        ),
        "changed or damaged",
    ),
    "other sizes": (lambda folder: _edit(folder, hidden=32), "other sizes"),
    "impossible sizes": (lambda folder: _edit(folder, hidden=10**9), "hidden"),
    "an unknown key": (lambda folder: _edit(folder, extra=1), "extra"),
    "a switch that is a text": (lambda folder: _edit(folder, calibrated="yes"), "calibrated"),
    "a number that is infinite": (lambda folder: _edit(folder, training={"reward": float("inf")}), "Infinity"),
    "sizes of no model": (lambda folder: _edit(folder, fingerprint=asdict(FINGERPRINT) | {"head_dim": 10**9}), "sizes"),
    "no fingerprint": (lambda folder: _edit(folder, fingerprint={"layers": [0]}), "fingerprint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_exports_are_refused_in_one_sentence(scorer, tmp_path, name):
    damage, sentence = DAMAGE[name]
    damage(scorer.save_pretrained(tmp_path / "policy"))
    with pytest.raises(UserError, match=sentence) as refused:
        make_policy(tmp_path / "policy")
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_finite_are_refused(scorer, tmp_path):
    file = scorer.save_pretrained(tmp_path / "policy") / "policy.safetensors"
    tensors = load_file(file)
    tensors["biases.0"][0] = float("nan")
    save_file(tensors, file)
    _edit(tmp_path / "policy")
    with pytest.raises(UserError, match="not finite"):
        make_policy(tmp_path / "policy")


def test_another_model_of_the_same_sizes_is_accepted_on_request(tmp_path):
    model = tiny_model()
    fingerprint = Fingerprint.of(model)
    network = GroupedScorer(len(fingerprint.layers) * fingerprint.kv_heads, fingerprint.head_dim, hidden=4)
    folder = tmp_path / "policy"
    Scorer(network, replace(fingerprint, weights="b" * 64), (1, 99)).save_pretrained(folder)
    with pytest.raises(UserError, match="weights hash bbbbbbbbbbbb"):
        EvictingCache(model, folder)
    accepted = make_policy(folder, accept_fingerprint=True)
    for policy in (accepted, make_policy("same_tokens", over=accepted), f"{folder}:accept_fingerprint=true"):
        EvictingCache(model, policy).detach()
        assert complete(Configuration("mine", make_policy(policy)).fields())["accept_fingerprint"] is True
    assert Configuration("mine", make_policy(folder)).fields()["accept_fingerprint"] is False
    Scorer(network, replace(fingerprint, query_heads=99), (1, 99)).save_pretrained(folder)
    with pytest.raises(UserError, match="query_heads 99"):
        EvictingCache(model, f"{folder}:accept_fingerprint=true")
    with pytest.raises(UserError, match="give none but accept_fingerprint=true"):
        make_policy(f"{folder}:window=3")


def test_a_fingerprint_with_a_line_end_is_refused():
    with pytest.raises(UserError, match="its field 'architecture' is no plain text") as refused:
        Fingerprint.from_json(FINGERPRINT.to_json() | {"architecture": "a\nb"})
    assert "\n" not in str(refused.value)
