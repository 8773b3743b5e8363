"""The agent `less`: its loss against the live tier and plain loops, and a run that learns, stops and goes on."""

import pytest
import torch
from less_reference import phi, psi
from live_models import tiny, tokens

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live.config import CacheConfig
from kv_gym.live.simulated_eviction import simulate_evictions
from kv_gym.live.tiers import parse_tier
from kv_gym.live.tiers.low_rank import LayerKernels
from kv_gym.training import less
from kv_gym.training.less import squared_errors, train_less

SMALL = {"rank": 4, "width": 8, "rows": 2, "tokens": 32, "block": 8, "queries": 8, "progress": False}


def simulated(model, ids, policy="h2o", budget=6, block=8, **settings):
    layers = []
    config = CacheConfig.parse(model, policy=policy, budget=budget, trigger=f"block:{block}", **settings)
    simulate_evictions(model, ids, config, layers.append)
    return layers


@pytest.mark.parametrize("policy", ["streaming_llm", "h2o"])
def test_the_first_layer_decides_as_a_live_cache_does(policy):
    """Later layers of a live cache read what earlier ones made of the cut context; the first one sees the same."""
    model, ids = tiny(), tokens(2, 32)
    first = simulated(model, ids, policy)[0]
    with EvictingCache(model, policy, 6, trigger="block:8") as cache, torch.no_grad():
        for block, piece in enumerate(ids.split(8, 1)):
            expected = torch.zeros(2, 2, 32, dtype=torch.bool)
            if block:
                expected.scatter_(2, cache.kept_positions(0), True)
            assert torch.equal(first.held[block], expected)
            model(piece, past_key_values=cache)


def test_attention_is_that_of_the_full_cache():
    model, ids = tiny("gemma3"), tokens(1, 24)  # one of its layers has a window, and is not shown
    layers = simulated(model, ids, "keydiff")
    assert [layer.ordinal for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.query.shape == (1, 4, 24, 8) and layer.held.shape == (3, 1, 2, 24)
        visible = torch.ones(24, 24).tril().bool()
        products = layer.query @ layer.keys.repeat_interleave(2, 1).mT * layer.scaling
        weights = products.masked_fill(~visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(layer.output, (weights @ layer.values.repeat_interleave(2, 1)).transpose(1, 2))


def test_errors_by_plain_loops():
    model, ids = tiny(), tokens(1, 24)
    layer = simulated(model, ids)[1]
    torch.manual_seed(3)
    kernels = LayerKernels(4, 2, 8, 4, 6, 1.0).double()
    queries = torch.tensor([7, 8, 13, 23])
    absorbed, dropped, energy = squared_errors(kernels, layer, queries, 8)
    sums = [0.0, 0.0]
    for at in queries.tolist():
        output = torch.zeros(2, 32, dtype=torch.float64)
        for head in range(4):
            keys, values, query = layer.keys[0, head // 2], layer.values[0, head // 2], layer.query[0, head, at]
            weights = torch.zeros(2, 24, dtype=torch.float64)
            for j in range(at + 1):
                if j >= at // 8 * 8 or layer.held[at // 8, 0, head // 2, j]:
                    weights[:, j] = (query @ keys[j] * layer.scaling).exp()
                else:
                    weights[0, j] = phi(kernels, head, query[None])[0] @ psi(kernels, head // 2, keys[j][None])[0]
            own = weights @ values / weights.sum(1, keepdim=True) - layer.output[0, at, head]
            output += own @ model.model.layers[1].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8].T
        sums = [total + float(part.square().sum().detach()) for total, part in zip(sums, output, strict=True)]
    assert [float(absorbed.detach()), float(dropped)] == pytest.approx([total / 4 for total in sums])
    assert float(absorbed.detach()) != pytest.approx(float(dropped))
    projected = model.model.layers[1].self_attn.o_proj(layer.output[0, queries].flatten(1))
    assert float(energy) == pytest.approx(float(projected.square().sum(1).mean().detach()))


def test_it_learns_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Less error than dropping after a few steps; the same weights from a run that was stopped in the middle."""
    model = tiny().float()
    text = tokens(1, 400)[0].tolist()
    settings = SMALL | {"model": model, "policy": "streaming_llm", "steps": 30, "every": 10, "rate": 0.03}
    state = train_less([text], tmp_path / "whole", **settings)
    assert state.training["policy"] == "streaming_llm" and len(state.training["layers"]) == 3
    assert state.training["error"] < 0.97
    assert state == parse_tier(f"less:{tmp_path / 'whole'}") == train_less([text], tmp_path / "whole", **settings)
    assert not (tmp_path / "whole" / "checkpoint.pt").exists()

    def stop(self):
        if self.step == 15:
            raise KeyboardInterrupt
        return train_step(self)

    train_step = less._Run._train_step
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(less._Run, "_train_step", stop)
        train_less([text], tmp_path / "parts", **settings)
    assert train_less([text], tmp_path / "parts", resume=True, **settings) == state


def test_refusals(tmp_path):
    model, text = tiny(), tokens(1, 100)[0].tolist()
    for sentence, changes in {
        "unknown key 'stesp'": {"stesp": 3},
        "expected smallest <= largest <= 1": {"smallest": 0.5},
        "one window to train on and one to validate on take 128": {"tokens": 64},
        "policy 'kvzip' with allocation 'uniform'.*does not cut layer by layer": {"policy": "kvzip"},
    }.items():
        with pytest.raises(UserError, match=sentence):
            train_less([text], tmp_path / "out", model=model, **SMALL | changes)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files and no trained state"):
        train_less([text], tmp_path, model=model, **SMALL)
    with pytest.raises(UserError, match="holds no checkpoint of this run"):
        train_less([text], tmp_path / "out", model=model, resume=True, **SMALL)
