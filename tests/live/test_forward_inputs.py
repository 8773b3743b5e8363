"""What a forward may bring to an evicting cache, and the sentences for what it may not."""

import pytest
import torch
from live_models import VERSION, feed, prefilled, tiny, tokens
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLTextConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from kv_gym import EvictingCache
from kv_gym.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags")
chunks_work = pytest.mark.skipif(VERSION.release < (5, 4), reason="wrong positions upstream")


def generated(model, ids, cache, count, **more):
    masked = {"attention_mask": torch.ones_like(ids)} | more
    return model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False, pad_token_id=0, **masked)


@chunks_work
@pytest.mark.parametrize(
    ("policy", "allocation", "chunk"),
    [("snapkv:window=4", "uniform", 8), ("kvzip", "global:softmax", 1), ("knorm", "global:softmax", 100)],
)
def test_chunks_of_one_prefill_are_cut_once_at_its_end(policy, allocation, chunk):
    model, ids = tiny(), tokens(2, 24)
    kept, texts = [], []
    for more in ({}, {"prefill_chunk_size": chunk}):
        with EvictingCache(model, policy, 0.5, allocation=allocation) as cache:
            texts.append(generated(model, ids, cache, 3, **more))
            kept.append(cache.kept_positions(0))
    assert torch.equal(*kept) and torch.equal(*texts)
    assert int(cache.kept().sum()) == 3 * 2 * 2 * (12 + 2)


def test_a_single_token_at_a_wrong_position():
    model, ids = tiny(), tokens(1, 20)
    cache = prefilled(model, n=20)
    with pytest.raises(UserError, match=r"begin at 19|mask shows|covers 20 tokens"):
        generated(model, ids[:, -1:], cache, 2, attention_mask=torch.ones(1, 20, dtype=torch.int64))
    with pytest.raises(UserError, match="begin at 19 and do not count on from the 20 tokens seen"):
        model(ids[:, -1:], position_ids=torch.tensor([[19]]), past_key_values=prefilled(model, n=20))
    with prefilled(model, n=20) as cache:
        generated(model, torch.cat((ids, tokens(1, 1)), 1), cache, 2)
        assert cache.seen == 22


def test_a_mask_of_more_tokens_and_rows_that_there_are_not():
    model = tiny()
    cache = prefilled(model, n=20)
    before = cache.kept_positions(0)
    for rows in ([2, 0], [-1, 0], [0.0, 1.0]):
        with pytest.raises(UserError, match="are asked for and the cache has 1, counted from 0"):
            cache.reorder_cache(torch.tensor(rows))
    assert torch.equal(cache.kept_positions(0), before)  # of no layer were rows taken
    with pytest.raises(UserError, match="covers 23 tokens and 20 were seen before this forward of 1"):
        model(tokens(1, 1), attention_mask=torch.ones(1, 23), past_key_values=cache)


def test_a_shorter_prompt_in_a_used_cache_names_the_cure():
    model = tiny()
    cache = prefilled(model, n=20)
    with pytest.raises(UserError, match=r"another text call reset\(\) or make a new cache"):
        model(tokens(1, 10), position_ids=torch.arange(10)[None], past_key_values=cache)


def test_a_forward_of_no_tokens():
    model = tiny()
    with pytest.raises(UserError, match="a forward brought no tokens"):
        feed(model, tokens(1, 0), prefilled(model))
    with EvictingCache(model) as cache:
        embeddings = model.get_input_embeddings()(tokens(1, 12))
        model(inputs_embeds=embeddings, past_key_values=cache)
        assert cache.seen == 12


@pytest.mark.parametrize("policy", ["snapkv:window=4", "kvzip"])
def test_text_of_a_model_with_three_dimensional_positions(policy):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = Qwen2VLTextConfig(**sizes, **heads, rope_parameters=rope, bos_token_id=None, eos_token_id=None)
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text.to_dict(), vision_config=vision, attn_implementation="sdpa")
    model = Qwen2VLForConditionalGeneration(config).double().eval()
    rows = tokens(2, 30)
    mask = torch.ones_like(rows)
    together, alone = EvictingCache(model, policy, 0.5), EvictingCache(model, policy, 0.5)
    for stop in (16, 30):  # two turns
        texts = generated(model, rows[:, :stop], together, 2, attention_mask=mask[:, :stop])
        one = generated(model, rows[:1, :stop], alone, 2, attention_mask=mask[:1, :stop])
        assert torch.equal(texts[:1], one)
        for layer in range(2):
            assert torch.equal(together.kept_positions(layer)[:1], alone.kept_positions(layer))
        together.crop(-1), alone.crop(-1)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova", "lru", "r_kv", "streaming_llm"])
def test_keys_that_are_not_finite_are_refused(policy):
    model = tiny()
    model.model.layers[1].self_attn.k_proj.bias = torch.nn.Parameter(torch.full((16,), float("nan")).double())
    with pytest.raises(UserError, match="the keys of layer 1 are not finite"):
        feed(model, tokens(1, 12), EvictingCache(model, policy, 8))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_weights_are_refused(attention):
    model = tiny(attention=attention)
    with EvictingCache(model, "knorm", 4) as cache, pytest.raises(UserError, match="has no attention weights to give"):
        model(tokens(1, 8), past_key_values=cache, output_attentions=True)
