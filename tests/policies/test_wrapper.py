"""Policies over another policy: they pass on what it is and needs; `same_tokens` keeps one set of tokens."""

import math
from pathlib import Path

import pytest
import torch
from traced_models import tiny_model

from kv_gym import CacheView, EvictingCache, make_policy
from kv_gym.budgets import select
from kv_gym.errors import UserError
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.policies.wrapper import PolicyWrapper
from kv_gym.testing import check_policy

ROOT = Path(__file__).parents[2]
TRAINED = str(ROOT / "agents" / "trained" / "joint")
HEADS, N, D = 3, 24, 8
BASES = ["h2o", "keydiff", "knorm", "recency", "snapkv", "streaming_llm", "tova"]


def whole(seed=0, batch=2, **more):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 2 * torch.randn(*shape, generator=generator)  # noqa: E731
    queries = draw(batch, 2 * HEADS, N, D)
    state = {"mass": draw(batch, HEADS, N).abs()}
    return CacheView.of(draw(batch, HEADS, N, D), draw(batch, HEADS, N, D), 9, queries=queries, state=state, **more)


@pytest.mark.parametrize("base", BASES)
def test_all_heads_keep_the_same_tokens(base):
    policy = make_policy("same_tokens", over=base)
    for budget in (1, 5, 9, 20):
        view = whole().with_budget(torch.full((2, HEADS), budget))
        kept = select(policy, view, *policy.protection)
        assert (kept == kept[:, :1]).all() and (kept.sum(-1) == budget).all()


def test_rows_choose_for_themselves():
    kept = select(make_policy("same_tokens", over="keydiff"), whole(), 0, 0)
    assert not torch.equal(kept[0], kept[1])


def test_the_base_alone_keeps_others():
    kept = select(make_policy("keydiff"), whole(), 0, 0)
    assert not (kept == kept[:, :1]).all()


def test_scores_worked_out_slot_by_slot():
    """Heads hold other tokens, in another order, and another number of them."""
    policy, base = make_policy("same_tokens", over="knorm"), make_policy("knorm")
    positions = torch.tensor([[[0, 3, 4, 9], [9, 2, 3, -1], [5, -1, -1, -1]]])
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 3, 4, D, generator=generator)
    view = CacheView(keys, values, positions, positions >= 0, torch.tensor([12]), torch.full((1, 3), 2))
    alone, found = base.score(view)[0].tolist(), policy.score(view)[0]
    for head, row in enumerate(positions[0].tolist()):
        for slot, token in enumerate(row):
            if token < 0:
                continue
            held = [
                alone[h][s] for h, other in enumerate(positions[0].tolist()) for s, t in enumerate(other) if t == token
            ]
            assert float(found[head, slot]) == pytest.approx(math.log(sum(math.exp(x) for x in held) / 3), abs=1e-6)


def test_scores_far_apart_keep_their_order():
    """A base whose scores differ by thousands: no exponential may vanish."""
    n = 3000
    view = CacheView.of(torch.randn(1, 2, n, 2), torch.randn(1, 2, n, 2))
    scores = make_policy("same_tokens", over="recency").score(view)
    torch.testing.assert_close(scores, make_policy("recency").score(view).float())
    assert float(scores.amax() - scores.amin()) == n - 1


def test_it_needs_and_protects_what_its_base_does():
    over = make_policy("same_tokens", over=make_policy("snapkv", window=7))
    assert (over.needs_queries, over.protection, over.name) == (7, (0, 7), "same_tokens")
    watching = make_policy("same_tokens", over="h2o")
    assert watching.statistics == "h2o" and watching.protection == make_policy("h2o").protection
    view = whole()
    assert watching.initial_state(view)["mass"].shape == (2, HEADS, N)
    attention = torch.rand(2, 2 * HEADS, 4, N)
    state = watching.observe(view, attention, watching.initial_state(view))
    torch.testing.assert_close(state["mass"], attention.sum(2).unflatten(1, (HEADS, 2)).mean(2))
    assert make_policy("same_tokens", over="oracle").needs_future


def test_the_default_is_keydiff():
    assert make_policy("same_tokens") == make_policy("same_tokens", over="keydiff")


@pytest.mark.parametrize("base", BASES)
def test_keeps_the_contract_over_each_base(base):
    check_policy(make_policy("same_tokens", over=base))


def test_over_a_trained_policy():
    torch.manual_seed(0)
    fingerprint = Fingerprint("llama", "a" * 64, "{}", (0,), query_heads=2 * HEADS, kv_heads=HEADS, head_dim=D)
    base = Scorer(GroupedScorer(HEADS, D, 16), fingerprint, (8, 64), protect=(2, 1), calibrated=True)
    policy = make_policy("same_tokens", over=base)
    assert policy.comparable and policy.protection == (2, 1)
    kept = select(policy, whole(), *policy.protection)
    assert (kept == kept[:, :1]).all() and kept[..., :2].all()
    check_policy(policy, kv_heads=HEADS, query_heads=2 * HEADS, head_dim=D)


WRAPPERS = ["caote", "fast_caote", "critical_kv", "graph_kv", "same_tokens"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_over_a_trained_policy_it_belongs_to_the_same_model(name):
    base = make_policy(TRAINED)
    policy = make_policy(name, over=base)
    assert policy.fingerprint == base.fingerprint and policy.lengths == base.lengths
    assert policy.nbytes() == base.nbytes() > 0
    assert policy.training == base.training and policy.absolute == base.absolute


@pytest.mark.parametrize("name", WRAPPERS)
def test_over_a_heuristic_it_belongs_to_no_model(name):
    policy = make_policy(name)
    assert not any(hasattr(policy, attribute) for attribute in ("fingerprint", "lengths", "nbytes", "training"))
    with pytest.raises(AttributeError, match=f"'{type(policy).__name__}' object has no attribute 'weights'"):
        policy.weights  # noqa: B018


@pytest.mark.parametrize("name", ["caote", "graph_kv", "same_tokens"])
def test_another_model_is_refused_through_a_wrapper(name):
    with pytest.raises(UserError, match="was made for a model with"):
        EvictingCache(tiny_model("llama"), policy=make_policy(name, over=TRAINED))


def test_positions_are_those_of_the_base():
    assert make_policy("caote", over="streaming_llm_reindexed").positions == "cache"
    assert make_policy("caote", over="streaming_llm").positions == "original"


def test_the_old_name_of_the_base_class_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="Over is called PolicyWrapper now"):
        from kv_gym.policies.wrapper import Over
    assert Over is PolicyWrapper
