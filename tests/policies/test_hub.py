"""Policies by hub id, offline: a folder stands in for the Hub behind huggingface_hub's own functions."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from kv_gym import CacheView, make_policy
from kv_gym.errors import UserError
from kv_gym.hub import is_hub_id
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.hub import FILES
from kv_gym.policies.scorer import GroupedScorer, Scorer


@pytest.fixture
def policy():
    torch.manual_seed(0)
    fingerprint = Fingerprint("llama", "a" * 64, "{}", layers=(0, 1), query_heads=4, kv_heads=2, head_dim=8)
    return Scorer(GroupedScorer(4, 8, hidden=16), fingerprint, (8, 64), protect=(2, 3))


def scores(policy):
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 2, 9, 8, generator=generator)
    return policy.score(CacheView.of(keys, values, layer=1))


def test_what_was_pushed_is_what_its_id_names(hub, policy):
    assert policy.push_to_hub("somebody/small-policy") == "https://hub.example/somebody/small-policy"
    assert sorted(file.name for file in (hub / "somebody/small-policy").iterdir()) == sorted(FILES)
    for loaded in (make_policy("somebody/small-policy"), Scorer.from_pretrained("somebody/small-policy")):
        assert torch.equal(scores(loaded), scores(policy)) and loaded.protection == (2, 3)
    policy.push_to_hub("somebody/small-policy")  # again: the repository is there


def test_the_card_on_the_hub_names_the_id(hub, policy):
    policy.push_to_hub("somebody/small-policy")
    card = (hub / "somebody/small-policy" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kv_gym\n") and 'policy="somebody/small-policy"' in card


def test_only_the_known_files_are_fetched(hub, policy):
    policy.push_to_hub("somebody/policy")
    for name in ("policy.py", "weights.bin", "policy.json.py"):
        (hub / "somebody/policy" / name).write_text("raise SystemExit")
    make_policy("somebody/policy")
    assert sorted(file.name for file in (hub / "cache/main/somebody/policy").iterdir()) == sorted(FILES)


def test_a_revision_is_passed_on(hub, policy):
    policy.push_to_hub("somebody/policy")
    Scorer.from_pretrained("somebody/policy", revision="v2")
    make_policy("somebody/policy@refs/pr/3")
    assert (hub / "cache/v2/somebody/policy").is_dir() and (hub / "cache/refs/pr/3/somebody/policy").is_dir()
    with pytest.raises(UserError, match="'somebody/policy@v2' is no id of the Hub"):
        policy.push_to_hub("somebody/policy@v2")


def test_a_folder_of_the_same_name_comes_first(hub, policy):
    policy.push_to_hub("somebody/policy")
    other = Scorer(policy.network, policy.fingerprint, (8, 64), protect=(7, 7))
    other.save_pretrained("somebody/policy")
    assert make_policy("somebody/policy").protection == (7, 7)


def test_a_mistyped_id_is_one_sentence(hub, policy):
    policy.push_to_hub("somebody/policy")
    with pytest.raises(UserError, match=r"no folder somebody/polity, and no policy of that name.*404.*spelling") as it:
        make_policy("somebody/polity")
    assert "\n" not in str(it.value)


def test_without_a_network_it_is_one_sentence(monkeypatch, tmp_path):
    """The real huggingface_hub, offline (conftest sets HF_HUB_OFFLINE)."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no policy of that name could be had from the Hub") as it:
        make_policy("somebody/policy")
    assert "\n" not in str(it.value)


def test_a_repository_without_a_policy_is_refused(hub):
    (hub / "somebody/model").mkdir(parents=True)
    (hub / "somebody/model/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"somebody/model on the Hub holds no policy.json"):
        make_policy("somebody/model")


def test_settings_are_refused(hub, policy):
    policy.push_to_hub("somebody/policy")
    with pytest.raises(UserError, match="carries its own settings"):
        make_policy("somebody/policy", window=3)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors", "README.md"])
def test_files_too_large_are_not_read(hub, policy, name, monkeypatch):
    policy.push_to_hub("somebody/policy")
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("read before its size was checked"))
    with open(hub / "somebody/policy" / name, "r+b") as file:
        file.truncate(2**31 + 1 if name.endswith("tensors") else 2**20 + 1)  # sparse: takes no room
    monkeypatch.setattr(shutil, "copy", lambda file, target: (Path(target) / Path(file).name).symlink_to(file))
    with pytest.raises(UserError, match=f"{name} holds .* bytes and no exported policy's"):
        make_policy("somebody/policy")


def test_weights_that_are_damaged_are_refused_as_from_any_folder(hub, policy):
    policy.push_to_hub("somebody/policy")
    file = hub / "somebody/policy/policy.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="changed or damaged"):
        make_policy("somebody/policy")


@pytest.mark.parametrize("wrong", ["policy", "a/b/c", "../policy", "a b/c", "somebody/", "/tmp/policy", "a/b:c"])
def test_what_is_no_id_is_not_asked_of_the_hub(hub, policy, wrong):
    assert not is_hub_id(wrong)
    with pytest.raises(UserError, match="is no id of the Hub; expected owner/name"):
        policy.push_to_hub(wrong)


def test_a_push_that_fails_is_one_sentence(hub, policy, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("403 Forbidden\nrequest id 7")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"could not be pushed to a/b \(PermissionError: 403 Forbidden\): log in") as it:
        policy.push_to_hub("a/b")
    assert "\n" not in str(it.value)
