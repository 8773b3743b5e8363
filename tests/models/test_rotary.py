"""Keys before the rotary embedding, against transformers' own embeddings and keys."""

import pytest
import torch
from live_models import tiny
from transformers import Cohere2Config, Cohere2ForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.models.rotary import before_rotation, rotary_frequencies
from kv_gym.policies.scorer import GroupedScorer, Scorer, input_frequencies
from kv_gym.traces import Prompt, record
from kv_gym.training import train

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("kind", ROPES)
def test_the_frequencies_are_those_of_transformers(kind):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPES[kind]))
    found = rotary_frequencies(Fingerprint.of(model).rope, 8)
    torch.testing.assert_close(found, model.model.rotary_emb.inv_freq)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "phi3"])
def test_keys_turned_back_are_those_of_position_zero(family):
    """A token alone attends to itself, so that nothing but the rotation depends on its position."""
    model = tiny(family).float()
    fingerprint = Fingerprint.of(model)
    frequencies = rotary_frequencies(fingerprint.rope, fingerprint.head_dim)
    ids, positions = torch.full((3, 1), 7), torch.tensor([[0], [5], [300]])
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, position_ids=positions, past_key_values=cache)
    for layer in cache.layers:
        back = before_rotation(layer.keys, positions[:, None].expand(layer.keys.shape[:3]), frequencies)
        torch.testing.assert_close(back, layer.keys[:1].expand_as(back), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(layer.keys[0], layer.keys[1], atol=1e-2)


@pytest.mark.parametrize(
    "rope", ["null", "{}", '{"rope_type": "yarn", "rope_theta": 1e4}', '{"rope_theta": true}', "?"]
)
def test_embeddings_that_the_parameters_do_not_tell_are_refused(rope):
    with pytest.raises(UserError, match="train with the input 'key' instead of 'pre_rope_key'"):
        rotary_frequencies(rope, 8)
    with pytest.raises(UserError, match="are incomplete: 'factor'"):
        rotary_frequencies('{"rope_type": "linear", "rope_theta": 10000.0}', 8)


def test_a_model_that_pairs_the_numbers_otherwise_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Cohere2ForCausalLM(Cohere2Config(**SIZES | {"head_dim": 8}, layer_types=["full_attention"] * 2)).eval()
    model.config.layer_types = ["full_attention"] * 2
    fingerprint = Fingerprint.of(model)
    network = GroupedScorer(4, 8, 8, ("pre_rope_key",), frequencies=input_frequencies(["pre_rope_key"], fingerprint))
    with pytest.raises(UserError, match="'key' instead of 'pre_rope_key'"):
        EvictingCache(model, Scorer(network, fingerprint, (1, 99)), 4)


def test_a_policy_that_reads_them_scores_a_token_once(tmp_path):
    """Trained, exported and used live: it depends on the tokens and not on where they stand."""
    model = tiny("llama").float()
    prompts = [
        Prompt(f"p{i}", [(7 * i + 3 * k) % 61 for k in range(24)], [[1, 2, 3]], text_hash=f"p{i}") for i in range(5)
    ]
    record(model, prompts, tmp_path / "traces", progress=False)
    settings = {"steps": 2, "every": 2, "hidden": 8, "contexts": 2, "progress": False}
    policy = train("joint", tmp_path / "traces", tmp_path / "policy", inputs=["pre_rope_key"], **settings)
    assert policy.static
    ids = torch.tensor([prompts[0].context_ids])
    with EvictingCache(model, tmp_path / "policy", 6) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        assert cache.kept().eq(6).all()
