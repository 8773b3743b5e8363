"""What every registered policy keeps to on awkward views; `kv_gym.testing.check_policy` has the common ones.

Here: every number of tokens from one up, query heads per KV head, a single head, 16-bit caches, equal and empty keys,
ties, a window that is larger than what was seen or that holds nothing, short rows beside long ones, and state through
evictions, beams, forks and resets.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from kv_gym import CacheView, list_policies, make_policy
from kv_gym.budgets import select
from kv_gym.cache_view import Future, attention_weights
from kv_gym.policies import Policy, StatefulPolicy
from kv_gym.policies.scoring.block_schedule import observe_blocks
from kv_gym.testing import check_policy

NAMES = [name for name in list_policies() if name != "scorer"]  # the learned one has a test file of its own
STATEFUL = [name for name in NAMES if make_policy(name).statistics]
HEADS, DIM, WIDTH, BLOCKS = 2, 8, 12, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Views:
    """Random views of what a policy needs; the same seed gives the same views."""

    def __init__(self, policy, group=2, dtype=torch.float32):
        self.policy, self.group, self.dtype = policy, group, dtype
        self.random = torch.Generator().manual_seed(0)

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.random).to(dtype)

    def at(self, positions, seen):
        """Slots of the tokens `positions [batch, heads, n]` (-1: padding) of rows that have seen `seen` tokens."""
        positions, seen = torch.as_tensor(positions), torch.as_tensor(seen)
        batch, _, n = positions.shape
        wanted = min(self.policy.needs_queries, int(seen.max()))
        future = None
        if self.policy.needs_future:
            attention = torch.rand(batch, HEADS, n, BLOCKS, 2, generator=self.random)
            future = Future(attention, torch.full((BLOCKS,), 1 / BLOCKS))
        return CacheView(
            keys=self.normal(batch, HEADS, n, DIM, dtype=self.dtype),
            values=self.normal(batch, HEADS, n, DIM, dtype=self.dtype),
            positions=positions,
            valid=positions >= 0,
            seen=seen,
            budget=torch.full((batch, HEADS), max(1, n // 2)),
            queries=self.normal(batch, HEADS * self.group, wanted, DIM, dtype=self.dtype) if wanted else None,
            hidden=self.normal(batch, n, WIDTH, dtype=self.dtype) if self.policy.needs_hidden else None,
            future=future,
            output=self.normal(HEADS * self.group, DIM, WIDTH, dtype=self.dtype) if self.policy.needs_output else None,
        )

    def whole(self, n, batch=2):
        return self.at(torch.arange(n).expand(batch, HEADS, n), [n] * batch)

    def past_queries(self, batch, q=6):
        """Queries that a policy with memory has been shown."""
        return self.normal(batch, HEADS * self.group, q, DIM, dtype=self.dtype)


def even(view, value):
    """The view with all keys, values, queries and hidden states the same."""
    names = [name for name in ("keys", "values", "queries", "hidden") if getattr(view, name) is not None]
    return replace(view, **{name: torch.full_like(getattr(view, name), value) for name in names})


def kind_of_view(kind, views):
    """A view of two rows."""
    if kind == "equal keys":
        return even(views.whole(9), 1.0)
    if kind == "empty keys":
        return even(views.whole(9), 0.0)
    if kind == "a row of two tokens beside nine":
        return views.at([[list(range(9))] * 2, [[0, 1] + [-1] * 7] * 2], [9, 2])
    if kind == "a head of one token":
        return views.at([[[3, 0, 7, 5, 20], [20, -1, -1, -1, -1]], [[1, 2, 3, 4, 29], [29, 0, -1, -1, -1]]], [21, 30])
    assert kind == "nothing recent"  # the newest tokens were evicted, as no policy here would, but a user's may
    return views.at([[[5, 3, 1, 0, 2], [8, 9, 7, 4, -1]], [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]], [200, 150])


KINDS = ("equal keys", "empty keys", "a row of two tokens beside nine", "a head of one token", "nothing recent")


def told(policy, view, queries, state, size=128):
    """The state after more queries, `size` at a time: those of the text, or of its repetition behind it."""
    if not policy.repetition:
        return observe_blocks(policy, view, queries, state, size)
    for block in queries.split(size, 2):
        asking = view.seen[:, None] + torch.arange(block.shape[2])
        paid = attention_weights(block, view.keys, asking, view.positions, view.valid, view.scaling)
        state = policy.observe_again(view, paid, state)
    return state


def scored(policy, view, past):
    """Scores after the queries `past`."""
    if isinstance(policy, StatefulPolicy):
        view = replace(view, state=told(policy, view, past, policy.initial_state(view)))
    return policy.score(view)


def changed(view, slots):
    """The view with `slots` applied to every tensor `[batch, heads, n, ...]`, and to hidden states."""
    names = ("keys", "values", "positions", "valid")
    future, hidden = view.future, view.hidden
    return replace(
        view,
        **{name: slots(getattr(view, name)) for name in names},
        future=None if future is None else replace(future, attention=slots(future.attention)),
        hidden=None if hidden is None else slots(hidden[:, None].expand(-1, HEADS, -1, -1))[:, 0],
    )


def rows_of(view, rows):
    """The rows `rows` of a view without state."""
    names = ("keys", "values", "positions", "valid", "seen", "budget", "queries", "hidden")
    future = view.future
    return replace(
        view,
        **{name: getattr(view, name)[rows] for name in names if getattr(view, name) is not None},
        future=None if future is None else replace(future, attention=future.attention[rows]),
    )


def padded(view, extra=3):
    noise = torch.Generator().manual_seed(9)

    def longer(tensor):
        shape = (*tensor.shape[:2], extra, *tensor.shape[3:])
        if tensor.dtype == torch.bool:
            return torch.cat((tensor, torch.zeros(shape, dtype=torch.bool)), 2)
        if not tensor.is_floating_point():
            return torch.cat((tensor, torch.full(shape, -1)), 2)
        return torch.cat((tensor, 50 * torch.randn(shape, generator=noise).to(tensor.dtype)), 2)

    return changed(view, longer)


def agree(first, second, valid):
    first, second = first[valid].double(), second[valid].double()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4 * float(second.abs().max()) + 1e-6)


def check(policy, view, past):
    """Everything that a view of any kind is asked: `past` are queries that a policy with memory was shown."""
    scores = scored(policy, view, past)
    assert scores.shape == view.positions.shape and scores.is_floating_point()
    assert scores[view.valid].isfinite().all()
    assert torch.equal(scored(policy, view, past)[view.valid], scores[view.valid])

    agree(scored(policy, padded(view), past)[..., : view.positions.shape[2]], scores, view.valid)

    n = view.positions.shape[2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    mixed = changed(view, lambda tensor: tensor[:, :, order])
    agree(scored(policy, mixed, past), scores[..., order], mixed.valid)

    for row in range(len(view.seen)):
        alone = rows_of(view, [row])
        wanted = policy.needs_queries and min(policy.needs_queries, int(alone.seen))
        if wanted:  # a row that is alone has no more queries than tokens
            alone = replace(alone, queries=alone.queries[:, :, -wanted:])
        agree(scored(policy, alone, past[[row]]), scores[[row]], alone.valid)


@dataclass(frozen=True)
class Careless(Policy):
    """Breaks one promise, on some views only."""

    fault: str = ""

    @property
    def needs_queries(self):
        return 4

    def score(self, view):
        sums, count = view.keys.float().sum(-1), view.valid.sum(-1, keepdim=True)
        if self.fault == "one token":
            return sums / (count - 1)
        if self.fault == "equal keys":
            mean = (sums * view.valid).sum(-1, keepdim=True) / count
            return (sums - mean) / ((sums - mean) * view.valid).norm(dim=-1, keepdim=True)
        if self.fault == "slots":
            return torch.arange(sums.shape[2]).expand(sums.shape).float()
        if self.fault == "short rows":
            return sums + view.queries.float().mean((1, 2, 3))[:, None, None]
        if self.fault == "padding":
            return sums - sums.amax(-1, keepdim=True)
        return sums


@pytest.mark.parametrize(
    ("fault", "found_by", "passed_by"),
    [
        ("one token", 1, 9),
        ("equal keys", "equal keys", 9),
        ("slots", 9, 1),
        ("short rows", "a row of two tokens beside nine", 9),
        ("padding", 9, None),
        ("none", None, "nothing recent"),
    ],
)
def test_the_checks_can_fail(fault, found_by, passed_by):
    views = Views(Careless(fault))

    def view(kind):
        return views.whole(kind) if isinstance(kind, int) else kind_of_view(kind, views)

    if passed_by is not None:
        check(views.policy, view(passed_by), views.past_queries(2))
    if found_by is not None:
        with pytest.raises(AssertionError):
            check(views.policy, view(found_by), views.past_queries(2))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_few_tokens_and_any_number_of_query_heads(name, group):
    policy = make_policy(name)
    for n in (1, 2, 9):
        views = Views(policy, group)
        check(policy, views.whole(n), views.past_queries(2))


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_tokens_from_one_up(name):
    policy = make_policy(name)
    for n in (*range(1, 20), 31, 32, 33, 65):  # across the windows, kernels and chunks that policies have
        views = Views(policy)
        view = views.whole(n)
        scores = scored(policy, view, views.past_queries(2, min(n, 6)))
        assert scores.shape == (2, HEADS, n) and scores.isfinite().all()


@pytest.mark.parametrize("query_heads", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_single_head(name, query_heads):
    check_policy(make_policy(name), kv_heads=1, query_heads=query_heads, tokens=12)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_newer_token_wherever_it_lies(name, value):
    policy = make_policy(name)
    views = Views(policy)
    view = even(views.at(torch.randperm(9, generator=views.random).expand(2, HEADS, 9), [9, 9]), value)
    past = views.past_queries(2)
    if isinstance(policy, StatefulPolicy):
        view = replace(view, state=told(policy, view, past, policy.initial_state(view)))
    scores, kept = policy.score(view), select(policy, view, 0, 0)
    assert torch.equal(kept.sum(-1), view.budget) and torch.equal(kept, select(policy, view, 0, 0))
    scores, age = scores[:, :, :, None], view.age[:, :, :, None]
    tied = (scores == scores.mT) & (age < age.mT)  # the first of a pair is the newer one
    assert tied.any() or name != "knorm"  # many have none here: a window's queries, or positions, tell tokens apart
    assert not (tied & kept[:, :, None] & ~kept[:, :, :, None]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_type_of_cache(name, dtype):
    policy = make_policy(name)
    views = Views(policy, dtype=dtype)
    check(policy, views.whole(9), views.past_queries(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_awkward_views(name, kind):
    policy = make_policy(name)
    views = Views(policy)
    check(policy, kind_of_view(kind, views), views.past_queries(2))


@pytest.mark.parametrize("name", STATEFUL)
def test_queries_in_blocks_or_one_by_one_give_one_state(name):
    policy = make_policy(name)
    views = Views(policy)
    view, queries = views.whole(40), views.past_queries(2, 40)
    at_once, slowly = (told(policy, view, queries, policy.initial_state(view), size) for size in (128, 1))
    assert at_once.keys() == slowly.keys() and at_once
    for state in at_once:
        torch.testing.assert_close(at_once[state], slowly[state])


@pytest.mark.parametrize("name", STATEFUL)
def test_state_survives_eviction_beams_and_forks(name):
    policy = make_policy(name, **{"lra": {"top": 2}, "lfa": {"top": 2}}.get(name, {}))  # 32 are all there are
    views = Views(policy)
    view, queries, later = views.whole(12), views.past_queries(2, 12), views.past_queries(2, 3)
    state = told(policy, view, queries, policy.initial_state(view))
    assert any(tensor.double().std() > 0 for tensor in state.values())
    before = {key: tensor.clone() for key, tensor in state.items()}
    kept = torch.tensor([[0, 3, 4, 9, 10, 11], [1, 2, 5, 6, 8, 11]])  # of each head

    def cut(tensor):
        index = kept.reshape(1, HEADS, 6, *[1] * (tensor.dim() - 3))
        return tensor.gather(2, index.expand(len(tensor), -1, -1, *tensor.shape[3:]))

    def on(view, state, later):
        """What follows an eviction: three more queries, whose own tokens were not kept."""
        left = replace(changed(view, cut), seen=view.seen + 3)
        state = told(policy, left, later, {key: cut(tensor) for key, tensor in state.items()})
        return policy.score(replace(left, state=state))

    beams = [1, 1, 0]
    together = on(rows_of(view, beams), {key: tensor[beams] for key, tensor in state.items()}, later[beams])
    for place, row in enumerate(beams):  # each row from its beginning, alone
        alone = rows_of(view, [row])
        own = told(policy, alone, queries[[row]], policy.initial_state(alone))
        scores = on(alone, own, later[[row]])
        agree(scores, together[[place]], torch.ones_like(scores, dtype=torch.bool))
    for key, tensor in state.items():  # a fork that shares the tensors saw nothing
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", NAMES)
def test_scores_that_compare_across_heads_are_the_same_for_the_same_head(name):
    policy = make_policy(name)
    if not policy.comparable or name == "random":  # whose point it is that heads differ
        return
    views = Views(policy)
    view, past = views.whole(9), views.past_queries(2)
    slots = {key: getattr(view, key) for key in ("keys", "values", "positions", "valid")}
    both = {key: tensor[:, :1].expand(-1, HEADS, *tensor.shape[2:]) for key, tensor in slots.items()}
    both["queries"] = None if view.queries is None else view.queries[:, :2].repeat(1, HEADS, 1, 1)
    both["output"] = None if view.output is None else view.output[:2].repeat(HEADS, 1, 1)
    if view.future is not None:
        both["future"] = replace(view.future, attention=view.future.attention[:, :1].expand(-1, HEADS, -1, -1, -1))
    scores = scored(policy, replace(view, **both), past[:, :2].repeat(1, HEADS, 1, 1))
    agree(scores[:, 0], scores[:, 1], view.valid[:, 0])
