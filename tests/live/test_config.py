"""How a cache switches its model's attention and back, and what it refuses with one sentence."""

import gc
import weakref

import pytest
import torch
from live_models import feed, prefilled, tiny, tokens

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live import Guard
from kv_gym.live.tiers import LowPrecision
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer


def implementation(model):
    return model.config._attn_implementation


def hooks(model):
    decoder = model.base_model
    return len(decoder._forward_hooks) + len(decoder._forward_pre_hooks) + ("forward" in vars(decoder))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_detach_restores_the_model(attention):
    model = tiny("llama", attention)
    first = EvictingCache(model)
    with EvictingCache(model) as second:
        third = second.fork()
        assert implementation(model) == f"kv_gym_{attention}"
        first.detach()
        first.detach()  # once is enough, and counts once
    assert implementation(model) == f"kv_gym_{attention}"
    third.detach()
    assert (implementation(model), hooks(model)) == (attention, 0)


def test_garbage_collection_restores_the_model():
    model = tiny()
    cache = prefilled(model)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert (implementation(model), hooks(model)) == ("sdpa", 0)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_forward_restores_the_model(error):
    def failing(*_):
        raise error

    model = tiny()
    cache = prefilled(model, n=20)
    handle = model.base_model.layers[1].mlp.register_forward_pre_hook(failing)
    with pytest.raises(error):
        model(tokens(1, 3), past_key_values=cache)
    handle.remove()
    assert (implementation(model), hooks(model)) == ("sdpa", 0)
    assert feed(model, tokens(1, 3), None).isfinite().all()
    with pytest.raises(UserError, match="the cache is detached from its model"):
        model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(UserError, match="a forward failed midway"), cache:
        pass


def test_an_exception_in_the_with_block_restores_the_model():
    model = tiny()
    with pytest.raises(KeyError), EvictingCache(model):
        raise KeyError
    assert (implementation(model), hooks(model)) == ("sdpa", 0)


def test_a_failure_between_update_and_attention_leaves_nothing_behind(monkeypatch):
    model = tiny()
    cache = EvictingCache(model)
    other = prefilled(model, "recency", 8)
    update = EvictingCache.update
    monkeypatch.setattr(EvictingCache, "update", lambda *args: (update(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        model(tokens(1, 3), past_key_values=cache)
    monkeypatch.undo()
    feed(model, tokens(1, 1), None)
    feed(model, tokens(1, 1), other)
    assert cache.layers[0].state.evicted_at == [None]  # nobody else's attention was taken for its own


def test_a_detached_cache_can_be_entered_again():
    model = tiny()
    cache = prefilled(model, "h2o", 8)
    expected = feed(model, tokens(1, 3), cache.fork())
    cache.detach()
    gc.collect()
    assert implementation(model) == "sdpa"
    with cache:
        assert torch.equal(feed(model, tokens(1, 3), cache), expected)


# refusals


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"allocation": "globl"}, "unknown allocation 'globl'; did you mean 'global'"),
        ({"allocation": "global:mean"}, "unknown allocation 'global:mean'; expected uniform, global"),
        ({"allocation": "global", "policy": "knorm"}, "scores of policy 'knorm' are not comparable across heads"),
        ({"trigger": "blocks:256"}, "trigger 'blocks:256' is unknown; expected 'prefill', 'every:<tokens>', "),
        ({"trigger": "every:0"}, "trigger 'every:0' is unknown"),
        ({"trigger": "every:" + "9" * 5000}, r"trigger 'every:9+ \.\.\. 9+' is unknown"),
        ({"allocation": "shares:a\x00b"}, "a□b is no name of a file; expected"),
        ({"trigger": 64}, "trigger 64 is unknown"),
        ({"policy": "oracle"}, "policy 'oracle' is an oracle"),
        ({"policy": "golden"}, "policy 'golden' is an oracle"),
        ({"policy": "h20"}, "did you mean 'h2o'"),
        ({"budget": 0}, "budget 0 is not above zero"),
        ({"budget": 1.5}, "budget 1.5 is a share above 1"),
        ({"sinks": -1}, "sinks and recent are -1 and 32"),
        ({"sinks": True}, "sinks and recent are True and 32; expected whole numbers"),
        ({"budget": None}, "budget is None; expected one, such as"),
        ({"guard": "logits"}, "guard is 'logits'; expected a"),
        ({"delay": 10**30}, "delay is 10+; expected a number of tokens"),
        ({"sinks": 10**30}, "sinks and recent are 10+ and 32; expected numbers from 0 and below 2,147,483,648"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    model = tiny()
    with pytest.raises(UserError, match=sentence.replace("<", ".").replace("'", ".")):
        EvictingCache(model, **settings)
    assert (implementation(model), hooks(model)) == ("sdpa", 0)


def test_a_policy_of_another_model_is_refused():
    model, other = tiny(seed=0), tiny(seed=1)
    network = GroupedScorer(heads=6, head_dim=8, hidden=4)
    policy = Scorer(network, Fingerprint.of(other), (16, 24))
    with pytest.raises(UserError, match=r"policy 'scorer' was made for a model with weights hash \w+, and Llama"):
        EvictingCache(model, policy)
    with EvictingCache(other, policy, 8) as cache:
        feed(other, tokens(1, 20), cache)
        assert cache.kept_positions(2).shape == (1, 2, 8)


def test_an_exported_folder_is_a_policy(tmp_path):
    model = tiny()
    policy = Scorer(GroupedScorer(heads=6, head_dim=8, hidden=4), Fingerprint.of(model), (16, 40))
    folder = policy.save_pretrained(tmp_path / "scorer")
    first, second = prefilled(model, policy, 8), prefilled(model, folder, 8)
    for layer in range(3):
        assert torch.equal(first.kept_positions(layer), second.kept_positions(layer))
    with pytest.raises(UserError, match="weights hash"):
        EvictingCache(tiny(seed=1), str(folder))
    with pytest.raises(UserError, match="weights hash"):
        prefilled(tiny(seed=1), "knorm", 1.0).fork(policy=policy)


def test_a_length_out_of_range_is_warned_about():
    model = tiny()
    policy = Scorer(GroupedScorer(heads=6, head_dim=8, hidden=4), Fingerprint.of(model), (16, 24))
    with EvictingCache(model, policy, 8) as cache, pytest.warns(UserWarning, match="16 to 24 tokens.*after more"):
        feed(model, tokens(1, 40), cache)


def test_models_that_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=4))
    with pytest.raises(UserError, match="no full-attention layer"):
        EvictingCache(sliding)
    bert_like = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, is_decoder=True))
    bert_like._supports_attention_backend = False
    with pytest.raises(UserError, match="no decoder on transformers' attention interface"):
        EvictingCache(bert_like)


def test_a_mask_that_differs_from_the_one_before_is_refused():
    model = tiny()
    cache = prefilled(model, n=6, batch=2)
    with pytest.raises(UserError, match=r"shows \[4, 6\] of the tokens seen and the cache read \[6, 6\]"):
        model(tokens(2, 1), attention_mask=torch.tensor([[0, 0, *[1] * 5], [1] * 7]), past_key_values=cache)
    with pytest.raises(UserError, match="covers 1 tokens and 6 were seen before this forward"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=prefilled(model, n=6, batch=2))
    assert cache.seen == 6
    with EvictingCache(model) as fine:
        assert model(tokens(2, 6), attention_mask=torch.ones(2, 6), past_key_values=fine).logits.shape[1] == 6


def test_explicit_masks_and_positions_are_refused():
    model = tiny()
    for mask in (torch.zeros(1, 1, 6, 6), {"full_attention": None}):
        with pytest.raises(UserError, match="makes its own causal mask"):
            model(tokens(1, 6), attention_mask=mask, past_key_values=EvictingCache(model))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(UserError, match="do not count on from the 0 tokens seen"):
        model(tokens(1, 6), position_ids=packed, past_key_values=EvictingCache(model))


def test_misuse_is_refused():
    model = tiny()
    empty = EvictingCache(model)
    for ask in (empty.compress, lambda: empty.kept_positions(0)):
        with pytest.raises(UserError, match="the cache is empty"):
            ask()
    cache = prefilled(model, batch=2)
    with pytest.raises(UserError, match="layer 3 does not evict; the layers with full attention are 0, 1, 2"):
        cache.kept_positions(3)
    with pytest.raises(UserError, match="cannot be cropped by the newest 1 tokens but by 0"):
        cache.crop(-1)
    with pytest.raises(UserError, match="holds a batch of 2 and was given one of 3"):
        model(tokens(3, 1), past_key_values=cache)


def test_a_cache_of_another_model_is_refused():
    model, other = tiny(seed=0), tiny(seed=1)
    with (
        EvictingCache(model) as cache,
        pytest.raises(UserError, match="give the cache to the model that it was made for"),
    ):
        other(tokens(1, 6), past_key_values=cache)
    assert implementation(model) == "sdpa"


def test_changed_attention_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(UserError, match="changes its attention by 'softcap'"):
        model(tokens(1, 6), past_key_values=EvictingCache(model))


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        ({"offload": True}, {"evicted": "merge"}, "changes survivors, so a copy of evicted pairs"),
        ({"positions": "cache"}, {"evicted": "bits:4"}, "choose one of the two"),
        ({"positions": "cache"}, {"guard": Guard()}, "choose one of the two"),
        ({}, {"positions": "middle"}, "expected 'original' or 'cache'"),
        ({}, {"guard": Guard(then="restore")}, "give offload=True"),
        ({}, {"guard": Guard("tier")}, "evicted='drop' keeps none"),
        ({}, {"guard": Guard(layers=(3,))}, "averages layer 3, and 3 layers evict"),
        ({}, {"policy": "oracle"}, "is an oracle"),
        ({}, {"budget": 1.5}, "is a share above 1"),
        ({}, {"sinks": -1}, "sinks and recent are -1"),
        ({}, {"evicted": LowPrecision(2, group=3)}, "heads have 8 channels"),
    ],
)
def test_a_fork_is_refused_what_the_constructor_refuses(settings, changes, sentence):
    model = tiny()
    with pytest.raises(UserError, match=sentence):
        EvictingCache(model, **{"policy": "knorm"} | settings | changes)
    with EvictingCache(model, "knorm", **settings) as cache, pytest.raises(UserError, match=sentence):
        cache.fork(**changes)
    assert (implementation(model), hooks(model)) == ("sdpa", 0)
