"""A cache on an accelerator does not make the host wait: every part of it runs on the meta device.

What has to wait is counted: the lengths of heads, once after the prompt, where heads become unequal.
"""

import json

import pytest
import torch
from live_models import LIVE
from meta_device import META, OneDevice, count_reads, meta_model

from kv_gym import EvictingCache, make_policy
from kv_gym.budgets.calibrated import Calibrated, policy_identity
from kv_gym.budgets.epicache import EpiCache
from kv_gym.budgets.shares import Shares
from kv_gym.live import Guard
from kv_gym.live.tiers import TIERS, LowRankState
from kv_gym.models.fingerprint import Fingerprint

LAYERS, HEADS = 2, 2
WHOLE, EACH = [(LAYERS, 1, HEADS)], [(1, HEADS)] * LAYERS  # one wait for the model, or one for each layer
CALIBRATED = Calibrated(json.dumps(policy_identity(make_policy("snapkv"))), LAYERS, HEADS, (0.1, 1.0), (1.0, 0.0))
ALLOCATIONS = {
    "uniform": [], "global": WHOLE, "global:softmax": WHOLE, "cake": WHOLE, "d2o+ada:raw": WHOLE, "ada": EACH,
    "pyramid": EACH, Shares(shares=(1.0, 3.0)): EACH, EpiCache(similarity=(0.1, 0.9)): EACH, CALIBRATED: EACH,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return meta_model(LAYERS)


@torch.no_grad()
def decode(model, policy, *sizes, **settings):
    """Forwards of so many tokens; what is not on the meta device, or asks it for a number, raises."""
    with EvictingCache(model, policy, 4, **settings) as cache, OneDevice():
        for size in sizes:
            model(torch.zeros(1, size, dtype=torch.int64, device=META), past_key_values=cache)
    return cache


@pytest.mark.parametrize("policy", LIVE)
def test_policies(model, monkeypatch, policy):
    reads = count_reads(monkeypatch)
    allocation = "global" if make_policy(policy).comparable else "global:rank"
    decode(model, policy, 12, 1, allocation=allocation, trigger="every:1")
    assert reads == WHOLE


@pytest.mark.parametrize(("allocation", "expected"), ALLOCATIONS.items(), ids=str)
def test_allocations(model, monkeypatch, allocation, expected):
    reads = count_reads(monkeypatch)
    decode(model, "snapkv", 12, 1, 1, allocation=allocation, trigger="every:1")
    assert reads == expected


@pytest.mark.parametrize("allocation", ["uniform", "ada:raw"])
@pytest.mark.parametrize("trigger", ["prefill", "block:4", "lagged:2"])
def test_triggers(model, monkeypatch, trigger, allocation):
    reads = count_reads(monkeypatch)
    decode(model, "h2o", 12, 1, 3, 1, allocation=allocation, trigger=trigger)
    assert reads == ([] if allocation == "uniform" else EACH)


@pytest.mark.parametrize("evicted", TIERS[1:])
def test_tiers(model, monkeypatch, evicted):
    reads = count_reads(monkeypatch)
    decode(model, "h2o", 12, 1, 1, trigger="every:2", evicted=evicted)
    assert reads == []
    decode(model, "h2o", 12, 1, 1, allocation="global", trigger="every:1", evicted=evicted)
    assert reads == WHOLE


def test_a_state(model, monkeypatch):
    sizes = Fingerprint("llama", "", "", tuple(range(LAYERS)), model.config.num_attention_heads, HEADS,
                        model.config.head_dim)  # fmt: skip
    state = LowRankState.untrained(sizes, scale=1.0)
    for ordinal in range(LAYERS):
        state.kernels_of(ordinal, torch.empty(0, device=META))  # copied to the device once
    monkeypatch.setattr(LowRankState, "refuse_other_model", lambda *_: None)
    reads = count_reads(monkeypatch)
    decode(model, "keydiff", 12, 1, 1, 3, trigger="every:2", evicted=state)
    assert reads == []
    decode(model, "h2o", 12, 1, 1, allocation="global", trigger="every:1", evicted=state)
    assert reads == WHOLE


@pytest.mark.parametrize("select", ["mpcache:0.1", "mpcache:0.1:paired", "quest:0.1", "random:0.1"])
def test_selections(model, monkeypatch, select):
    reads = count_reads(monkeypatch)
    decode(model, "keydiff", 12, 1, 3, 1, trigger="every:2", select=select, delay=1)
    assert reads == []
    decode(model, "keydiff", 12, 1, 3, 1, allocation="global:raw", select=select)
    assert reads == WHOLE


def test_the_rest(model, monkeypatch):
    reads = count_reads(monkeypatch)
    decode(model, "streaming_llm_reindexed", 12, 1, 1)
    decode(model, "h2o", 300, 1)  # the prompt is observed in blocks
    cache = decode(model, "h2o", 12, 1, trigger="every:1")
    with OneDevice():
        cache.fork(budget=3).compress()
        cache.reorder_cache(torch.zeros(1, dtype=torch.int64))
        # transformers itself looks at the mask, once per step
        ids, mask = (torch.ones(1, n, dtype=torch.int64, device=META) for n in (1, 14))
        for _ in range(2):
            cache.before_forward({"input_ids": ids, "attention_mask": mask, "position_ids": ids})
    assert reads == []
    # a guard decides after every forward: that waits for its signal, and nothing else does
    monkeypatch.setattr("kv_gym.live.guard.GuardMonitor.raises_alarm", lambda self, signal: False)
    for signal in ("missing", "new", "unmatched", "margin", "entropy_rise"):
        decode(model, "h2o", 12, 1, 1, trigger="every:1", guard=Guard(signal))
    assert reads == []


def test_what_waits_is_noticed(model):
    """The proof of the others: a look at a number, a tensor of the host among others, and a copy that waits."""
    x = torch.zeros(3, device=META)
    with OneDevice():
        for wrong in (
            lambda: bool(x.any()), lambda: x.tolist(), lambda: x.nonzero(), lambda: x[torch.tensor([0])],
            lambda: x + torch.ones(3), lambda: torch.ones(3).to(META), lambda: x.cpu(),
        ):  # fmt: skip
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                wrong()
        torch.ones(3).to(META, non_blocking=True)


@torch.no_grad()
def test_a_model_on_two_devices():
    """Every layer holds its slots where it is, as with `device_map`."""
    model = meta_model(LAYERS)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    last = model.model.layers[-1]
    for module in (last, model.model.norm, model.lm_head):
        module.to(META)

    def move(module, args, kwargs):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), (args, kwargs))

    last.register_forward_pre_hook(move, with_kwargs=True)
    for policy, settings in (("knorm", {}), ("h2o", {}), ("keydiff", {"evicted": "bits:4"})):
        with EvictingCache(model, policy, 4, trigger="every:1", **settings) as cache:
            for size in (12, 1, 1):
                model(torch.zeros(1, size, dtype=torch.int64), past_key_values=cache)
            devices = [{tensor.device.type for tensor in layer.tensors()} for layer in cache.layers]
            assert devices == [{"cpu"}, {"meta"}]
