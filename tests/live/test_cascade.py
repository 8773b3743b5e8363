"""CAKE's cascade: what is held while layers are read, and that the last division is the one-shot allocation's."""

import pytest
import torch
from traced_models import VOCABULARY, tiny_model

from kv_gym import EvictingCache
from kv_gym.budgets import parse_allocation
from kv_gym.live.layer import EvictingLayer

LAYERS, HEADS, TOKENS = 6, 2, 96


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen3", num_hidden_layers=LAYERS)
    with torch.no_grad():  # layers whose attention differs, so that their shares do
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_norm.weight.mul_(0.3 + i)
    return model


def read(model, allocation, ids, policy="cake", mask=None, **settings):
    """A cache after one forward and 3 tokens, and the slots that layers held whenever one of them had been read."""
    held = []
    attend = EvictingLayer.attend

    def watched(layer, call):
        result = attend(layer, call)
        held.append(sum(int(each.slots.counts().sum()) for each in cache._states if each.tokens_seen))
        return result

    with EvictingCache(model, policy, allocation=allocation, **settings) as cache, torch.no_grad():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EvictingLayer, "attend", watched)
            model(ids, past_key_values=cache, attention_mask=mask)
        for token in range(3):
            if mask is not None:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(torch.full((len(ids), 1), token), past_key_values=cache, attention_mask=mask)
        return [cache.kept_positions(layer) for layer in range(LAYERS)], held


@pytest.mark.parametrize(
    ("policy", "suffix", "settings"),
    [
        ("cake", "", {"budget": 24, "recent": 8}),
        ("snapkv", "+ada", {"budget": 0.2, "sinks": 1, "recent": 3}),
        ("h2o", "", {"budget": 0.7, "trigger": "every:2"}),
    ],
)
def test_the_peak_is_the_budget_and_a_layer_and_the_result_that_of_one_cut(model, policy, suffix, settings):
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    whole, before = read(model, f"cake{suffix}", ids, policy, **settings)
    cascade, held = read(model, f"cake:cascade{suffix}", ids, policy, **settings)
    for kept, expected in zip(cascade, whole, strict=True):
        assert torch.equal(kept, expected)
    budget = settings["budget"]
    slots = LAYERS * HEADS * (budget if isinstance(budget, int) else int(budget * TOKENS))
    assert before[-1] == LAYERS * HEADS * TOKENS  # one cut of all layers comes after the last one
    assert len(held) == LAYERS and all(0 < each <= slots + LAYERS * HEADS for each in held)
    assert held[-1] == slots
    assert len({int((kept >= 0).sum()) for kept in cascade}) > 1  # shares differ


def test_rows_with_padding_are_cut_as_if_alone(model):
    ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    both, _ = read(model, "cake:cascade", ids, mask=mask, budget=0.25)
    for row, tokens in ((0, ids[:1, 20:]), (1, ids[1:])):
        alone, _ = read(model, "cake:cascade", tokens, budget=0.25)
        for kept, expected in zip(both, alone, strict=True):
            for head in range(HEADS):
                assert (
                    kept[row, head][kept[row, head] >= 0].tolist() == expected[0, head][expected[0, head] >= 0].tolist()
                )


def test_a_cut_by_hand_and_names(model):
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    kept = []
    for allocation in ("cake", "cake:cascade"):
        with EvictingCache(model, "cake", 1.0, allocation) as cache, torch.no_grad():
            model(ids, past_key_values=cache)
            fork = cache.fork(budget=16)
            fork.compress()
            kept.append([fork.kept_positions(layer) for layer in range(LAYERS)])
            fork.detach()
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert parse_allocation("cake:cascade+ada").name == "cake:cascade+ada"
