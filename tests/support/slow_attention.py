"""Attention as the textbook writes it, one number at a time: what the fast code is checked against."""

import math

import numpy as np


def slow_attention(query, keys, query_position, positions, valid, scaling=None):
    """What one query pays each slot, a list of n floats; zeros if it sees none.

    query `[d]`, keys `[n, d]`, positions and valid `[n]`, all NumPy.
    """
    scaling = 1 / math.sqrt(len(query)) if scaling is None else scaling
    visible = [i for i in range(len(keys)) if valid[i] and positions[i] <= query_position]
    products = {i: scaling * sum(float(q) * float(k) for q, k in zip(query, keys[i], strict=True)) for i in visible}
    largest = max(products.values(), default=0.0)
    weights = {i: math.exp(products[i] - largest) for i in visible}
    total = sum(weights.values())
    return [weights[i] / total if i in weights else 0.0 for i in range(len(keys))]


def slow_view_attention(view, window):
    """`CacheView.attention(window)` in loops, `[B, Hq, window, n]` float64."""
    queries, keys = view.queries.numpy(), view.keys.numpy()
    batch, query_heads, m, _ = queries.shape
    group = query_heads // keys.shape[1]
    out = np.zeros((batch, query_heads, window, keys.shape[2]))
    for b in range(batch):
        for q_head in range(query_heads):
            head = q_head // group
            for w in range(window):
                out[b, q_head, w] = slow_attention(
                    queries[b, q_head, m - window + w],
                    keys[b, head],
                    int(view.seen[b]) - window + w,
                    view.positions[b, head].numpy(),
                    view.valid[b, head].numpy(),
                    view.scaling,
                )
    return out
