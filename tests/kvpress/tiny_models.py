"""Tiny random decoders, what their attention was really given, and what they cached."""

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 61, 2, 4, 2, 8
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
captured = {}  # layer -> queries [batch, query_heads, tokens, d] of the last forward


def tiny(family="llama", dtype=torch.float64):
    """A decoder with attention far from even; its query norms are random, so that a forgotten one shows."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, pad_token_id=None,
            bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(12)
            if "q_norm" in name or "k_norm" in name:
                weight.uniform_(0.3, 2)
    return model.to(dtype).eval()


def prompt(n, seed=1, batch=1):
    """Token ids `[batch, n]`; none twice in a row, so that every value of the first layer is another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:n] for _ in range(batch)])


def prefilled(model, ids, press=None, **more):
    """Keys and values of each layer after one forward, under a press or without."""
    cache = DynamicCache()
    with torch.no_grad():
        if press is None:
            model(ids, past_key_values=cache, **more)
        else:
            with press(model):
                model(ids, past_key_values=cache, **more)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _capturing(module, query, *arguments, **more):
    captured[module.layer_idx] = query
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *arguments, **more)


def attended(model, ids):
    """Keys and values of each layer, and the queries that its attention function got."""
    AttentionInterface.register("capturing", _capturing)
    AttentionMaskInterface.register("capturing", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("capturing")
    try:
        pairs = prefilled(model, ids)
    finally:
        model.set_attn_implementation("sdpa")
    return [(keys, values, captured[layer]) for layer, (keys, values) in enumerate(pairs)]


def slow_attention(queries, keys, scaling):
    """Causal softmax attention `[query_heads, tokens, tokens]` of one row, one number at a time."""
    heads, n, _ = queries.shape
    weights = torch.zeros(heads, n, n, dtype=torch.float64)
    for head in range(heads):
        of = keys[head // (heads // len(keys))]
        for i in range(n):
            products = torch.stack([(queries[head, i] * of[j]).sum() for j in range(i + 1)]).double() * scaling
            weights[head, i, : i + 1] = products.softmax(0)
    return weights
