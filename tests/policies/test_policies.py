"""Every policy: the contract, and exactness against loops written from the papers' formulas."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from slow_attention import slow_attention, slow_view_attention

from kv_gym import CacheView, Policy, list_policies, make_policy
from kv_gym.budgets import protection_for, select
from kv_gym.cache_view import Future, attention_weights
from kv_gym.errors import UserError
from kv_gym.policies import StatefulPolicy
from kv_gym.testing import check_policy

NAMES = [name for name in list_policies() if name != "scorer"]  # the learned one has a test file of its own


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def ragged_view(m=4):
    """Two rows, two KV heads, four query heads; heads hold different tokens, some slots are invalid."""
    positions = torch.tensor(
        [
            [[0, 1, 2, 5, 8, 10, 11, 12, 14, 15], [0, 3, 4, 9, 10, 11, 13, 15, -1, -1]],
            [[2, 4, 5, 6, 7, 8, -1, -1, -1, -1], [0, 1, 3, 8, -1, -1, -1, -1, -1, -1]],
        ]
    )
    return CacheView(
        keys=normal(1, 2, 2, 10, 4),
        values=normal(2, 2, 2, 10, 4),
        positions=positions,
        valid=positions >= 0,
        seen=torch.tensor([16, 9]),
        budget=torch.tensor([[4, 4], [3, 2]]),
        queries=normal(3, 2, 4, m, 4),
    )


def equal_where_valid(scores, expected, view):
    np.testing.assert_allclose(scores[view.valid].numpy(), expected[view.valid.numpy()], atol=1e-6)
    return True


# -- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    assert check_policy(make_policy(name)) is None


@pytest.mark.parametrize("settings", [{"window": 3, "kernel": 1}, {"window": 64, "kernel": 9}])
def test_contract_of_snapkv_with_other_windows(settings):
    assert check_policy(make_policy("snapkv", **settings)) is None


@pytest.mark.parametrize("name", NAMES)
def test_contract_with_one_query_head_per_kv_head(name):
    assert check_policy(make_policy(name), kv_heads=3, query_heads=3, layers=(0, 5), tokens=9, seed=1) is None


@dataclass(frozen=True)
class Broken(StatefulPolicy):
    """Breaks the one promise that it is told to break."""

    promise: str = ""

    @property
    def static(self):
        return self.promise in ("static", "truly static")

    def initial_state(self, view):
        shape = view.positions.shape[:2] if self.promise == "state shape" else view.positions.shape
        return {"count": torch.zeros(shape)}

    def observe(self, view, attention, state):
        return {"mass" if self.promise == "state names" else "count": state["count"] + 1}

    def score(self, view):
        scores = view.keys.float().sum(-1)
        if self.promise == "shape":
            return scores[..., 0]
        if self.promise == "type":
            return scores.long()
        if self.promise == "finite":
            return scores / torch.zeros_like(scores)
        if self.promise == "repeatable":
            return torch.rand_like(scores)
        if self.promise == "pure":
            view.keys.add_(1)
        if self.promise == "rows":
            return scores - scores.mean((0, 1, 2))
        if self.promise == "padding":
            return scores - scores.mean(-1, keepdim=True)
        if self.promise == "static":
            return scores - view.seen[:, None, None] / 50
        if self.promise == "order":
            return scores + torch.arange(scores.shape[-1])
        return scores


@pytest.mark.parametrize(
    ("promise", "complaint"),
    [
        ("shape", r"returned scores \[2, 2\]; expected \[2, 2, 40\]"),
        ("type", "int64 scores; expected a floating type"),
        ("finite", "not finite"),
        ("repeatable", "scored the same view differently twice"),
        ("pure", "changed the view's keys in place"),
        ("rows", "lets batch rows change one another"),
        ("padding", "lets invalid slots change the scores of valid ones"),
        ("order", "depends on the order in which slots lie"),
        ("static", "says it is static, and scores change with the other slots or with the tokens seen"),
        ("state shape", r"has state 'count' of shape \[2, 2\]; expected \[2, 2, 40\]"),
        ("state names", "changed names, shapes or types of its state"),
    ],
)
def test_check_policy_names_the_broken_promise(promise, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_policy(Broken(promise=promise))


def test_check_policy_passes_an_honest_policy():
    assert check_policy(Broken(promise="none")) is None
    assert check_policy(Broken(promise="truly static")) is None


def test_an_undeclared_need_is_found():
    class Undeclared(Policy):
        def score(self, view):
            return view.attention(1).mean((1, 2))[:, None].expand(view.positions.shape)

    with pytest.raises(ValueError, match="needs_queries"):
        check_policy(Undeclared())


# -- exactness ---------------------------------------------------------------------------------------------------


def test_h2o_accumulates_the_attention_of_every_query_over_blocks():
    # eight tokens, causal, queries shown in blocks of 3, 3 and 2; sum over queries, mean over the group's heads
    n, heads, query_heads, d = 8, 2, 4, 4
    keys, queries = normal(1, 1, heads, n, d), normal(2, 1, query_heads, n, d)
    view = CacheView.of(keys, keys)
    policy = make_policy("h2o")
    state = policy.initial_state(view)
    for start, stop in ((0, 3), (3, 6), (6, 8)):
        at = torch.arange(start, stop)[None]
        attention = attention_weights(queries[:, :, start:stop], keys, at, view.positions, view.valid, None)
        state = policy.observe(view, attention, state)
    expected = np.zeros((1, heads, n))
    for query_head in range(query_heads):
        head = query_head // 2
        for t in range(n):
            paid = slow_attention(
                queries[0, query_head, t].numpy(), keys[0, head].numpy(), t, list(range(n)), [True] * n
            )
            expected[0, head] += np.array(paid) / 2
    assert equal_where_valid(policy.score(replace(view, state=state)), expected, view)
    assert expected.sum() == pytest.approx(heads * n)  # every query pays one in all


@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (3, 3), (4, 5)])
def test_snapkv_pools_the_windows_mean_attention_over_older_neighbours(window, kernel):
    view = ragged_view()
    attention = slow_view_attention(view, window)
    expected = np.zeros((2, 2, 10))
    for b in range(2):
        for h in range(2):
            slots = [i for i in range(10) if view.valid[b, h, i]]
            mean = [attention[b, 2 * h : 2 * h + 2, :, i].mean() for i in slots]  # over window and group
            in_window = [int(view.positions[b, h, i]) >= int(view.seen[b]) - window for i in slots]
            for place, slot in enumerate(slots):
                # zeros beyond the ends, and beyond the edge of the window, count in the mean
                near = range(max(0, place - kernel // 2), min(len(slots), place + kernel // 2 + 1))
                same_side = [mean[j] for j in near if in_window[j] == in_window[place]]
                expected[b, h, slot] = sum(same_side) / kernel
    assert equal_where_valid(make_policy("snapkv", window=window, kernel=kernel).score(view), expected, view)


def test_snapkv_equals_the_reference_code_on_a_prompt():
    # softmax over all keys, sum over the window, the window's columns dropped, average pooling, mean over the group
    n, window, kernel = 20, 6, 5
    keys, queries = normal(1, 1, 2, n, 4), normal(2, 1, 4, window, 4)
    scores = make_policy("snapkv", window=window, kernel=kernel).score(CacheView.of(keys, keys, queries=queries))
    products = queries.numpy() @ keys.repeat_interleave(2, 1).numpy().transpose(0, 1, 3, 2) / 2
    products += np.triu(np.full((window, n), -1e30), k=n - window + 1)
    weights = np.exp(products - products.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    summed = weights[..., :-window].sum(2)
    padded = np.pad(summed, ((0, 0), (0, 0), (2, 2)))
    pooled = np.stack([padded[..., i : i + kernel].mean(-1) for i in range(n - window)], -1)
    expected = pooled.reshape(1, 2, 2, -1).mean(2)
    np.testing.assert_allclose(scores[..., :-window].numpy() * window, expected, atol=1e-6)
    assert make_policy("snapkv", window=window).protection == (0, window)


def test_tova_averages_the_last_querys_attention_over_all_heads_by_token():
    view = ragged_view()
    attention = slow_view_attention(view, 1)[:, :, 0]
    expected = np.zeros((2, 2, 10))
    for b in range(2):
        by_token = {}
        for query_head in range(4):
            for i in range(10):
                if view.valid[b, query_head // 2, i]:
                    token = int(view.positions[b, query_head // 2, i])
                    by_token[token] = by_token.get(token, 0.0) + attention[b, query_head, i] / 4
        for h in range(2):
            for i in range(10):
                expected[b, h, i] = by_token.get(int(view.positions[b, h, i]), 0.0)
    assert equal_where_valid(make_policy("tova").score(view), expected, view)


def test_tova_keeps_one_set_of_tokens_for_all_heads():
    view = CacheView.of(normal(1, 1, 3, 12, 4), normal(2, 1, 3, 12, 4), 5, queries=normal(3, 1, 6, 1, 4))
    kept = select(make_policy("tova"), view, 0, 0)
    assert kept[0, 0].sum() == 5 and torch.equal(kept[:, :1].expand_as(kept), kept)


def test_knorm_prefers_small_keys():
    view = ragged_view()
    expected = np.zeros((2, 2, 10))
    for b, h, i in np.ndindex(2, 2, 10):
        expected[b, h, i] = -math.sqrt(sum(float(x) ** 2 for x in view.keys[b, h, i]))
    assert equal_where_valid(make_policy("knorm").score(view), expected, view)


def test_keydiff_is_minus_the_cosine_to_the_mean_direction():
    view = ragged_view()
    expected = np.zeros((2, 2, 10))
    for b, h in np.ndindex(2, 2):
        slots = [i for i in range(10) if view.valid[b, h, i]]
        unit = {i: [float(x) / math.hypot(*view.keys[b, h, i].tolist()) for x in view.keys[b, h, i]] for i in slots}
        anchor = [sum(unit[i][j] for i in slots) / len(slots) for j in range(4)]
        for i in slots:
            dot = sum(u * a for u, a in zip(unit[i], anchor, strict=True))
            expected[b, h, i] = -dot / math.hypot(*anchor)
    assert equal_where_valid(make_policy("keydiff").score(view), expected, view)


def test_recency_keeps_the_newest():
    view = ragged_view()
    kept = select(make_policy("recency"), view, 0, 0)
    assert [view.positions[b, h][kept[b, h]].tolist() for b in range(2) for h in range(2)] == [
        [11, 12, 14, 15], [10, 11, 13, 15], [6, 7, 8], [3, 8],
    ]  # fmt: skip


def test_streaming_llm_keeps_four_sinks_and_the_newest():
    policy = make_policy("streaming_llm")
    view = CacheView.of(normal(1, 1, 1, 20, 4), normal(2, 1, 1, 20, 4), 10)
    kept = select(policy, view, *protection_for(policy, None, None))
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 14, 15, 16, 17, 18, 19]


def test_random_order_is_a_fixed_hash_of_layer_head_and_position():
    def mixed(position, head, layer, seed):  # the 32-bit mixer over Python's unbounded integers
        x = (position * 0x9E3779B1 + head * 0x85EBCA6B + layer * 0xC2B2AE35 + seed * 0x27D4EB2F) % 2**32
        for shift, factor in ((16, 0x7FEB352D), (15, 0x46A6B78B)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return (x ^ (x >> 16)) / 2**32

    view = replace(ragged_view(), layer=3)
    scores = make_policy("random", seed=5).score(view)
    expected = np.array([[[mixed(int(p), h, 3, 5) for p in view.positions[b, h]] for h in range(2)] for b in range(2)])
    assert equal_where_valid(scores, expected, view)


def test_random_order_is_uniform_and_differs_between_heads_layers_and_seeds():
    n = 4000
    view = CacheView.of(torch.zeros(1, 2, n, 1), torch.zeros(1, 2, n, 1))
    scores = make_policy("random").score(view)[0]
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    counts = torch.histc(scores.float(), 10, 0, 1)
    assert float((counts - n / 5).abs().max()) < 5 * math.sqrt(n / 5)
    others = [scores[1], make_policy("random").score(replace(view, layer=1))[0, 0]]
    others.append(make_policy("random", seed=1).score(view)[0, 0])
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((scores[0], other)))[0, 1])) < 0.1


def test_oracle_and_golden_read_the_future_as_defined():
    # one head, three slots, two blocks; last axis: maximum and mean over the group
    attention = torch.tensor([[[0.9, 0.2], [0.1, 0.1]], [[0.3, 0.3], [0.4, 0.3]], [[0.0, 0.0], [0.6, 0.5]]])
    future = Future(attention.reshape(1, 1, 3, 2, 2), torch.tensor([0.5, 0.5]))
    view = CacheView.of(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), future=future)
    assert make_policy("oracle").score(view).flatten().tolist() == pytest.approx([0.5, 0.35, 0.3])
    assert make_policy("oracle", reduction="mean").score(view).flatten().tolist() == pytest.approx([0.15, 0.3, 0.25])
    assert make_policy("golden").score(view).flatten().tolist() == pytest.approx([0.2, 0.3, 0.5])


@pytest.mark.parametrize("name", [name for name in NAMES if make_policy(name).needs_future])
def test_an_oracle_without_a_future_is_refused_in_one_sentence(name):
    with pytest.raises(UserError, match=f"policy '{name}' sees the future and none is recorded here"):
        make_policy(name).score(ragged_view())
