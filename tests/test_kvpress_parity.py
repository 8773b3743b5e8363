"""kv_gym's scores against those of kvpress 0.5.5, stored by tests/kvpress/golden.py for one tiny model.

One row per policy that both have: the press, the settings, and what becomes of ours before it is compared. Not in the
table: `uniform_order` (kvpress's RandomPress draws other numbers) and the policies that kvpress has no press for.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_gym import CacheView, make_policy
from kv_gym.budgets import select
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.observing import observe_blocks

FILE = Path(__file__).parent / "kvpress" / "golden.npz"
N = 60


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files if name != "versions"}


def view_of(golden, policy):
    """The layer as the policy may see it at the end of the prompt, with a budget of half the tokens."""
    keys, values, queries = (golden[name][None] for name in ("keys", "values", "queries"))
    m = policy.needs_queries
    window = queries[:, :, N - m :] if m else None
    output = golden["output"] if policy.needs_output else None
    view = CacheView.of(keys, values, N // 2, queries=window, output=output)
    if isinstance(policy, StatefulPolicy):
        view = replace(view, state=observe_blocks(policy, view, queries, policy.initial_state(view)))
    return view


# policy -> press, settings of ours, how many of the newest tokens the press sets aside instead of scoring them
SCORES = {
    "expected_attention": ("expected_attention", {"window": 16}, 0),  # given the same moments; see golden.py
    "h2o": ("observed_attention", {"reduce": "mean"}, 0),  # the press divides by how many queries could see a token
    "keydiff": ("keydiff", {}, 0),
    "knorm": ("knorm", {}, 0),
    "lagkv": ("lagkv", {"lag": 16, "first": 4}, 0),
    "snapkv": ("snapkv", {"window": 8, "kernel": 5}, 8),  # the window has the largest score plus one; we protect it
    "tova": ("tova", {}, 1),  # the newest token likewise; the paper scores it as any other, and so do we
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_kvpress(golden, name):
    press, settings, aside = SCORES[name]
    policy = make_policy(name, **settings)
    found, expected = policy.score(view_of(golden, policy))[0], golden[f"scores.{press}"]
    assert found.shape == expected.shape == (2, N) and len(expected.unique()) > 10
    torch.testing.assert_close(found[:, : N - aside], expected[:, : N - aside], rtol=1e-5, atol=1e-6)


# scores of another scale, the same choice at half the tokens
CHOICES = {
    "critical_kv": ("critical_kv", {"over": make_policy("snapkv", window=8)}),  # ours orders both stages in [0, 3]
    "streaming_llm": ("streaming_llm", {}),  # the press scores the kept tokens 1 and the others 0
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_those_of_kvpress(golden, name):
    press, settings = CHOICES[name]
    policy = make_policy(name, **settings)
    kept = select(policy, view_of(golden, policy), *policy.protection)[0]
    best = golden[f"scores.{press}"].topk(N // 2, -1).indices.sort(-1).values
    assert kept.sum(-1).tolist() == [N // 2, N // 2]
    assert [row.nonzero().flatten().tolist() for row in kept] == best.tolist()


def test_every_stored_press_is_compared(golden):
    compared = {row[0] for row in (*SCORES.values(), *CHOICES.values())}
    assert {name.removeprefix("scores.") for name in golden if name.startswith("scores.")} == compared
