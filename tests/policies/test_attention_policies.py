"""Policies that read attention, on examples small enough to work out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from slow_attention import slow_view_attention
from traced_models import some_prompt, tiny_model

from kv_gym import CacheView, make_policy
from kv_gym.errors import UserError
from kv_gym.evaluation.measure import replay
from kv_gym.policies.scoring.block_schedule import observe_blocks
from kv_gym.policies.scoring.neighbours import mean_over_heads, rank, smooth
from kv_gym.traces import open_traces, record


def paying(*heads, group=1):
    """A view whose last queries pay what `heads` says, given per query head as rows of weights that sum to 1.

    Keys are the unit vectors and queries the logarithms of the weights, so the softmax of the products is the weights.
    Rows may stop at the query's own token.
    """
    n = len(heads[0][-1])
    wide = [[row + [0.0] * (n - len(row)) for row in rows] for rows in heads]
    queries = torch.tensor(wide).clamp(min=1e-30).log()[None]
    keys = torch.eye(n).expand(1, len(heads) // group, n, n)
    return CacheView.of(keys, torch.zeros_like(keys), queries=queries, scaling=1.0)


def observed(policy, rows, positions=None, pieces=(None,), seen=None):
    """The view of one head after queries that paid `rows`, shown in the given pieces."""
    n = len(rows[-1])
    paid = torch.tensor([row + [0.0] * (n - len(row)) for row in rows])[None, None]
    view = CacheView.of(torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2))
    if positions is not None:
        view = replace(view, positions=torch.tensor([[positions]]), seen=torch.tensor([seen]))
    last = int(view.seen)
    state, done = policy.initial_state(view), 0
    for piece in pieces:
        block = paid[:, :, done : done + (piece or len(rows))]
        done += block.shape[2]
        state = policy.observe(replace(view, seen=torch.tensor([last - len(rows) + done])), block, state)
    assert done == len(rows)
    return replace(view, state=state)


def order(scores, view, head=0):
    """Positions from the first to keep to the first to go; ties to the newer."""
    both = zip(scores[0, head].tolist(), view.positions[0, head].tolist(), strict=True)
    return [position for _, position in sorted(both, reverse=True)]


def kept_first(policy, view):
    return order(policy.score(view), view)


# -- accumulated attention ---------------------------------------------------------------------------------------

CAUSAL = [[1.0], [0.5, 0.5], [0.25, 0.25, 0.5], [0.1, 0.1, 0.3, 0.5]]


@pytest.mark.parametrize("name", ["h2o", "d2o"])
def test_h2o_divides_by_the_queries_that_could_see_the_token(name):
    total, mean = make_policy(name), make_policy(name, reduce="mean")
    view = observed(total, CAUSAL, pieces=(3, 1))
    # columns: 1 + .5 + .25 + .1, .5 + .25 + .1, .5 + .3, .5
    assert total.score(view).flatten().tolist() == pytest.approx([1.85, 0.85, 0.8, 0.5])
    assert kept_first(total, view) == [0, 1, 2, 3]
    # four, three, two queries and one
    assert mean.score(view).flatten().tolist() == pytest.approx([1.85 / 4, 0.85 / 3, 0.8 / 2, 0.5])
    assert kept_first(mean, view) == [3, 0, 2, 1]


def test_h2o_and_d2o_share_their_statistics_and_differ_in_protection():
    h2o, d2o = make_policy("h2o"), make_policy("d2o")
    assert h2o.statistics == d2o.statistics == "h2o"
    assert (h2o.protection, d2o.protection) == ((0, 32), (4, 32))


def test_roco_lets_only_stable_tokens_go():
    # token: attention from its own query on   mean   deviation
    #   0    .2 .2 .2 .2                       .2     0
    #   1       .3 .3 .3                       .3     0
    #   2          .0 .2                       .1     .1  the lowest mean, but not stable
    #   3             .4                       .4     0
    rows = [[0.2], [0.2, 0.3], [0.2, 0.3, 0.0], [0.2, 0.3, 0.2, 0.4]]
    half, none = make_policy("roco", unstable=0.5), make_policy("roco", unstable=0.0)
    view = observed(half, rows, pieces=(2, 2)).with_budget(torch.tensor([[2]]))
    assert half.score(view).flatten().tolist() == pytest.approx([0.2, 0.3, 1.1, 0.4])  # one of a budget of 2 is spared
    assert kept_first(half, view) == [2, 3, 1, 0]
    assert kept_first(none, view) == [3, 1, 0, 2]
    assert kept_first(half, view.with_budget(torch.tensor([[1]]))) == [3, 1, 0, 2]  # half of 1 is none


# -- when a token was used ---------------------------------------------------------------------------------------


def test_lazy_eviction_keeps_who_comes_back_until_overdue():
    # queries 0 to 7 on the tokens 0 to 3; a hit is .5
    #        hits         last  longest gap  since
    # token 0: 0 3 6         6            3      1
    # token 1: 1 2           2            1      5
    # token 2: 2             2            0      5
    # token 3: 3 7           7            4      0
    hits = {(0, 0), (3, 0), (6, 0), (1, 1), (2, 1), (2, 2), (3, 3), (7, 3)}
    rows = [[0.5 if (query, token) in hits else 0.1 for token in range(4)] for query in range(8)]
    policy = make_policy("lazy_eviction", threshold=0.5, window=0)
    views = [observed(policy, rows, range(4), pieces, seen=8) for pieces in ((8,), (1,) * 8, (3, 5))]
    for view in views:
        assert view.state["last"].flatten().tolist() == [6, 2, 2, 7]
        assert view.state["gap"].flatten().tolist() == [3, 1, 0, 4]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [
        2 * sigmoid(-(1 + 1 / 3)) + 2 * sigmoid(1 - 3),  # .417 + .238
        2 * sigmoid(-(1 + 5 / 1)) + 2 * sigmoid(1 - 1),  # .005 + 1
        0.0,  # never came back
        2 * sigmoid(-(1 + 0 / 4)) + 2 * sigmoid(1 - 4),  # .538 + .095
    ]
    assert policy.score(view).flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert kept_first(policy, view) == [1, 0, 3, 2]
    # without the gap's own term: 2 s(-1/3) = .835, 2 s(-5) = .013, 0, 2 s(0) = 1
    plain = make_policy("lazy_eviction", threshold=0.5, offset=0.0, gap_weight=0.0)
    assert plain.score(view).flatten().tolist() == pytest.approx([0.8348, 0.0134, 0, 1], abs=1e-4)
    assert kept_first(plain, view) == [3, 0, 1, 2]


USES = [[1.0], [0.9, 0.1], [0.1, 0.5, 0.4], [0.3, 0.2, 0.1, 0.4]]


def test_lru_and_lfu_count_an_even_share_as_a_use():
    # even shares 1, 1/2, 1/3, 1/4: query 0 uses 0; query 1 uses 0; query 2 uses 1 and 2; query 3 uses 0 and 3
    lru, lfu = make_policy("lru"), make_policy("lfu")
    view = observed(lru, USES, pieces=(1, 3))
    assert lru.score(view).flatten().tolist() == [3, 2, 2, 3]
    assert kept_first(lru, view) == [3, 0, 2, 1]
    view = observed(lfu, USES, pieces=(1, 3))
    assert view.state["uses"].flatten().tolist() == [3, 1, 1, 1]
    assert kept_first(lfu, view) == [0, 3, 2, 1]  # 3 was used after 1 and 2


def test_a_larger_share_makes_a_use_rarer():
    # twice the even share, 2, 1, 2/3 and 1/2, is reached by nobody: tokens stay at their own positions, uses at none
    assert make_policy("lru").score(observed(make_policy("lru", share=2), USES)).flatten().tolist() == [0, 1, 2, 3]
    assert observed(make_policy("lfu", share=2), USES).state["uses"].sum() == 0


def test_lra_and_lfa_count_the_top_of_a_query():
    # the largest weight: queries 0 and 1 hit 0, query 2 hits 1, query 3 hits 3; nobody hits 2
    lra, lfa = make_policy("lra", top=1), make_policy("lfa", top=1)
    view = observed(lra, USES, pieces=(2, 2))
    assert lra.score(view).flatten().tolist() == [1, 2, 2, 3]  # token 2 is as old as it came
    assert kept_first(lra, view) == [3, 2, 1, 0]
    view = observed(lfa, USES, pieces=(2, 2))
    assert lfa.score(view).flatten().tolist() == pytest.approx([2 / 4, 1 / 3, 0 / 2, 1 / 1])
    assert kept_first(lfa, view) == [3, 0, 1, 2]


def test_equal_weights_are_all_among_the_top():
    view = observed(make_policy("lfa", top=2), [[0.5], [0.25, 0.25, 0.25, 0.25]], range(4), seen=4)
    assert view.state["hits"].flatten().tolist() == [2, 1, 1, 1]


def test_one_query_head_is_enough_for_a_hit():
    paid = torch.tensor([[[[0.8, 0.2]], [[0.1, 0.9]]]])  # two query heads, one query
    view = CacheView.of(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    for policy in (make_policy("lfa", top=1), make_policy("lfu"), make_policy("lazy_eviction", threshold=0.8)):
        state = policy.observe(view, paid, policy.initial_state(view))
        assert state.get("hits", state.get("uses", state.get("last"))).flatten().tolist() == [1, 1]


# -- the last queries --------------------------------------------------------------------------------------------


def test_sage_kv_takes_the_largest_attention_of_a_query_head():
    view = paying([[0.4, 0.5, 0.05, 0.05]], [[0.4, 0.1, 0.3, 0.2]], group=2)
    most, mean = make_policy("sage_kv"), make_policy("sage_kv", reduce="mean")
    assert most.score(view).flatten().tolist() == pytest.approx([0.4, 0.5, 0.3, 0.2])
    assert kept_first(most, view) == [1, 0, 2, 3]
    assert mean.score(view).flatten().tolist() == pytest.approx([0.4, 0.3, 0.175, 0.125])
    assert kept_first(mean, view) == [0, 1, 2, 3]
    assert most.protection == (4, 32)


def test_cake_adds_the_variance_over_the_window():
    # two queries, of tokens 4 and 5; the older tokens:
    # token  paid        mean   variance (n - 1 = 1)   mean + 200 variance
    #   0    .2  .2      .2     0                      .2
    #   1    .3  .1      .2     .1² + .1² = .02        4.2
    #   2    .1  .1      .1     0                      .1
    #   3    .1  .35     .225   2 · .125² = .03125     6.475
    view = paying([[0.2, 0.3, 0.1, 0.1, 0.3], [0.2, 0.1, 0.1, 0.35, 0.15, 0.1]])
    plain, still = make_policy("cake", window=2, kernel=1), make_policy("cake", window=2, kernel=1, gamma=0)
    assert plain.score(view)[0, 0, :4].tolist() == pytest.approx([0.2, 4.2, 0.1, 6.475], abs=1e-4)
    assert [token for token in kept_first(plain, view) if token < 4] == [3, 1, 0, 2]
    assert still.score(view)[0, 0, :4].tolist() == pytest.approx([0.2, 0.2, 0.1, 0.225], abs=1e-6)
    # over three neighbours, with nothing beyond the first token and the window: 4.4, 4.5, 10.775 and 6.575 thirds
    pooled = make_policy("cake", window=2, kernel=3)
    assert pooled.score(view)[0, 0, :4].tolist() == pytest.approx([4.4 / 3, 1.5, 10.775 / 3, 6.575 / 3], abs=1e-4)
    assert [token for token in kept_first(pooled, view) if token < 4] == [2, 3, 1, 0]
    assert pooled.protection == (0, 2)


def test_snapkv_pools_and_reduces_as_others_have_run_it():
    # one query of token 4, two query heads
    view = paying([[0.4, 0.1, 0.1, 0.2, 0.2]], [[0.1, 0.1, 0.5, 0.1, 0.2]], group=2)
    settings = {"window": 1, "kernel": 3}
    # means of the heads .25 .1 .3 .15, then thirds of the sums of neighbours
    usual = make_policy("snapkv", **settings)
    assert usual.score(view)[0, 0, :4].tolist() == pytest.approx([0.35 / 3, 0.65 / 3, 0.55 / 3, 0.45 / 3])
    # largest of the neighbours: .4 .4 .2 .2 and .1 .5 .5 .5
    largest = make_policy("snapkv", pooling="max", **settings)
    assert largest.score(view)[0, 0, :4].tolist() == pytest.approx([0.25, 0.45, 0.35, 0.35])
    assert [token for token in kept_first(largest, view) if token < 4] == [1, 3, 2, 0]
    both = make_policy("snapkv", pooling="max", reduce="max", **settings)
    assert both.score(view)[0, 0, :4].tolist() == pytest.approx([0.4, 0.5, 0.5, 0.5])


def test_mpcache_asks_the_last_share_of_queries_in_the_mean_over_heads():
    first = [[1.0], [0.9, 0.1], [0.7, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]]
    second = [[1.0], [0.9, 0.1], [0.1, 0.2, 0.7], [0.1, 0.4, 0.2, 0.3]]
    view = paying(first, second)
    # the last two queries, means over the heads: .4 .2 .4 and .1 .5 .2 .2
    half = make_policy("mpcache", share=0.5)
    scores = half.score(view)
    assert scores[0, 0].tolist() == pytest.approx([0.4, 0.5, 0.4, 0.2])
    assert torch.equal(scores[0, 0], scores[0, 1])
    assert order(scores, view, 0) == order(scores, view, 1)
    assert make_policy("mpcache", share=1.0).score(view)[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.4, 0.2])
    assert make_policy("mpcache").score(view)[0, 0].tolist() == pytest.approx([0.1, 0.5, 0.2, 0.2])  # one: ceil(.8)
    assert make_policy("mpcache", share=0.6).score(view)[0, 0].tolist() == pytest.approx([0.9, 0.5, 0.4, 0.2])  # three


def test_r_kv_charges_all_but_the_newest_of_alike_keys():
    keys = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0], [0, 1]])[None, None]
    # products with the two query heads: keys 0, 1, 3 get ln 2 · 1, 2, 3 from one and 0 from the other; keys 2 and 4
    # get 0 and ln 3; the larger ones as weights: 2, 4, 3, 8 of 17 for the older, 1 for the window, key 4
    queries = torch.tensor([[math.log(2), 0.0], [0.0, math.log(3)]])[None, :, None]
    view = CacheView.of(keys, keys, queries=queries, scaling=1.0)
    # cosine 1 among 0, 1, 3 and between 2 and 4. Key 0 charges 1 and not 3; key 1 charges 0 and not 3; key 3 charges 0
    # and not 1; 2 and 4 excuse one another. Sums over all five keys: 2 1 0 0 0, means .4 .2 0 0 0
    exponentials = [math.exp(0.4), math.exp(0.2), 1, 1, 1]
    redundancy = [e / sum(exponentials) for e in exponentials]
    importance = [2 / 17, 4 / 17, 3 / 17, 8 / 17, 1]
    policy = make_policy("r_kv", window=1, kernel=1)
    expected = [0.1 * i - 0.9 * r for i, r in zip(importance, redundancy, strict=True)]
    assert policy.score(view).flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert kept_first(policy, view) == [4, 3, 2, 1, 0]
    # over three neighbours the older weights are 4, 4, 8, 8 of 17: the window is pooled apart
    wide = make_policy("r_kv", window=1, kernel=3, importance=1.0).score(view)
    assert wide.flatten().tolist() == pytest.approx([4 / 17, 4 / 17, 8 / 17, 8 / 17, 1], abs=1e-6)


def test_r_kv_takes_an_empty_key_for_no_repetition():
    keys = torch.tensor([[1.0, 0], [0, 1], [0, 0]])[None, None]  # all cosines are 0, and nothing is like itself
    view = CacheView.of(keys, keys, queries=torch.zeros(1, 1, 1, 2))
    assert make_policy("r_kv", importance=0.0).score(view).flatten().tolist() == pytest.approx([-1 / 3] * 3)


def slow_redundancy(keys, threshold=0.5):
    """From the n x n matrix of cosines of one head `[n, d]`, in the order of the text."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 0)
    for row in cosines:
        alike = np.flatnonzero(row > threshold)
        if len(alike):
            row[alike[-1]] = 0
    mean = np.exp(cosines.mean(0))
    return mean / mean.sum()


def test_r_kv_in_chunks_equals_the_whole_matrix():
    n = 300  # more than two chunks
    keys = torch.randn(1, 2, n, 3, generator=torch.Generator().manual_seed(0))
    view = CacheView.of(keys, keys, queries=torch.randn(1, 2, 8, 3))
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    mixed = replace(view, keys=keys[:, :, shuffled], positions=view.positions[:, :, shuffled])
    policy = make_policy("r_kv", importance=0.0)
    expected = -np.stack([slow_redundancy(keys[0, head].double().numpy()) for head in range(2)])
    np.testing.assert_allclose(policy.score(view)[0].numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(policy.score(mixed)[0].numpy(), expected[:, shuffled], rtol=1e-4)


# -- rows, heads and blocks --------------------------------------------------------------------------------------


def ragged_view(m):
    """Two rows, two KV heads, four query heads; heads hold different tokens, slots in no order, some invalid."""
    positions = torch.tensor(
        [
            [[15, 0, 1, 5, 8, 2, 11, 12, 14, 10], [0, 3, 9, 4, 10, 13, 11, 15, -1, -1]],
            [[8, 2, 4, 5, 7, 6, -1, -1, -1, -1], [3, 0, 1, 8, -1, -1, -1, -1, -1, -1]],
        ]
    )
    random = torch.Generator().manual_seed(3)
    keys = torch.randn(2, 2, 10, 4, generator=random)
    return CacheView(
        keys=keys,
        values=keys,
        positions=positions,
        valid=positions >= 0,
        seen=torch.tensor([16, 9]),
        budget=torch.full((2, 2), 4),
        queries=torch.randn(2, 4, m, 4, generator=random),
    )


@pytest.mark.parametrize("window", [3, 12])  # the second row has seen nine tokens
def test_cake_on_ragged_rows(window):
    view = ragged_view(window)
    attention = slow_view_attention(view, window)
    scores = make_policy("cake", window=window, kernel=3).score(view)
    for b, h in np.ndindex(2, 2):
        real = attention[b, 2 * h : 2 * h + 2, max(0, window - int(view.seen[b])) :]
        raw = (real.mean(1) + 200 * real.var(1, ddof=1)).mean(0)
        slots = sorted((i for i in range(10) if view.valid[b, h, i]), key=lambda i: view.positions[b, h, i])
        recent = [int(view.positions[b, h, i]) >= int(view.seen[b]) - window for i in slots]
        for place, slot in enumerate(slots):
            near = range(max(0, place - 1), min(len(slots), place + 2))
            expected = sum(raw[slots[j]] for j in near if recent[j] == recent[place]) / 3
            assert float(scores[b, h, slot]) == pytest.approx(expected, rel=1e-4)


def test_ranks_go_by_value_then_by_position_and_leave_padding_last():
    view = ragged_view(1)
    values = torch.tensor([1.0, 3, 3, 0, 2, 3, 1, 1, 0, 9])  # slots 8 and 9 of the second head are padding
    ranks = rank(values.expand(2, 2, 10), view)
    # 3 at positions 13, 9 and 3, then 2, then 1 at 15, 11 and 0, then 0
    assert ranks[0, 1, :8].tolist() == [6, 2, 1, 7, 3, 0, 5, 4]


def test_smoothing_leaves_out_padding_and_the_other_side_of_the_window():
    view = ragged_view(1)
    received = torch.arange(1.0, 11).expand(2, 2, 10)
    # row 1, head 0 in text order: positions 2 4 5 6 7 8 at slots 1 2 3 5 4 0 hold 2 3 4 6 5 1; the window is 7 and 8
    average = smooth(received, view, 2, 3)[1, 0, :6] * 3
    assert average.tolist() == pytest.approx([5 + 1, 2 + 3, 2 + 3 + 4, 3 + 4 + 6, 5 + 1, 4 + 6])
    largest = smooth(received, view, 2, 3, "max")[1, 0, :6]
    assert largest.tolist() == [5, 3, 4, 6, 5, 6]


def test_a_token_missing_from_a_head_receives_nothing_there():
    view = ragged_view(1)
    received = torch.arange(1.0, 41).reshape(2, 2, 1, 10) * view.valid[:, :, None]
    mean = mean_over_heads(received, view)[:, :, 0]
    # row 0: position 15 is slot 0 of head 0 (1) and slot 7 of head 1 (18); position 14 is slot 8 of head 0 (9) alone;
    # row 1: position 8 is slot 0 of head 0 (21) and slot 3 of head 1 (34)
    assert [float(mean[0, 0, 0]), float(mean[0, 1, 7])] == [9.5, 9.5]
    assert [float(mean[0, 0, 8]), float(mean[1, 0, 0]), float(mean[1, 1, 3])] == [4.5, 27.5, 27.5]


@pytest.mark.parametrize("name", ["h2o", "roco", "lazy_eviction", "lra", "lfa", "lru", "lfu"])
def test_queries_shown_at_once_or_one_by_one_give_one_state(name):
    policy = make_policy(
        name, **{"lra": {"top": 3}, "lfa": {"top": 3}, "lazy_eviction": {"threshold": 0.1}}.get(name, {})
    )
    random = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 2, 20, 4, generator=random), torch.randn(2, 4, 20, 4, generator=random)
    view = CacheView.of(keys, keys)
    at_once, slowly = (observe_blocks(policy, view, queries, policy.initial_state(view), size) for size in (128, 1))
    for state in at_once:
        torch.testing.assert_close(at_once[state], slowly[state])


def test_statistics_taken_with_other_settings_are_not_the_policys_own(tmp_path):
    usual, narrow = make_policy("lra"), make_policy("lra", top=3)
    assert (usual.statistics, narrow.statistics) == ("lra", "lra(top=3)")
    # what only the score reads makes no difference
    assert make_policy("lazy_eviction", window=3, offset=0.0).statistics == "lazy_eviction"
    assert make_policy("lazy_eviction", threshold=0.1).statistics == "lazy_eviction(threshold=0.1)"
    assert make_policy("h2o", reduce="mean").statistics == "h2o"
    assert make_policy("snapkv", window=3).statistics == ""

    record(tiny_model(), [some_prompt()], tmp_path / "traces", stats=["h2o", narrow, usual], progress=False)
    (sequence,) = open_traces(tmp_path / "traces")
    assert list(sequence.stats) == ["h2o", "lra", "lra(top=3)"]
    assert (sequence.stats["lra"]["last"] != sequence.stats["lra(top=3)"]["last"]).any()
    kept = {policy.top: replay({"lra": policy}, [sequence], [0.25])[0]["utility_kept"] for policy in (usual, narrow)}
    assert kept[3] != kept[32]
    with pytest.raises(UserError, match=r"no statistics of policy 'lra\(top=4\)'"):
        replay({"lra": make_policy("lra", top=4)}, [sequence], [0.25])
