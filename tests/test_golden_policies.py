"""Golden choices: exactly what every policy keeps of one small seeded view. A new policy adds its row here."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_gym import CacheView, list_policies, make_policy
from kv_gym.budgets import select
from kv_gym.cache_view import Future, attention_weights
from kv_gym.policies import StatefulPolicy

NAMES = [name for name in list_policies() if name != "scorer"]  # its choices are its weights'


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


# Kept positions of a seeded view of 48 tokens and two heads, at budgets of 6 and 12, with the policy's own protection.
GOLDEN = {
    "cake": {
        6: [[4, 5, 6, 45, 46, 47], [12, 13, 14, 45, 46, 47]],
        12: [[3, 4, 5, 6, 7, 20, 42, 43, 44, 45, 46, 47], [5, 10, 11, 12, 13, 14, 42, 43, 44, 45, 46, 47]],
    },
    "d2o": {
        6: [[0, 1, 2, 4, 5, 6], [0, 1, 2, 3, 4, 6]],
        12: [[0, 1, 2, 3, 4, 5, 6, 7, 14, 20, 46, 47], [0, 1, 2, 3, 4, 5, 6, 7, 12, 14, 46, 47]],
    },
    "golden": {
        6: [[0, 16, 28, 34, 36, 43], [4, 8, 16, 23, 30, 45]],
        12: [[0, 3, 5, 16, 20, 28, 31, 34, 35, 36, 43, 45], [4, 5, 8, 12, 16, 19, 23, 27, 30, 34, 45, 47]],
    },
    "h2o": {
        6: [[0, 1, 5, 45, 46, 47], [0, 1, 3, 45, 46, 47]],
        12: [[0, 1, 2, 4, 5, 6, 42, 43, 44, 45, 46, 47], [0, 1, 2, 3, 4, 6, 42, 43, 44, 45, 46, 47]],
    },
    "keydiff": {
        6: [[3, 7, 11, 19, 33, 41], [7, 12, 16, 33, 43, 47]],
        12: [[3, 7, 10, 11, 19, 29, 33, 36, 41, 42, 45, 47], [6, 7, 12, 13, 16, 22, 28, 33, 36, 43, 44, 47]],
    },
    "knorm": {
        6: [[1, 7, 11, 12, 17, 47], [5, 8, 10, 19, 26, 42]],
        12: [[1, 2, 7, 10, 11, 12, 13, 17, 26, 27, 44, 47], [5, 8, 9, 10, 16, 18, 19, 25, 26, 31, 42, 47]],
    },
    "lazy_eviction": {
        6: [[42, 43, 44, 45, 46, 47], [42, 43, 44, 45, 46, 47]],
        12: [[36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47], [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47]],
    },
    "lfa": {
        6: [[37, 39, 41, 44, 45, 47], [41, 42, 43, 44, 46, 47]],
        12: [[16, 17, 27, 29, 35, 36, 37, 39, 41, 44, 45, 47], [19, 20, 26, 27, 31, 35, 41, 42, 43, 44, 46, 47]],
    },
    "lfu": {
        6: [[0, 4, 5, 9, 10, 19], [0, 1, 2, 3, 4, 6]],
        12: [[0, 3, 4, 5, 6, 7, 9, 10, 14, 16, 19, 20], [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 14, 17]],
    },
    "lra": {
        6: [[42, 43, 44, 45, 46, 47], [42, 43, 44, 45, 46, 47]],
        12: [[36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47], [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47]],
    },
    "lru": {
        6: [[33, 35, 39, 41, 44, 47], [41, 42, 44, 45, 46, 47]],
        12: [[19, 21, 22, 24, 27, 29, 33, 35, 39, 41, 44, 47], [35, 36, 37, 38, 39, 40, 41, 42, 44, 45, 46, 47]],
    },
    "mpcache": {
        6: [[5, 6, 12, 20, 29, 39], [5, 6, 12, 20, 29, 39]],
        12: [[4, 5, 6, 12, 14, 19, 20, 23, 29, 32, 33, 39], [4, 5, 6, 12, 14, 19, 20, 23, 29, 32, 33, 39]],
    },
    "oracle": {
        6: [[0, 5, 7, 15, 28, 45], [4, 15, 19, 22, 39, 43]],
        12: [[0, 5, 7, 8, 11, 15, 21, 25, 28, 37, 39, 45], [4, 10, 11, 15, 19, 20, 22, 23, 31, 39, 43, 46]],
    },
    "r_kv": {
        6: [[41, 42, 43, 45, 46, 47], [41, 42, 43, 45, 46, 47]],
        12: [[36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47], [12, 13, 14, 15, 40, 41, 42, 43, 44, 45, 46, 47]],
    },
    "recency": {
        6: [[42, 43, 44, 45, 46, 47], [42, 43, 44, 45, 46, 47]],
        12: [[36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47], [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47]],
    },
    "roco": {
        6: [[0, 1, 2, 5, 20, 39], [0, 1, 2, 3, 4, 6]],
        12: [[0, 1, 2, 3, 4, 5, 14, 20, 39, 41, 46, 47], [0, 1, 2, 3, 4, 6, 7, 12, 23, 29, 46, 47]],
    },
    "sage_kv": {
        6: [[0, 1, 2, 16, 24, 39], [0, 1, 2, 29, 32, 36]],
        12: [[0, 1, 2, 3, 16, 19, 24, 29, 39, 41, 46, 47], [0, 1, 2, 3, 23, 29, 30, 32, 36, 39, 46, 47]],
    },
    "snapkv": {
        6: [[4, 5, 6, 45, 46, 47], [5, 12, 13, 45, 46, 47]],
        12: [[3, 4, 5, 6, 7, 18, 42, 43, 44, 45, 46, 47], [4, 5, 10, 11, 12, 13, 42, 43, 44, 45, 46, 47]],
    },
    "streaming_llm": {
        6: [[0, 1, 2, 45, 46, 47], [0, 1, 2, 45, 46, 47]],
        12: [[0, 1, 2, 3, 40, 41, 42, 43, 44, 45, 46, 47], [0, 1, 2, 3, 40, 41, 42, 43, 44, 45, 46, 47]],
    },
    "tova": {
        6: [[4, 16, 24, 29, 39, 41], [4, 16, 24, 29, 39, 41]],
        12: [[4, 16, 19, 23, 24, 29, 30, 32, 35, 36, 39, 41], [4, 16, 19, 23, 24, 29, 30, 32, 35, 36, 39, 41]],
    },
    "uniform_order": {
        6: [[1, 2, 6, 27, 36, 38], [4, 8, 9, 12, 23, 43]],
        12: [[1, 2, 6, 21, 22, 27, 31, 36, 38, 39, 41, 42], [1, 4, 6, 8, 9, 12, 15, 23, 28, 29, 41, 43]],
    },
}  # fmt: skip


def golden_view(policy):
    n = 48
    keys, values, queries = normal(10, 1, 2, n, 4), normal(11, 1, 2, n, 4), normal(12, 1, 4, n, 4)
    future = None
    if policy.needs_future:
        attention = np.random.RandomState(13).uniform(size=(1, 2, n, 3, 2)).astype(np.float32)
        future = Future(torch.from_numpy(attention), torch.tensor([0.5, 0.25, 0.25]))
    m = policy.needs_queries
    view = CacheView.of(keys, values, queries=queries[:, :, n - m :] if m else None, future=future)
    if isinstance(policy, StatefulPolicy):
        paid = attention_weights(queries, keys, torch.arange(n)[None], view.positions, view.valid, None)
        view = replace(view, state=policy.observe(view, paid, policy.initial_state(view)))
    return view


@pytest.mark.parametrize("name", NAMES)
def test_golden_choices(name):
    policy = make_policy(name)
    view = golden_view(policy)
    chosen = {}
    for budget in (6, 12):
        kept = select(policy, view.with_budget(torch.full((1, 2), budget)), *policy.protection)
        chosen[budget] = [kept[0, head].nonzero().flatten().tolist() for head in range(2)]
    assert chosen == GOLDEN[name]
