"""Learners and recordings on an accelerator: their steps run on the meta device, with the contexts on the host."""

import copy

import pytest
import torch
from meta_device import META, OneDevice, count_reads
from traced_models import some_prompt, tiny_model

from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.traces import record
from kv_gym.traces.recording_cache import RecordingCache
from kv_gym.training import learner, through_model, train
from kv_gym.training.registry import agent_settings, learner_class

SMALL = {"contexts": 2, "slots": 16, "hidden": 8}
AGENTS = [
    ("joint", {"loss": "listwise"}), ("joint", {"loss": "softmax"}), ("joint", {"loss": "poisson"}), ("rloo", {}),
    ("expected", {}), ("distill", {}), ("grpo", {}), ("grpo", {"ranking": "joint"}), ("kvzap", {}), ("end_to_end", {}),
    ("attention_gate", {}), ("attention_gate", {"aim": "full"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    model = tiny_model("qwen3", num_hidden_layers=2)
    prompts = [some_prompt((4, 5), f"p{i}", seed=i, context=24) for i in range(5)]
    return model, record(model, prompts, tmp_path_factory.mktemp("device") / "traces", hidden=True, progress=False)


def learner_on_meta(recorded, agent, **changes):
    """A learner that took its contexts on the CPU, then moved."""
    model, traces = recorded
    kind, settings = learner_class(agent), agent_settings(agent, **SMALL, **changes)
    width = model.config.hidden_size if "hidden" in settings.inputs else 0
    network = kind.make_network(settings, traces.fingerprint, width)
    learner = kind(settings, 0, network, True, model if kind.needs_model else None)
    learner.prepare(traces.load())
    network.to(META)
    learner.optimizer = torch.optim.AdamW(network.parameters())
    learner.model = copy.deepcopy(model).to(META) if learner.model is not None else None
    return learner


@pytest.mark.parametrize(("agent", "changes"), AGENTS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_step_stays_on_the_device(recorded, monkeypatch, agent, changes):
    learner = learner_on_meta(recorded, agent, **changes)
    reads = count_reads(monkeypatch)
    with OneDevice():
        metrics = [learner.step(step) for step in range(2)]
    assert all(loss["loss"].is_meta for loss in metrics) and reads == []


@torch.no_grad()
def test_recording_reads_the_model_on_its_device(recorded):
    from kv_gym.models.attention import attach, detach
    from kv_gym.policies import make_policy

    model = copy.deepcopy(recorded[0]).to(META)
    attach(model)
    try:
        cache = RecordingCache(model, 4, {name: make_policy(name) for name in ("h2o", "kvzip")})
        with OneDevice():
            ids = torch.zeros(1, 150, dtype=torch.int64, device=META)
            model(ids, past_key_values=cache)
            cache.run_second_readings(model, ids)
        assert all(layer.keys.is_meta and layer.stats["h2o"]["mass"].is_meta for layer in cache.recorded)
    finally:
        detach(model)


@pytest.mark.parametrize("agent", ["joint", "end_to_end"])
def test_mixed_precision(recorded, tmp_path, agent):
    model, traces = recorded
    settings = {"model": model, "steps": 2, "every": 2, "hidden": 8, "contexts": 2, "progress": False}
    exact, mixed = (train(agent, traces, tmp_path / f"{bf16}", bf16=bf16, **settings) for bf16 in (False, True))
    assert mixed.training["settings"]["bf16"] is True and mixed.network.weights[0].dtype == torch.float32
    rewards = exact.training["held_out_reward"], mixed.training["held_out_reward"]
    assert rewards[0] == pytest.approx(rewards[1], rel=0.1)
    assert not torch.equal(exact.network.weights[0], mixed.network.weights[0])


def test_a_missing_device_is_refused(recorded, tmp_path):
    with pytest.raises(UserError, match="device 'cuda:7' is not there"):
        train("joint", recorded[1], tmp_path / "run", device="cuda:7", progress=False)


def test_a_policy_scores_layers_on_several_devices(recorded):
    """Each with a copy of the networks there: what trains, or saves, stays where it is."""
    policy = Scorer(GroupedScorer(4, 16), recorded[1].fingerprint, (1, 9))
    here, there = (
        CacheView.of(keys, keys, layer=layer)
        for layer, keys in enumerate((torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 16, device=META)))
    )
    scores = policy.score_layers([here, there])
    assert [score.device.type for score in scores] == ["cpu", "meta"] and policy.network.mean.device.type == "cpu"


@pytest.mark.parametrize("agent", ["joint", "end_to_end"])
def test_contexts_that_stay_on_the_device_train_the_same_policy(recorded, tmp_path, monkeypatch, agent):
    """Whether an accelerator has room for all contexts, or each step sends what it draws of them."""
    model, traces = recorded
    settings = {"model": model, "steps": 4, "every": 4, "hidden": 8, "contexts": 2, "progress": False}
    sent = train(agent, traces, tmp_path / "sent", **settings)
    read = set()  # inputs [heads, slots, f]
    for module in (learner, through_model):
        monkeypatch.setattr(module, "resident_limit", lambda device: 1 << 40)
    plain = through_model.to_device if agent == "end_to_end" else learner.to_device

    def noted(tensor, device):
        if tensor.dim() == 3 and tensor.shape[1] == 24:
            read.add(tensor.data_ptr())
        return plain(tensor, device)

    monkeypatch.setattr(through_model if agent == "end_to_end" else learner, "to_device", noted)
    stayed = train(agent, traces, tmp_path / "stayed", **settings)
    for one, other in zip(sent.network.parameters(), stayed.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert 0 < len(read) <= len(traces)  # of each context the same tensor, step after step
