"""Tiny random models of every supported family, and prompts for them."""

import numpy as np
import torch
import transformers

from kv_gym.traces import Prompt

VOCABULARY, CONTEXT = 61, 150  # more than one block of 128 queries

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "initializer_range": 0.25,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": ("Llama", {"head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "phi3": ("Phi3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "gemma3": ("Gemma3", {"head_dim": 8, "layer_types": SLIDING, "sliding_window": 16, "query_pre_attn_scalar": 8}),
}


def tiny_model(family="llama", seed=0, **changes):
    name, settings = FAMILIES[family]
    text = "Text" if family == "gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**SIZES, **settings, **changes})
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def some_prompt(lengths=(20, 20, 3, 40), name="p0", seed=0, context=CONTEXT):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, VOCABULARY, n).tolist()  # noqa: E731
    return Prompt(name, draw(context), [draw(n) for n in lengths], task="noise")


PROMPTS = [some_prompt((5, 18), f"p{i}", seed=i, context=24) for i in range(5)]


def same(a, b):
    """Whether two sequences hold the same, to the bit."""
    arrays = [(a.tokens, b.tokens), (a.keys, b.keys), (a.values, b.values), (a.queries, b.queries)]
    arrays += [(x.future, y.future) for x, y in zip(a.continuations, b.continuations, strict=True)]
    arrays += [(x.tokens, y.tokens) for x, y in zip(a.continuations, b.continuations, strict=True)]
    arrays += [(a.stats[p][s], b.stats[p][s]) for p in a.stats for s in a.stats[p]]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays) and (
        (a.id, a.layers, a.scaling, a.task, a.split, a.text_hash, a.dtype)
        == (b.id, b.layers, b.scaling, b.task, b.split, b.text_hash, b.dtype)
    )
