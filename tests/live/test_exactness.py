"""Decoding with evicted tokens equals a full cache with the same tokens masked, for every family."""

import pytest
import torch
import transformers
from live_models import FULL, LIVE, feed, tiny, tokens
from masked_reference import MaskedReference
from packaging import version

from kv_gym import EvictingCache

EXACT = {"rtol": 0, "atol": 1e-5}


def follow(cache, reference, layers):
    """Hide from the reference what the cache evicted; returns how many tokens that is per head."""
    for layer in layers:
        reference.hide(layer, cache.kept_positions(layer))
    return cache.seen - cache.kept_positions(layers[0]).shape[2]


@torch.no_grad()
def compare(model, cache, pieces, layers=(0, 1, 2)):
    """Feed the pieces to both, one forward each without position ids; returns evicted tokens after each."""
    reference, evicted = MaskedReference(model), []
    for piece in pieces:
        live = model(piece, past_key_values=cache).logits
        torch.testing.assert_close(live, reference(piece), **EXACT)
        evicted.append(follow(cache, reference, layers))
    return evicted


def split(ids, *sizes):
    return torch.split(ids, sizes, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FULL)
def test_prefill_question_and_answer(family, attention):
    model = tiny(family, attention)
    with EvictingCache(model, "h2o", 0.25, sinks=1, recent=2) as cache:
        pieces = split(tokens(2, 41), 32, 5, 1, 1, 1, 1)
        assert compare(model, cache, pieces) == [24] * 6
        kept = cache.kept_positions(1)
        assert not torch.equal(kept[0, 0], kept[0, 1])  # every head its own tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FULL)
def test_evictions_while_decoding(family, attention):
    model = tiny(family, attention)
    with EvictingCache(model, "h2o", 8, trigger="every:4", sinks=0, recent=0) as cache:
        pieces = split(tokens(2, 36), 20, 1, 1, 1, 1, 1, 3, 6, 1, 1)
        # after 20 tokens 8 stay; then whenever 4 or more came, at the end of the forward that brings them
        assert compare(model, cache, pieces) == [12, 12, 12, 12, 16, 16, 20, 26, 26, 26]


@pytest.mark.parametrize("policy", LIVE)
def test_policies_while_decoding(policy):
    model = tiny()
    # positions inside the cache have a reference of their own: test_rope_shift.py
    with EvictingCache(model, policy, 0.25, trigger="every:2", recent=3, positions="original") as cache:
        evicted = compare(model, cache, split(tokens(1, 30), 20, *[1] * 6, 4))
        assert evicted == [15, 15, 17, 17, 18, 18, 20, 23]  # a quarter of the tokens seen stays, rounded down


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunked_prefill(attention):
    model = tiny("qwen3", attention)
    with EvictingCache(model, "h2o", 6, trigger="every:8", recent=1) as cache:
        assert compare(model, cache, split(tokens(2, 40), 8, 8, 8, 8, 8)) == [2, 10, 18, 26, 34]


# before 5.4 transformers gave every chunk the positions of the last one, which the cache refuses
@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.4"), reason="wrong positions upstream")
def test_chunked_prefill_through_generate():
    model = tiny()
    ids = tokens(2, 40)
    through, plain = (EvictingCache(model, "h2o", 6, trigger="every:8", recent=1) for _ in range(2))
    out = model.generate(
        ids, past_key_values=through, prefill_chunk_size=8, max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    for piece in torch.split(ids, 8, 1):
        logits = feed(model, piece, plain)
    torch.testing.assert_close(out.logits[0].double(), logits[:, -1], **EXACT)
    for layer in range(3):
        assert torch.equal(through.kept_positions(layer), plain.kept_positions(layer))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_layers_are_left_alone(attention):
    model = tiny("gemma3", attention)
    with EvictingCache(model, "h2o", 0.5, trigger="every:3", recent=1) as cache:
        assert cache.evicting_layers == [1, 2]
        evicted = compare(model, cache, split(tokens(2, 34), 20, 4, 1, 1, 1, 7), layers=(1, 2))
        assert evicted == [10, 12, 12, 12, 14, 17]
        assert cache.layers[0].keys.shape[2] == 7  # the window of 8 less the token to come


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate(attention):
    model = tiny("llama", attention)
    ids = tokens(2, 32)
    cache = EvictingCache(model, "h2o", 0.25, trigger="every:4", recent=2)
    kept = []
    original = cache.before_forward
    cache.before_forward = lambda arguments: (
        kept.append([cache.kept_positions(layer) for layer in range(3)] if cache.seen else None),
        original(arguments),
    )
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=11, do_sample=False, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    reference = MaskedReference(model)
    new = out.sequences[:, 32:]
    for step, logits in enumerate(out.logits):
        if step:
            for layer in range(3):
                reference.hide(layer, kept[step][layer])
        expected = reference(ids if step == 0 else new[:, step - 1 : step])[:, -1]
        torch.testing.assert_close(logits.double(), expected, **EXACT)
    assert cache.seen == 42
    assert [each[0].shape[2] for each in kept[1:]] == [8, 9, 10, 11, 9, 10, 11, 12, 10, 11]


def test_second_generate_on_the_same_cache():
    model = tiny()
    ids = tokens(1, 32)
    cache = EvictingCache(model, "h2o", 0.25, recent=2)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    kept = [cache.kept_positions(layer) for layer in range(3)]
    longer = torch.cat((first, tokens(1, 5, seed=1)), 1)
    second = model.generate(
        longer, past_key_values=cache, max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    reference = MaskedReference(model)
    reference(ids)
    for layer in range(3):
        reference.hide(layer, kept[layer][..., :8])
    expected = reference(longer[:, 32:])[:, -1]
    assert cache.seen == 41
    torch.testing.assert_close(second.logits[0].double(), expected, **EXACT)


def test_the_reference_can_disagree():
    """The comparison is worth something: another choice of tokens gives other logits."""
    model = tiny()
    ids, question = split(tokens(1, 33), 32, 1)
    with EvictingCache(model, "h2o", 0.25) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        reference = MaskedReference(model)
        reference(ids)
        for layer in range(3):
            reference.hide(layer, cache.kept_positions(0).roll(1, 1))  # heads exchanged
        difference = (model(question, past_key_values=cache).logits - reference(question)).abs().max()
    assert difference > 1e-2
