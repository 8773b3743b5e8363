"""Tiny random decoders of every served family: 3 layers, 4 query heads, 2 KV heads."""

import itertools

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
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

from kv_gym import EvictingCache, list_policies, make_policy

VOCABULARY = 61
# the learned policy has tests of its own; an oracle cannot run live
LIVE = [name for name in list_policies() if name != "scorer" and not make_policy(name).needs_future]
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED | {"sliding_window": None}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"num_key_value_heads": 2}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"num_key_value_heads": 2}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"experts_implementation": "eager"},  # the grouped kernel knows no float64
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GROUPED
        | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        | {"query_pre_attn_scalar": 8},
    ),
}
VERSION = version.parse(transformers.__version__)
_BROKEN = pytest.mark.skipif(
    VERSION.release[:2] == (5, 4), reason="transformers 5.4 refuses the default of a field of its own Olmo2Config"
)
# with full attention in every layer
FULL = [pytest.param(family, marks=_BROKEN if family == "olmo2" else ()) for family in FAMILIES if family != "gemma3"]


def tiny(family="llama", attention="sdpa", seed=0, **changes):
    """A float64 model with attention that is far from even, so that a wrong mask shows."""
    kind, config, more = FAMILIES[family]
    torch.manual_seed(seed)
    model = kind(config(**SIZES | more | changes, attn_implementation=attention)).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:  # three dimensions: experts
                weight.mul_(12)
    return model


def tokens(batch, n, seed=0):
    """Random token ids `[batch, n]`."""
    return torch.randint(0, VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(seed))


def feed(model, ids, cache):
    """Logits of one plain forward without position ids."""
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def prefilled(model, policy="knorm", budget=8, n=32, batch=1, **settings):
    """A cache after a first forward of `n` tokens."""
    cache = EvictingCache(model, policy, budget, **settings)
    feed(model, tokens(batch, n), cache)
    return cache


def padded_and_alone(model, sizes, **settings):
    """For both rows of a batch with padding, also in its middle: logits of real tokens in the batch, and alone.

    The rows of 24 tokens come in forwards of those sizes.
    """
    ids, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[0, :9] = mask[0, 16:18] = 0
    cuts = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
    with EvictingCache(model, **settings) as cache, torch.no_grad():
        logits = []
        for start, stop in cuts:
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
            )
            logits.append(out.logits)
        together = torch.cat(logits, 1)
    for row in range(2):
        real = mask[row].bool()
        with EvictingCache(model, **settings) as alone:
            parts = [ids[row : row + 1, start:stop][:, real[start:stop]] for start, stop in cuts]
            yield together[row, real], torch.cat([feed(model, part, alone) for part in parts], 1)[0]
