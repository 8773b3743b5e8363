"""The token view's ranks: cut by hand they keep what the live cache keeps, at every budget."""

import base64

import numpy as np
import pytest
from live_models import feed, tiny, tokens

from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.evaluation.report.token_view import answer_places, token_texts, token_view
from kv_gym.evaluation.tasks import TaskContext, TaskQuestion

LENGTH = 37
POLICIES = ("keydiff", "streaming_llm", "h2o", "snapkv", "random")


def decode(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def view(model):
    ids = tokens(1, LENGTH)[0].tolist()
    question = TaskQuestion((1, 2), tuple(ids[20:22]))
    chosen = {name: make_policy(name) for name in POLICIES}
    return token_view(model, TaskContext(tuple(ids), (question,)), chosen, decode)


def ranks(view, policy, key):
    data = next(one for one in view["policies"] if one["name"] == policy)
    numbers = np.frombuffer(base64.b64decode(data[key]), f"<u{view['bytes'][key]}")
    return numbers.reshape(view["layers"], view["heads"], LENGTH), data


def cut(view, policy, key, slots):
    """What stays, slot by slot, from the rules in words."""
    places, data = ranks(view, policy, key)
    sinks = min(data["sinks"], slots // 2)
    recent = min(data["recent"], slots // 2 - sinks)
    safe = [t < sinks or t >= LENGTH - recent for t in range(LENGTH)]
    heads = [(layer, head) for layer in range(view["layers"]) for head in range(view["heads"])]
    groups = [[(*head, token) for token in range(LENGTH)] for head in heads]
    if key == "in_model":
        groups = [[slot for group in groups for slot in group]]
    kept = set()
    for group in groups:
        order = sorted(group, key=lambda slot: (not safe[slot[2]], places[slot]))
        kept.update(order[: slots * len(group) // LENGTH])
    return kept


@pytest.mark.parametrize("slots", [1, 5, 12, 30])
@pytest.mark.parametrize("key", ["in_head", "in_model"])
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_keep_what_the_live_cache_keeps(model, view, policy, key, slots):
    rule = "uniform" if key == "in_head" else next(p["rule"] for p in view["policies"] if p["name"] == policy)
    live = set()
    with EvictingCache(model, policy, slots, allocation=rule) as cache:
        feed(model, tokens(1, LENGTH), cache)
        cache.compress()
        for layer in cache.evicting_layers:
            for head, positions in enumerate(cache.kept_positions(layer)[0].tolist()):
                live.update((layer, head, position) for position in positions if position >= 0)
    assert cut(view, policy, key, slots) == live


def test_ranks_are_whole_orders(view):
    for policy in POLICIES:
        assert (np.sort(ranks(view, policy, "in_head")[0]) == np.arange(LENGTH)).all()
        assert (np.sort(ranks(view, policy, "in_model")[0].ravel()) == np.arange(6 * LENGTH)).all()


def test_what_the_page_is_told_beside_ranks(view):
    assert (view["layers"], view["heads"], view["bytes"]) == (3, 2, {"in_head": 2, "in_model": 2})
    assert "".join(view["texts"]) == decode(tokens(1, LENGTH)[0].tolist()) and len(view["texts"]) == LENGTH
    assert {20, 21} <= set(view["asked"]) and view["questions"][0]["question"] == "w1 w2"
    assert view["slots"][2] == {"name": "1/8", "slots": 4} and view["slots"][-1]["slots"] == 1


def test_answers_are_looked_up_whole():
    context = TaskContext((7, 3, 4, 3, 3, 4), (TaskQuestion((1,), (3, 4)), TaskQuestion((1,), (9,))))
    assert answer_places(context) == {1, 2, 4, 5}


def test_tokens_keep_the_spaces_that_stand_between_them():
    assert token_texts([3, 1, 2], decode) == ["w3", " w1", " w2"]


def test_a_policy_that_scores_by_budget_is_refused(model):
    context = TaskContext(tuple(tokens(1, LENGTH)[0].tolist()), ())
    with pytest.raises(UserError, match="scores differently at every budget"):
        token_view(model, context, {"roco": make_policy("roco")}, decode)


def test_oracles_are_refused(model):
    context = TaskContext(tuple(tokens(1, LENGTH)[0].tolist()), ())
    with pytest.raises(UserError, match="oracle"):
        token_view(model, context, {"oracle": make_policy("oracle")}, decode)
