"""Queries made again from a module's input are those that the attention function got, in every served family."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kv_gym.errors import UserError
from kv_gym.interop.queries import SERVED, prompt_queries

N = 12
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
# head_dim other than hidden size / heads wherever the family allows it
FAMILIES = {
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 16}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {
        "head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
}  # fmt: skip


def run(family):
    """What each layer's attention module was given, and the queries that its attention function got."""
    kind, config, more = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**SIZES | more, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name:
                weight.uniform_(0.3, 2)  # ones would hide a norm that was forgotten or misplaced
    given, queries = {}, {}

    def listening(module, query, *arguments, **rest):
        queries[module.layer_idx] = query
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *arguments, **rest)

    AttentionInterface.register("listening", listening)
    AttentionMaskInterface.register("listening", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("listening")
    modules = [layer.self_attn for layer in model.model.layers]
    for module in modules:
        module.register_forward_hook(
            lambda module, _, kwargs, __: given.update({module.layer_idx: kwargs}), with_kwargs=True
        )
    with torch.no_grad():
        model(torch.arange(N)[None].repeat(2, 1))
    return [(module, given[i], queries[i]) for i, module in enumerate(modules)]


@pytest.mark.parametrize("family", SERVED)
def test_queries_are_those_of_the_attention_function(family):
    for module, given, queries in run(family):
        for last in (N, 5, 1):
            with torch.no_grad():
                found = prompt_queries(module, given["hidden_states"], given["position_embeddings"], last)
            torch.testing.assert_close(found, queries[:, :, N - last :])


def test_more_queries_than_tokens_are_all_of_them():
    module, given, queries = run("llama")[1]
    with torch.no_grad():
        found = prompt_queries(module, given["hidden_states"], given["position_embeddings"], N + 20)
    torch.testing.assert_close(found, queries)


def test_angles_of_other_tokens_are_refused():
    module, given, _ = run("llama")[0]
    one = tuple(angles[:, -1:] for angles in given["position_embeddings"])  # as kvpress's decoding press has them
    with pytest.raises(UserError, match=r"12 hidden states and rotary angles of 1 tokens.*EvictingCache"):
        prompt_queries(module, given["hidden_states"], one, 4)


def test_a_family_nobody_checked_is_refused():
    module, given, _ = run("llama")[0]
    module.config.model_type = "new_family"
    with pytest.raises(UserError, match=r"not known here.*such as knorm or keydiff"):
        prompt_queries(module, given["hidden_states"], given["position_embeddings"], 4)
