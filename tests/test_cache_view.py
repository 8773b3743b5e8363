"""What a policy sees: attention against loops, visibility, ages, the future."""

import numpy as np
import pytest
import torch
from slow_attention import slow_view_attention

from kv_gym import CacheView
from kv_gym.cache_view import Future, attention_weights, group_mean


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def ragged_view(m=5, scaling=None):
    """Two rows, two KV heads, six query heads; evicted tokens leave gaps, heads hold 7, 5, 4 and 1 slots of 7."""
    positions = torch.tensor(
        [
            [[0, 1, 2, 5, 8, 10, 11], [0, 3, 9, 10, 11, -1, -1]],
            [[2, 4, 5, 6, -1, -1, -1], [6, -1, -1, -1, -1, -1, -1]],
        ]
    )
    return CacheView(
        keys=normal(1, 2, 2, 7, 4),
        values=normal(2, 2, 2, 7, 4),
        positions=positions,
        valid=positions >= 0,
        seen=torch.tensor([12, 7]),
        budget=torch.tensor([[3, 3], [2, 2]]),
        scaling=scaling,
        queries=normal(3, 2, 6, m, 4),
    )


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_attention_equals_loops_with_grouped_heads_gaps_and_invalid_slots(window, scaling):
    view = ragged_view(scaling=scaling)
    np.testing.assert_allclose(view.attention(window).numpy(), slow_view_attention(view, window), atol=1e-6)


def test_attention_is_causal_inside_the_window():
    view = CacheView.of(normal(1, 1, 1, 6, 4), normal(2, 1, 1, 6, 4), queries=normal(3, 1, 1, 3, 4))
    seen = view.attention()[0, 0] > 0
    assert seen.tolist() == [
        [True, True, True, True, False, False],
        [True, True, True, True, True, False],
        [True, True, True, True, True, True],
    ]


def test_attention_of_hand_computed_numbers():
    # products 0, ln 2, ln 5 with scaling 1: weights 1/8, 2/8, 5/8
    keys = torch.log(torch.tensor([1.0, 2.0, 5.0])).reshape(1, 1, 3, 1)
    view = CacheView.of(keys, keys, queries=torch.ones(1, 1, 1, 1), scaling=1.0)
    assert view.attention().flatten().tolist() == pytest.approx([0.125, 0.25, 0.625])


def test_each_query_head_reads_its_own_kv_head():
    # KV head 0 prefers slot 0, KV head 1 prefers slot 1; query heads 0, 1 belong to the former, 2, 3 to the latter
    keys = torch.tensor([[[[9.0], [0.0]], [[0.0], [9.0]]]])
    view = CacheView.of(keys, keys, queries=torch.ones(1, 4, 1, 1), scaling=1.0)
    assert view.attention()[0, :, 0].argmax(-1).tolist() == [0, 0, 1, 1]


def test_attention_sums_to_one_or_to_nothing_for_a_query_that_sees_no_slot():
    view = ragged_view()
    sums = view.attention().sum(-1)
    assert sums[0].flatten().tolist() == pytest.approx([1.0] * 30)
    # row 1, second KV head holds only position 6: the queries at 2, 3, 4 and 5 see nothing
    assert sums[1, 3:].tolist() == pytest.approx(np.array([[0, 0, 0, 0, 1]] * 3))
    assert view.attention().isfinite().all()


def test_what_an_invalid_slot_holds_is_never_seen():
    view = ragged_view()
    expected = view.attention()
    view.keys[~view.valid] = float("nan")
    assert torch.equal(view.attention(), expected)


def test_fewer_queries_than_the_window_are_all_used():
    view = ragged_view(m=2)
    assert torch.equal(view.attention(9), view.attention(2)) and view.attention(9).shape == (2, 6, 2, 7)


def test_no_queries_is_an_error_that_names_the_remedy():
    view = CacheView.of(normal(1, 1, 1, 3, 4), normal(2, 1, 1, 3, 4))
    with pytest.raises(ValueError, match="needs_queries"):
        view.attention(1)


def test_half_precision_attention_is_float32():
    q, k = normal(1, 1, 2, 3, 4).bfloat16(), normal(2, 1, 1, 5, 4).bfloat16()
    positions = torch.arange(5).expand(1, 1, 5)
    valid = torch.ones(1, 1, 5, dtype=torch.bool)
    weights = attention_weights(q, k, torch.tensor([[2, 3, 4]]), positions, valid, None)
    assert weights.dtype == torch.float32 and weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * 6)


def test_age_counts_the_tokens_that_came_after():
    view = ragged_view()
    assert view.age[0, 0].tolist() == [11, 10, 9, 6, 3, 1, 0]
    assert view.age[1, 1, 0] == 0


def test_group_mean_averages_neighbouring_query_heads():
    attention = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(1, 4, 1)
    assert group_mean(attention, 2).flatten().tolist() == [2.0, 20.0]


def test_a_plain_cache_is_whole_and_has_one_budget():
    view = CacheView.of(normal(1, 2, 3, 4, 5), normal(2, 2, 3, 4, 5), budget=2, layer=7)
    assert view.positions[1, 2].tolist() == [0, 1, 2, 3] and bool(view.valid.all()) and view.seen.tolist() == [4, 4]
    assert view.budget.tolist() == [[2, 2, 2]] * 2 and view.layer == 7
    assert view.with_budget(torch.full((2, 3), 1)).budget.tolist() == [[1, 1, 1]] * 2


def test_expected_utility_weighs_blocks():
    # two slots, two blocks with weights 1/4 and 3/4; last axis: maximum, mean
    attention = torch.tensor([[[0.8, 0.4], [0.4, 0.2]], [[0.0, 0.0], [0.8, 0.8]]]).reshape(1, 1, 2, 2, 2)
    future = Future(attention, torch.tensor([0.25, 0.75]))
    assert future.expected("max").flatten().tolist() == pytest.approx([0.5, 0.6])
    assert future.expected("mean").flatten().tolist() == pytest.approx([0.25, 0.6])


def test_a_key_that_is_nan_is_not_hidden():
    view = ragged_view()
    keys = view.keys.clone()
    keys[0, 0, 2] = float("nan")
    attention = CacheView(**{**vars(view), "keys": keys}).attention()
    assert attention[0, :3, -1].isnan().any() and attention[1].isfinite().all()
    keys[0, 0, 2], keys[1, 1, 5] = 0.0, float("nan")  # of a slot that is not valid
    assert CacheView(**{**vars(view), "keys": keys}).attention().isfinite().all()
