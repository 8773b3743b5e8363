"""kv_gym's scores against those of kvpress 0.5.5, stored by tests/kvpress/golden.py for one tiny model.

One row per policy that both have: the press, the settings, and what becomes of ours before it is compared. Not in the
table: `random` (kvpress's RandomPress draws other numbers), the policies that kvpress has no press for, and of
what both have CriticalAdaKVPress (it divides a layer's slots by the base's scores and weighs values inside each head;
here an allocation compares the scores that the policy gives), and BlockPress and DecodingPress, which are triggers.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_gym import CacheView, make_policy
from kv_gym.budgets import ScoredLayer, select, select_slots
from kv_gym.budgets.ada import Ada
from kv_gym.budgets.pyramid import Pyramid
from kv_gym.live.rope_shift import RopeShift
from kv_gym.live.tiers import EvictedPairs, MergeValues
from kv_gym.policies import StatefulPolicy
from kv_gym.policies.scoring.block_schedule import observe_blocks
from kv_gym.traces import Prompt
from kv_gym.traces.recorder import record_sequence

sys.path.append(str(Path(__file__).parents[1] / "kvpress"))
from tiny_models import prompt, tiny

FILE = Path(__file__).parents[1] / "kvpress" / "golden.npz"
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


# press -> settings of ours. The press asks in words, for each chunk in others, and lets them end as the model's
# template says; here the same ids ask for every chunk, with nothing behind the end of the chunk before
REPEATED = {
    "kvzip": {},
    "kvzip_in_chunks": {"chunk": 24},
    "kvzip_plus": {"projected": True},
}


@pytest.mark.parametrize("press", REPEATED)
def test_a_second_reading_finds_what_kvzip_does(golden, press):
    # the model has to be read again, so it is made again: the same numbers come from the same seed
    model, ids = tiny("llama", torch.float32), prompt(N)
    policy = make_policy("kvzip", instruction="5 60 11", **REPEATED[press])
    sequence = record_sequence(model, Prompt("a", ids[0].tolist(), [[1]]), stats=[policy])
    torch.testing.assert_close(torch.from_numpy(sequence.keys[1]), golden["keys"], rtol=1e-5, atol=1e-6)
    views = [sequence.view(layer, policy=policy.statistics) for layer in range(2)]
    found = torch.cat([policy.score(view) for view in views])
    assert len(golden[f"repeated.{press}"].unique()) > 150
    torch.testing.assert_close(found, golden[f"repeated.{press}"], rtol=1e-4, atol=1e-6)


def test_ada_divides_a_layer_as_kvpress_does(golden):
    policy = make_policy("snapkv", window=8)
    (kept,) = select_slots(policy, Ada(alpha=0.2), [view_of(golden, policy)], *policy.protection)
    assert torch.equal(kept[0], golden["kept.ada"]) and kept[0, 0].sum() != kept[0, 1].sum()


def test_pyramid_divides_a_model_as_kvpress_does(golden):
    # the press counts the window among a layer's slots, as ours does where nothing is protected
    view = CacheView.of(torch.zeros(1, 2, 200, 1), torch.zeros(1, 2, 200, 1), 100)
    layers = [ScoredLayer(view, torch.zeros(1, 2, 200, dtype=torch.int64), place, 5) for place in range(5)]
    slots = torch.stack(Pyramid(beta=2.0).slots(layers))[:, 0]
    assert torch.equal(slots, golden["slots.pyramid"][:, None].expand(-1, 2))


def stays(golden):
    """The slots `[1, kv_heads, N]` bool that the smallest keys keep of half the tokens, and the press's order."""
    scores = -golden["keys"].norm(dim=-1)
    index = scores.topk(N // 2, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, True)[None], index


def test_values_are_merged_as_kvpress_does(golden):
    kept, index = stays(golden)
    view = view_of(golden, make_policy("knorm"))
    most = torch.full((1, len(kept[0])), N // 2)
    pairs = EvictedPairs(view.keys, view.values, view.positions, view.valid, kept, most, N, True, 0)
    merged = MergeValues().begin().take(pairs)["values"][0]
    wide = index[..., None].expand(-1, -1, merged.shape[-1])
    assert torch.equal(golden["keys"].gather(1, wide), golden["keys.merged"])
    torch.testing.assert_close(merged.gather(1, wide), golden["values.merged"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(golden["values"].gather(1, wide), golden["values.merged"], atol=1e-2)


def test_keys_are_turned_as_kvpress_does(golden):
    # the press counts the tokens that are left up from zero, the cache back from the newest: 30 positions apart
    kept, index = stays(golden)
    index = index.sort(-1).values[None]
    keys = golden["keys"][None].gather(2, index[..., None].expand(-1, -1, -1, golden["keys"].shape[-1]))
    shift = RopeShift(tiny("llama", torch.float32))
    ours = shift.rotate(keys, N // 2 + torch.arange(N // 2) - index)
    theirs = shift.rotate(golden["keys.turned"][None], torch.full_like(index, N // 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert int(kept.sum()) == N


def test_every_stored_press_is_compared(golden):
    compared = {row[0] for row in (*SCORES.values(), *CHOICES.values())}
    assert {name.removeprefix("scores.") for name in golden if name.startswith("scores.")} == compared
    assert {name.removeprefix("repeated.") for name in golden if name.startswith("repeated.")} == set(REPEATED)
