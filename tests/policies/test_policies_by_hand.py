"""Every policy on a few tokens whose order is worked out on paper; tests of other files are listed by name."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kv_gym import CacheView, list_policies, make_policy
from kv_gym.budgets import select

HERE = Path(__file__)

# policy -> the test of this folder that works its order out, of at most eight tokens
BY_HAND = {
    "cake": "test_cake_adds_the_variance_over_the_window",
    "caote": "test_caote_by_hand",
    "critical_kv": "test_critical_kv_by_hand",
    "d2o": "test_h2o_divides_by_the_queries_that_could_see_the_token",
    "dropkv": "test_dropkv",
    "epicache": "test_epicache_takes_the_most_that_any_query_of_a_probe_pays",
    "expected_attention": "test_expected_attention_by_hand",
    "fast_caote": "test_caote_by_hand",
    "golden": "test_golden_counts_the_blocks_that_remain",
    "graph_kv": "test_graph_kv_by_hand",
    "greedy_error": "test_greedy_error_by_hand",
    "h2o": "test_h2o_divides_by_the_queries_that_could_see_the_token",
    "keydiff": "test_keydiff",
    "knorm": "test_knorm",
    "kvzip": "test_the_order_by_hand",
    "lagkv": "test_lagkv_ranks_deviations_in_a_chunk_on_the_scale_of_the_next",
    "lazy_eviction": "test_lazy_eviction_keeps_who_comes_back_until_overdue",
    "lfa": "test_lra_and_lfa_count_the_top_of_a_query",
    "lfu": "test_lru_and_lfu_count_an_even_share_as_a_use",
    "lra": "test_lra_and_lfa_count_the_top_of_a_query",
    "lru": "test_lru_and_lfu_count_an_even_share_as_a_use",
    "mpcache": "test_mpcache_asks_the_last_share_of_queries_in_the_mean_over_heads",
    "next_use": "test_next_use_waits_until_the_first_request",
    "oracle": "test_oracle_and_golden_read_the_future_as_defined",
    "r_kv": "test_r_kv_charges_all_but_the_newest_of_alike_keys",
    "random": "test_random",
    "recency": "test_recency_and_sinks",
    "roco": "test_roco_lets_only_stable_tokens_go",
    "sage_kv": "test_sage_kv_takes_the_largest_attention_of_a_query_head",
    "same_tokens": "test_scores_worked_out_slot_by_slot",
    "snapkv": "test_snapkv",
    "streaming_llm": "test_recency_and_sinks",
    "streaming_llm_reindexed": "test_recency_and_sinks",
    "tova": "test_tova",
    "value_norm": "test_value_norm_keeps_the_largest_values",
}


@pytest.mark.parametrize("name", [name for name in list_policies() if name != "scorer"])
def test_every_policy_has_an_example(name):
    (found,) = [
        node
        for file in HERE.parent.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == BY_HAND[name]
    ]
    words = {node.value for node in ast.walk(found) if isinstance(node, ast.Constant)}
    assert name in words, f"{BY_HAND[name]} does not name {name}"


def one_head(keys, values=None, **rest):
    keys = torch.tensor(keys, dtype=torch.float32)[None, None]
    return CacheView.of(keys, keys if values is None else torch.tensor(values).float()[None, None], **rest)


def paying(*heads, values=None):
    """One KV head whose query heads pay rows of weights: unit keys, and queries that are the weights' logarithms."""
    queries = torch.tensor(heads).clamp(min=1e-30).log()[None]
    n = queries.shape[-1]
    values = torch.zeros(n, 2) if values is None else torch.tensor(values).float()
    return CacheView.of(torch.eye(n)[None, None], values[None, None], queries=queries, scaling=1.0)


def order(policy, view):
    """Tokens from the first to keep to the first to go; ties to the newer."""
    scores = policy.score(view)[0, 0].tolist()
    return sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)


def test_knorm():
    # norms 5, 1, 2, 13
    view = one_head([[3, 4], [0, 1], [2, 0], [5, 12]])
    assert make_policy("knorm").score(view)[0, 0].tolist() == [-5, -1, -2, -13]
    assert order(make_policy("knorm"), view) == [1, 2, 0, 3]


def test_keydiff():
    # directions +x, +x, +y, -x: their sum is (1, 1), at 45 degrees of the first three and 135 of the last
    view = one_head([[2, 0], [1, 0], [0, 3], [-4, 0]])
    assert make_policy("keydiff").score(view)[0, 0].tolist() == pytest.approx([-(0.5**0.5)] * 3 + [0.5**0.5])
    # and with another +x the sum is (2, 1): x is nearer to it than y
    view = one_head([[2, 0], [1, 0], [1, 0], [0, 3], [-4, 0]])
    assert make_policy("keydiff").score(view)[0, 0] * 5**0.5 == pytest.approx([-2, -2, -2, -1, 2])
    assert order(make_policy("keydiff"), view) == [4, 3, 2, 1, 0]


def test_snapkv():
    # two query heads, two queries; means over both: .3 .05 .15 .2 .1 .2, the last two tokens being the window
    view = paying(
        [[0.6, 0.1, 0.1, 0.1, 0.1, 0.0], [0.2, 0.0, 0.3, 0.1, 0.1, 0.3]],
        [[0.2, 0.1, 0.1, 0.4, 0.2, 0.0], [0.2, 0.0, 0.1, 0.2, 0.0, 0.5]],
    )
    alone = make_policy("snapkv", window=2, kernel=1)
    assert alone.score(view)[0, 0].tolist() == pytest.approx([0.3, 0.05, 0.15, 0.2, 0.1, 0.2])
    # over three neighbours on the same side of the window, zeros beyond the ends
    pooled = make_policy("snapkv", window=2, kernel=3)
    assert pooled.score(view)[0, 0] * 3 == pytest.approx([0.35, 0.5, 0.4, 0.35, 0.3, 0.3])
    assert order(pooled, view)[:2] == [1, 2]
    kept = select(pooled, replace(view, budget=torch.tensor([[4]])), *pooled.protection)
    assert kept[0, 0].nonzero().flatten().tolist() == [1, 2, 4, 5]


def test_tova():
    # the last query alone, and the mean over both KV heads: the first queries pay token 0 everything
    first, second = [[1.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]], [[1.0, 0.0, 0.0, 0.0], [0.5, 0.3, 0.2, 0.0]]
    queries = torch.tensor([first, second]).clamp(min=1e-30).log()[None]
    keys = torch.eye(4).expand(1, 2, 4, 4)
    view = CacheView.of(keys, keys, queries=queries, scaling=1.0)
    assert make_policy("tova").score(view)[0].tolist() == [pytest.approx([0.3, 0.25, 0.25, 0.2])] * 2


def test_dropkv():
    # weights 1/2, 1/4, 1/4 and values 0, 4, 8: the output is 3, its change 1 * 3, 1/3 * 1, 1/3 * 5, and that squared
    view = paying([[0.5, 0.25, 0.25]], values=[[0, 0], [4, 0], [8, 0]])
    policy = make_policy("dropkv", window=1, kernel=1)
    assert policy.score(view)[0, 0].tolist() == pytest.approx([9, 1 / 9, 25 / 9], rel=1e-4)
    # a second query head that pays the last token 4/5 of its attention: output 6.4 + .4 = 6.8
    view = paying([[0.5, 0.25, 0.25]], [[0.1, 0.1, 0.8]], values=[[0, 0], [4, 0], [8, 0]])
    other = [(6.8 / 9) ** 2, (2.8 / 9) ** 2, (4 * 1.2) ** 2]
    expected = [(a + b) / 2 for a, b in zip([9, 1 / 9, 25 / 9], other, strict=True)]
    assert policy.score(view)[0, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert order(policy, view) == [2, 0, 1]


def test_recency_and_sinks():
    view = one_head([[0, 0]] * 8, budget=6)
    for name in ("recency", "streaming_llm", "streaming_llm_reindexed"):
        policy = make_policy(name)
        assert order(policy, view) == [7, 6, 5, 4, 3, 2, 1, 0]
        # half of a budget of 6 is for sinks: three of the four stay
        sinks = [] if name == "recency" else [0, 1, 2]
        chosen = select(policy, view, *policy.protection)[0, 0].nonzero().flatten().tolist()
        assert chosen == sorted({*sinks, *range(8 - (6 - len(sinks)), 8)})


def test_random():
    # tokens 0 and 1 of head 0, layer 0, seed 0. Zero stays zero under every step of the mixer; one is multiplied by
    # 0x9E3779B1 and mixed: each line below is one step, worked out in base 16
    x = 0x9E3779B1
    x = x ^ 0x9E37  # the upper half onto the lower
    assert x == 0x9E37E786
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x46A6B78B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    scores = make_policy("random").score(one_head([[0, 0]] * 2))[0, 0].tolist()
    assert scores == [0.0, x / 2**32]
    assert order(make_policy("random"), one_head([[0, 0]] * 2)) == [1, 0]


def test_epicache_takes_the_most_that_any_query_of_a_probe_pays():
    keys = torch.tensor([1.0, 0, 2, -1]).reshape(1, 1, 4, 1)
    queries = torch.tensor([1.0, -1]).reshape(1, 1, 2, 1)
    view = CacheView.of(keys, keys, scaling=1.0, queries=queries, probe_length=2)
    scores = make_policy("epicache").score(view).flatten()
    assert scores.tolist() == pytest.approx([0.2369, 0.2369, 0.6439, 0.6439], abs=1e-4)
