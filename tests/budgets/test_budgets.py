"""Budgets, protection and the cut from scores to kept slots, against plain Python."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kv_gym import CacheView, Policy, make_policy
from kv_gym.budgets import (
    UNSEEN,
    Uniform,
    format_budget,
    keep_order,
    order,
    parse_budget,
    protection_for,
    select,
    select_context,
    slot_to_evict,
    slots_per_head,
    uniform,
)
from kv_gym.cache_view import protected_tokens
from kv_gym.errors import UserError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1", 1),
        ("64", 64),
        (64, 64),
        ("1.0", 1.0),
        (1.0, 1.0),
        ("0.25", 0.25),
        (".5", 0.5),
        ("1/8", 0.125),
        ("12%", 0.12),
        ("12.5%", 0.125),
        ("100%", 1.0),
        (" 8 ", 8),
        ("5e-2", 0.05),
    ],
)
def test_a_budget_is_an_int_of_slots_or_a_float_share(given, expected):
    budget = parse_budget(given)
    assert budget == expected and type(budget) is type(expected)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("0", "not above zero"),
        (0, "not above zero"),
        ("-3", "not above zero"),
        (-0.5, "not above zero"),
        ("0%", "not above zero"),
        ("1.5", "share above 1"),
        (1.0001, "share above 1"),
        ("101%", "share above 1"),
        ("3/2", "share above 1"),
        (float("inf"), "share above 1"),
        (float("nan"), "not above zero"),
        ("nan", "no number"),
        ("1/0", "no number"),
        ("half", "no number"),
        ("", "no number"),
        ("%", "no number"),
        (True, "no number"),
        (None, "no number"),
        ([8], "no number"),
    ],
)
def test_other_budgets_are_refused_with_what_was_expected(given, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse_budget(given)
    assert "expected slots per head" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("budget", "shown"),
    [(64, "64"), (0.125, "1/8"), (0.5, "1/2"), (1, "1"), (1.0, "1.0"), (0.3, "0.3"), (0.12, "0.12"), (1 / 90, "1/90")],
)
def test_tables_show_short_fractions(budget, shown):
    assert format_budget(budget) == shown
    assert parse_budget(shown) == budget and type(parse_budget(shown)) is type(budget)


@pytest.mark.parametrize(
    ("budget", "seen", "slots"),
    [
        (7, [100, 3], [7, 7]),
        (0.25, [100, 7, 3, 1], [25, 1, 1, 1]),
        (0.29, [100], [29]),  # 0.29 * 100 is 28.999999999999996 in floating point
        (1 / 3, [9, 10, 11, 12], [3, 3, 3, 4]),
        (1.0, [5, 1_000_003], [5, 1_000_003]),
        (0.001, [10], [1]),
    ],
)
def test_a_share_of_the_tokens_seen_is_rounded_down_to_at_least_one(budget, seen, slots):
    assert slots_per_head(budget, torch.tensor(seen)).tolist() == slots


def test_uniform_gives_every_head_of_a_row_the_same():
    assert uniform(0.5, torch.tensor([10, 4]), 3).tolist() == [[5, 5, 5], [2, 2, 2]]


def view_of(positions, seen, budget):
    """A view `[B, H, n]` of which only positions, lengths and budgets matter."""
    positions = torch.tensor(positions)
    nothing = torch.zeros(*positions.shape, 1)
    return CacheView(nothing, nothing, positions, positions >= 0, torch.tensor(seen), torch.tensor(budget))


@pytest.mark.parametrize(
    ("budget", "sinks", "recent", "kept"),
    [
        (8, 2, 2, {0, 1, 8, 9}),
        (6, 2, 2, {0, 1, 9}),  # half of 6 is 3: one recent token gives way
        (4, 2, 2, {0, 1}),  # half of 4: both recent tokens give way
        (2, 2, 2, {0}),
        (1, 2, 2, set()),
        (9, 0, 4, {6, 7, 8, 9}),
        (7, 0, 4, {7, 8, 9}),
        (10, 9, 9, {0, 1, 2, 3, 4}),
        (40, 3, 5, {0, 1, 2, 5, 6, 7, 8, 9}),
    ],
)
def test_protection_takes_at_most_half_a_budget_and_shrinks_from_the_recent_end(budget, sinks, recent, kept):
    view = view_of([[list(range(10))]], [10], [[budget]])
    assert set(view.protected(sinks, recent)[0, 0].nonzero().flatten().tolist()) == kept


def test_protection_follows_positions_not_slots():
    # position 0 is gone; 11 was the last token seen; slots lie in any order
    view = view_of([[[7, 11, 1, 3, 10, -1]]], [12], [[12]])
    assert view.protected(sinks=2, recent=2)[0, 0].tolist() == [False, True, True, False, True, False]


def test_the_caller_decides_protection_and_none_leaves_it_to_the_policy():
    policy = make_policy("streaming_llm")
    assert protection_for(policy, None, None) == (4, 0)
    assert protection_for(policy, 0, 16) == (0, 16)
    assert protection_for(make_policy("snapkv", window=8), None, None) == (0, 8)
    with pytest.raises(UserError, match="sinks and recent are -1 and 0"):
        protection_for(policy, -1, 0)


def test_ties_go_to_the_newer_token_and_invalid_slots_come_last():
    view = view_of([[[4, 9, 0, -1, 6, -1]]], [10], [[2]])
    scores = torch.tensor([[[1.0, 1.0, 1.0, 99.0, 2.0, float("nan")]]])
    assert keep_order(scores, view)[0, 0, :4].tolist() == [4, 1, 0, 2]


def test_nan_scores_of_valid_slots_are_refused():
    view = view_of([[[0, 1]]], [2], [[1]])
    with pytest.raises(UserError, match="scored NaN in layer 0"):
        keep_order(torch.tensor([[[0.0, float("nan")]]]), view)


def test_on_an_accelerator_nan_goes_first_and_protected_slots_stay(monkeypatch):
    monkeypatch.setattr(order, "_may_wait_for", lambda scores: False)
    scores, positions = torch.tensor([[[5.0, 4.0, float("nan"), 1.0, 3.0]]]), torch.arange(5)[None, None]
    assert slot_to_evict(scores, positions, 1, UNSEEN).item() == 2
    view = view_of(positions.tolist(), [5], [[4]])
    assert keep_order(scores, view, view.positions == 2)[0, 0].tolist() == [2, 0, 1, 4, 3]
    assert keep_order(scores, view)[0, 0].tolist() == [0, 1, 4, 3, 2]


@dataclass(frozen=True)
class Given(Policy):
    """Scores that the test wrote down."""

    scores: tuple = ()

    def score(self, view):
        return torch.tensor(self.scores)


def slow_select(scores, positions, seen, budget, sinks, recent):
    """Kept slots of one head, from the definitions in the design, over Python lists."""
    room = budget // 2
    sinks = min(sinks, room)
    recent = min(recent, room - sinks)
    valid = [i for i in range(len(positions)) if positions[i] >= 0]
    safe = {i for i in valid if positions[i] < sinks or positions[i] >= seen - recent}
    ranking = sorted(valid, key=lambda i: (i in safe, scores[i], positions[i]), reverse=True)
    return [i in ranking[:budget] for i in range(len(positions))]


@pytest.mark.parametrize("seed", range(60))
def test_select_equals_plain_python_on_random_cases(seed):
    rng = random.Random(seed)
    n, heads, batch = rng.randint(1, 14), rng.randint(1, 3), rng.randint(1, 3)
    seen = [rng.randint(n, 2 * n) for _ in range(batch)]
    sinks, recent = rng.randint(0, 4), rng.randint(0, 6)
    positions, scores, budgets = [], [], []
    for b in range(batch):
        positions.append([])
        for _ in range(heads):
            there = rng.sample(range(seen[b]), rng.randint(0, n))  # in any order
            positions[-1].append(there + [-1] * (n - len(there)))
        # whole numbers, so that many slots tie; infinities too
        scores.append([[rng.choice([-2.0, 0.0, 1.0, 5.0, float("-inf")]) for _ in range(n)] for _ in range(heads)])
        budgets.append([rng.randint(1, n + 2) for _ in range(heads)])
    view = view_of(positions, seen, budgets)
    kept = select(Given(tuple(scores)), view, sinks, recent)
    for b in range(batch):
        for h in range(heads):
            expected = slow_select(scores[b][h], positions[b][h], seen[b], budgets[b][h], sinks, recent)
            assert kept[b, h].tolist() == expected


def test_a_budget_at_or_above_the_length_evicts_nothing():
    view = view_of([[[0, 1, 2, -1]]], [3], [[3]])
    policy = Given(scores=(((0.0, -5.0, 2.0, 9.0),),))
    assert select(policy, view, 0, 0)[0, 0].tolist() == [True, True, True, False]
    assert select(policy, view.with_budget(torch.tensor([[50]])), 0, 0)[0, 0].tolist() == [True, True, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_the_slot_to_evict_is_the_one_of_lowest_priority(seed):
    rng = random.Random(seed)
    n, seen = 9, 14
    positions = [[rng.sample(range(seen), n) for _ in range(2)]]
    scores = torch.tensor([[[rng.choice([-2.0, 0.0, -0.0, 5.0]) for _ in range(n)] for _ in range(2)]])
    view = view_of(positions, [seen], [[n - 1, n - 1]])
    sinks, recent = rng.randint(0, 2), rng.randint(0, 2)
    first, last = sinks, seen - recent if recent else UNSEEN
    victims = slot_to_evict(scores, view.positions, first, last)[..., 0]
    for head in range(2):
        safe = [p < sinks or p >= seen - recent for p in positions[0][head]]
        ranking = sorted(range(n), key=lambda i: (safe[i], float(scores[0, head, i]), positions[0][head][i]))
        assert int(victims[0, head]) == ranking[0]
    with pytest.raises(UserError, match="scored NaN in layer 3"):
        slot_to_evict(scores.index_fill(-1, torch.tensor([4]), float("nan")), view.positions, 0, UNSEEN, layer=3)


@pytest.mark.parametrize("given", ["1e400", "1e99999999", "9" * 400, "9" * 9999, 10**12])
def test_a_budget_beyond_all_measure_is_refused_at_once(given):
    with pytest.raises(UserError, match=r"no number|share above 1|more than 2,147,483,647 slots") as error:
        parse_budget(given)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("given", [np.int64(8), np.int32(8), torch.tensor(8)])
def test_integers_of_other_libraries_are_slots(given):
    assert parse_budget(given) == 8 and type(parse_budget(given)) is int


@pytest.mark.parametrize("given", [np.float32(0.5), np.float64(0.5)])
def test_floats_of_other_libraries_are_shares(given):
    assert parse_budget(given) == 0.5 and type(parse_budget(given)) is float


def test_protection_counts_whole_tokens():
    with pytest.raises(UserError, match=r"sinks and recent are 1\.5 and 0; expected whole numbers from 0"):
        protection_for(make_policy("knorm"), 1.5, None)
    assert protection_for(make_policy("knorm"), np.int64(2), None) == (2, 0)


@pytest.mark.parametrize(
    ("budget", "sinks", "recent", "kept"), [(8, 2, 3, (2, 2)), (3, 4, 4, (1, 0)), (40, 2, 3, (2, 3))]
)
def test_protection_of_numbers_and_of_tensors_is_the_same(budget, sinks, recent, kept):
    assert protected_tokens(budget, sinks, recent) == kept
    assert tuple(map(int, protected_tokens(torch.tensor(budget), sinks, recent))) == kept


def test_a_context_cut_to_a_budget_keeps_this_utility():
    """One layer, one head, four tokens; the policy keeps positions 3 and 0."""
    view = view_of([[[0, 1, 2, 3]]], [4], [[1]])
    policy = Given(scores=(((3.0, 1.0, 2.0, 9.0),),))
    utility = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]])
    selection = select_context(policy, Uniform(), [view], 0.5, utility)
    assert selection.kept.tolist() == [[[True, False, False, True]]]
    assert selection.kept_utility.tolist() == [[0.625]] and selection.total_utility.tolist() == [[1.0]]
    assert selection.utility_kept == 0.625
    assert select_context(policy, Uniform(), [view], 1, utility).utility_kept == 0.125
    # half a budget of two is one: the newest token is protected, and takes the place of a better one
    scores = [torch.tensor([[[3.0, 1.0, 2.0, 0.0]]])]
    assert select_context(policy, Uniform(), [view], 2, utility, recent=1, scores=scores).utility_kept == 0.625
    assert select_context(policy, Uniform(), [view], 2, 0 * utility).utility_kept == 0.0
