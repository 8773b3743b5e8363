"""Decoding steps that are captured once and replayed, on a CPU that records operations as a CUDA graph does."""

import pytest
import recorded_steps
import torch
from less_reference import state_for
from live_models import tiny, tokens
from torch.utils._python_dispatch import _disable_current_modes

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live import CapturedSteps, Guard, captured_steps, ragged_attention
from kv_gym.live.layer_state import LayerState
from kv_gym.live.slots import RaggedSlots


def attend_rows(query, keys, values, starts, lengths, scaling, longest, bits=0, key_grid=None, value_grid=None):
    """The kernel's work in plain operations whose shapes do not depend on `lengths`."""
    if bits:
        from kv_gym.live.tiers.quantiser import dequantise

        keys, values = dequantise(keys, key_grid, bits, query.dtype), dequantise(values, value_grid, bits, query.dtype)
    index = (starts[:, None] + torch.arange(longest)).clamp(max=len(keys) - 1)
    products = (query @ keys[index].transpose(1, 2) * scaling).float()
    products = products.masked_fill(torch.arange(longest) >= lengths[:, None, None], -torch.inf)
    return products.softmax(-1).nan_to_num().to(query.dtype) @ values[index], products.logsumexp(-1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (captured_steps, ragged_attention):
        monkeypatch.setattr(module, "backend_for", lambda query, *_: "kernel" if query.shape[2] == 1 else "per_head")
    kernel = pytest.importorskip("kv_gym.live.ragged_kernel", reason="the kernel needs Triton")
    monkeypatch.setattr(kernel, "attend_rows", attend_rows)
    monkeypatch.setattr(captured_steps, "capture", recorded_steps.capture)

    def on_the_host(method):
        def call(*arguments):
            with _disable_current_modes():  # a graph does not see what the host counts for itself
                return method(*arguments)

        return call

    for name in ("_make_room", "_count", "can_overwrite"):
        monkeypatch.setattr(RaggedSlots, name, on_the_host(getattr(RaggedSlots, name)))
    monkeypatch.setattr(RaggedSlots, "common_length", property(on_the_host(RaggedSlots.common_length.fget)))


@pytest.mark.parametrize(
    ("policy", "settings", "replayed"),
    [
        ("keydiff", {}, 39),
        ("keydiff", {"budget": 20, "trigger": "every:8"}, 39),  # evictions in the captured memory, replayed too
        ("snapkv", {"budget": 20, "trigger": "every:8", "recent": 9}, 39),
        ("keydiff", {"trigger": "every:16"}, 39),  # evictions of another size each time
        ("keydiff", {"allocation": "global:raw", "trigger": "every:16"}, 39),
        ("keydiff", {"allocation": "ada:zscore", "trigger": "every:16"}, 37),  # would wait for lengths at every layer
        ("snapkv", {"allocation": "global:zscore"}, 39),
        ("snapkv", {"trigger": "every:16", "evicted": "bits:4"}, 37),
        ("keydiff", {"trigger": "every:16", "evicted": state_for}, 37),
        ("h2o", {"trigger": "every:16"}, 0),  # its memory changes at every step
    ],
)
@torch.no_grad()
def test_replays_give_the_logits_of_usual_steps(as_on_a_gpu, monkeypatch, policy, settings, replayed):
    model = tiny("llama", num_hidden_layers=2)
    if "evicted" in settings:  # groups of 32 channels share a scale
        model = tiny("llama", num_hidden_layers=2, head_dim=32)
        if settings["evicted"] is state_for:
            settings = settings | {"evicted": state_for(model)}
    ids, fed, settings = tokens(2, 40), tokens(2, 40, seed=1), {"budget": 0.5} | settings
    evictions = []
    on_device = LayerState.note_replayed_eviction
    monkeypatch.setattr(
        LayerState, "note_replayed_eviction", lambda *arguments: evictions.append(on_device(*arguments))
    )
    with EvictingCache(model, policy, **settings) as cache, EvictingCache(model, policy, **settings) as usual:
        for one in (cache, usual):
            model(ids, past_key_values=one)
        steps = CapturedSteps(model, cache)
        for i, token in enumerate(fed.split(1, 1)):
            expected = model(token, past_key_values=usual).logits[:, -1]
            torch.testing.assert_close(steps(token), expected, rtol=0, atol=1e-5, msg=f"step {i}")
        assert steps.replayed == replayed
        assert len(evictions) == (4 * len(cache.layers) if settings["budget"] == 20 else 0)
        assert cache.seen == usual.seen == 80
        assert torch.equal(cache.kept(), usual.kept())
        for layer in cache.evicting_layers:
            assert torch.equal(cache.kept_positions(layer), usual.kept_positions(layer))


@torch.no_grad()
def test_a_cache_that_was_used_otherwise_is_captured_anew(as_on_a_gpu):
    model = tiny("llama", num_hidden_layers=2)
    with EvictingCache(model, "keydiff", 0.5) as cache:
        model(tokens(1, 40), past_key_values=cache)
        steps = CapturedSteps(model, cache)
        for token in tokens(1, 10, seed=1).split(1, 1):
            steps(token)
        with cache.fork() as usual:
            for token in tokens(1, 3, seed=2).split(1, 1):
                for one in (cache, usual):
                    model(token, past_key_values=one)
            cache.crop(-2)
            usual.crop(-2)
            cache.set_budget(8)
            usual.set_budget(8)
            cache.compress()
            usual.compress()
            for token in tokens(1, 70, seed=3).split(1, 1):  # more than there is room for at once
                torch.testing.assert_close(steps(token), model(token, past_key_values=usual).logits[:, -1])


def test_what_cannot_be_captured_runs_as_usual_and_says_why():
    model = tiny("llama")
    with EvictingCache(model, "keydiff", 0.5) as cache:
        steps = CapturedSteps(model, cache)
        with pytest.raises(UserError, match="has read nothing: read a prompt"):
            steps(tokens(1, 1))
        model(tokens(1, 30), past_key_values=cache)
        logits = steps(tokens(1, 1))
        assert logits.shape == (1, 61)
        assert steps.replayed == 0
        assert steps.refusal() == "the kernel over heads of different lengths does not run here"
    with EvictingCache(model, "keydiff", 0.5, guard=Guard(signal="entropy", threshold=9.0)) as cache:
        model(tokens(1, 30), past_key_values=cache)
        assert "measures every step" in CapturedSteps(model, cache).refusal()
    with pytest.raises(UserError, match="made for another model than this LlamaForCausalLM"):
        CapturedSteps(tiny("llama", seed=1), cache)
