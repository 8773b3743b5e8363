"""Which tokens a live cache keeps: what the policy says of a view made by hand, and what state and queries hold."""

from dataclasses import dataclass, replace

import pytest
import torch
from live_models import LIVE, tiny, tokens
from masked_reference import MaskedReference
from second_reading_reference import paid_when_repeated

from kv_gym import CacheView, EvictingCache, make_policy
from kv_gym.budgets import protection_for, select, uniform
from kv_gym.policies import Policy, StatefulPolicy


def plain_view(reference, layer, policy, budget):
    """The view of a layer with nothing evicted, from what the reference recorded."""
    wanted = policy.needs_queries
    view = CacheView.of(
        reference.keys[layer],
        reference.values[layer],
        layer=layer,
        queries=reference.queries[layer][:, :, -wanted:] if wanted else None,
        output=reference.outputs[layer] if policy.needs_output else None,
    )
    if policy.statistics == "h2o":
        view = replace(view, state={"mass": reference.received[layer].float()})
    elif isinstance(policy, StatefulPolicy):
        everything = replace(view, queries=reference.queries[layer])
        view = replace(view, state=policy.observe(view, everything.attention(), policy.initial_state(view)))
    return replace(view, budget=uniform(budget, view.seen, view.keys.shape[1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LIVE)
def test_prefill_keeps_what_the_policy_says_of_the_plain_cache(name, attention):
    model, ids, policy = tiny("qwen2", attention), tokens(2, 40), make_policy(name)
    reference = MaskedReference(model)
    reference(ids)
    with EvictingCache(model, name, 0.25) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    for layer in range(3):
        view = plain_view(reference, layer, policy, 0.25)
        if policy.repetition:
            view = replace(view, state={"paid": paid_when_repeated(model, ids)[layer]})
        expected = select(policy, view, *protection_for(policy, None, None))
        kept = torch.zeros_like(expected).scatter_(2, cache.kept_positions(layer), True)
        assert kept.sum(2).eq(10).all()
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_h2o_state_is_all_attention_received(attention):
    model = tiny("llama", attention)
    reference = MaskedReference(model)
    with EvictingCache(model, "h2o", 9, trigger="every:4", recent=2) as cache, torch.no_grad():
        for piece in torch.split(tokens(2, 170), [150, 1, 1, 1, 1, 1, 10, 5], 1):
            model(piece, past_key_values=cache)
            reference(piece)
            for layer in range(3):
                kept = cache.kept_positions(layer)
                view = cache.layers[layer].state.view()
                mass = view.state["mass"].gather(2, view.positions.argsort(-1))
                slow = reference.received[layer].gather(2, kept).float()
                torch.testing.assert_close(mass, slow, rtol=1e-4, atol=1e-4)
                reference.hide(layer, kept)
    assert cache.kept_positions(0).shape[2] == 9


@dataclass(frozen=True)
class ObservationLog(StatefulPolicy):
    """Writes down what it is shown; keeps old tokens."""

    window: int = 6

    @property
    def needs_queries(self):
        return self.window

    def initial_state(self, view):
        return {"shown": torch.zeros(*view.keys.shape[:3], 2)}

    def observe(self, view, attention, state):
        assert attention.shape[2] <= 128
        assert attention.shape[3] == view.keys.shape[2] == state["shown"].shape[2]
        return {"shown": state["shown"] + torch.tensor([attention.shape[2], 1.0])}

    def score(self, view):
        return -view.positions.float()


def test_every_query_is_shown_once_in_blocks():
    model = tiny()
    with EvictingCache(model, ObservationLog(), 10, trigger="every:2") as cache, torch.no_grad():
        for piece in torch.split(tokens(1, 205), [200, 1, 1, 3], 1):
            model(piece, past_key_values=cache)
    shown = cache.layers[1].state.view().state["shown"]
    assert shown.shape == (1, 2, 10, 2)
    # the oldest tokens stay: each of them was a slot in the blocks of 128, 72, 1, 1 and 3 queries
    assert shown[0, 0].tolist() == [[205.0, 5.0]] * 10


def test_a_view_shows_the_layer_faithfully():
    model = tiny("qwen3")
    reference = MaskedReference(model)
    with EvictingCache(model, ObservationLog(), 0.5) as cache, torch.no_grad():
        for piece in torch.split(tokens(2, 25), [20, 3, 1, 1], 1):
            model(piece, past_key_values=cache)
            reference(piece)
            for layer in range(3):
                reference.hide(layer, cache.kept_positions(layer))
    for layer in range(3):
        view = cache.layers[layer].state.view()
        expected = [*range(10), 20, 21, 22, 23, 24]
        assert view.positions[1, 1].tolist() == expected
        assert view.seen.tolist() == [25, 25]
        assert view.budget.tolist() == [[12, 12], [12, 12]]
        assert (view.layer, view.scaling) == (layer, 8**-0.5)
        torch.testing.assert_close(view.keys, reference.keys[layer][:, :, expected], rtol=0, atol=1e-9)
        torch.testing.assert_close(view.values, reference.values[layer][:, :, expected], rtol=0, atol=1e-9)
        torch.testing.assert_close(view.queries, reference.queries[layer][:, :, -6:], rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Evens(Policy):
    """Even positions; in head 1 the odd ones."""

    def score(self, view):
        heads = torch.arange(view.keys.shape[1])[:, None]
        return ((view.positions + heads) % 2 == 0).double()


def test_protection_and_ties_and_a_second_eviction():
    model = tiny()
    with EvictingCache(model, Evens(), 8, trigger="every:4", sinks=1, recent=2) as cache, torch.no_grad():
        model(tokens(1, 16), past_key_values=cache)
        assert cache.kept_positions(0)[0].tolist() == [[0, 4, 6, 8, 10, 12, 14, 15], [0, 5, 7, 9, 11, 13, 14, 15]]
        for step in range(4):
            model(tokens(1, 1, seed=step), past_key_values=cache)
        assert cache.kept_positions(0)[0].tolist() == [[0, 8, 10, 12, 14, 16, 18, 19], [0, 9, 11, 13, 15, 17, 18, 19]]


def test_compress_evicts_now_by_the_tokens_seen():
    model = tiny()
    with EvictingCache(model, "recency", 0.5) as cache, torch.no_grad():
        model(tokens(1, 10), past_key_values=cache)
        model(tokens(1, 6), past_key_values=cache)
        assert cache.kept_positions(0)[0, 0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        cache.compress()
        assert cache.kept_positions(0)[0, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
