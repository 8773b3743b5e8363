"""A trace set whose best ranking is known: worth is a function of one direction of the key, and of the position."""

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from kv_gym.traces import Continuation, Sequence
from kv_gym.traces.recorder import make_manifest
from kv_gym.traces.writer import TraceWriter

LAYERS, HEADS, TOKENS, DIM, BLOCKS = 2, 2, 40, 4, 3
WIDTH = 16  # of hidden states


def known_worth(keys):
    """`[L, H, n]`: every head looks along a coordinate of its own, and later tokens are worth more."""
    layers, heads, n, _ = keys.shape
    worth = np.empty((layers, heads, n), np.float32)
    for layer in range(layers):
        for head in range(heads):
            worth[layer, head] = np.exp(2 * keys[layer, head, :, layer * heads + head] + 2 * np.arange(n) / n)
    return worth / worth.sum(-1, keepdims=True)


def mixed(keys):
    """`[L, n, WIDTH]`: all that the worth of a layer's slots depends on, one number each; then nothing."""
    layers, heads, n, d = keys.shape
    told = np.zeros((layers, n, WIDTH), np.float32)
    told[..., : heads * d] = keys.transpose(0, 2, 1, 3).reshape(layers, n, heads * d)
    told[..., heads * d] = np.arange(n) / n
    return told


def write_known_traces(folder, contexts=24, training=16, hidden=True):
    """Contexts of 40 tokens with one continuation of three blocks; the last contexts are the split `test`."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=DIM,
    )  # fmt: skip
    manifest = make_manifest(LlamaForCausalLM(config), None, "auto", {"window": 1, "stats": [], "blocks": BLOCKS}, None)
    random = np.random.default_rng(0)
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    ids = [f"s{i}" for i in range(contexts)]
    with TraceWriter(folder, manifest).shard(0, ids) as shard:
        for i, name in enumerate(ids):
            keys, values = random.standard_normal((2, LAYERS, HEADS, TOKENS, DIM)).astype(np.float32)
            share = np.array([0.5, 0.3, 0.2], np.float32)  # of every block of two queries
            future = 2 * np.repeat(known_worth(keys)[..., None, None] * share[:, None], 2, -1)
            continuations = (Continuation(np.zeros(2 * BLOCKS, int), future.astype(np.float32), 2),)
            sequence = Sequence(
                name, np.arange(TOKENS) % 8, keys, values, keys[:, :, -1:], continuations, (0, 1), (0.5, 0.5),
                task="known", split="train" if i < training else "test", text_hash=name,
                hidden=mixed(keys) @ mix if hidden else None,
            )  # fmt: skip
            shard.add(sequence, i)
    return folder
