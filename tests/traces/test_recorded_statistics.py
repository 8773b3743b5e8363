"""A policy with memory is shown the same attention whether its tokens came at once or in blocks."""

from dataclasses import dataclass, replace

import pytest
import torch

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import StatefulPolicy
from kv_gym.policies.h2o import H2O
from kv_gym.policies.scoring.block_schedule import observe_blocks


@dataclass(frozen=True)
class Diary(StatefulPolicy):
    """Notes per slot how often it was shown, at which number of tokens seen last, and its decayed attention."""

    def initial_state(self, view):
        return {"notes": torch.zeros(*view.keys.shape[:3], 3)}

    def observe(self, view, attention, state):
        received = attention.sum(2).unflatten(1, (view.keys.shape[1], -1)).mean(2)
        count, _, decayed = state["notes"].unbind(-1)
        last = view.seen[:, None, None].expand_as(count).float()
        return {"notes": torch.stack([count + 1, last, 0.5 * decayed + received], -1)}

    def score(self, view):
        return view.state["notes"][..., 2]


def tensors(n=300, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(rows, heads, n, 8, generator=generator)  # noqa: E731
    return draw(2), draw(2), draw(4)


def test_mass_is_the_column_sum_of_causal_attention():
    keys, values, queries = tensors()
    view = CacheView.of(keys, values, scaling=0.7)
    mass = observe_blocks(H2O(), view, queries, H2O().initial_state(view))["mass"]
    scores = (queries @ keys.repeat_interleave(2, 1).mT * 0.7).double()
    weights = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(mass.double(), weights.sum(2).unflatten(1, (2, 2)).mean(2), atol=1e-5, rtol=1e-5)


def test_one_prefill_equals_blocks_that_come_one_after_another():
    keys, values, queries = tensors()
    view = CacheView.of(keys, values)
    at_once = observe_blocks(Diary(), view, queries, Diary().initial_state(view))["notes"]
    state = None
    for stop in (128, 256, 300):
        start = 0 if state is None else state["notes"].shape[2]
        part = CacheView.of(keys[:, :, :stop], values[:, :, :stop])
        grown = Diary().initial_state(part)
        if state is not None:
            grown["notes"][:, :, :start] = state["notes"]
        state = observe_blocks(Diary(), part, queries[:, :, start:stop], grown)
    torch.testing.assert_close(at_once, state["notes"], atol=1e-6, rtol=1e-6)
    assert at_once[0, 0, [0, 127, 128, 299], 0].tolist() == [3, 3, 2, 1]
    assert at_once[..., 1].unique().tolist() == [300]


@pytest.mark.parametrize("q", [1, 130])
def test_slots_in_any_order_with_padding_get_the_same_state(q):
    """A live cache after eviction: heads of different lengths, unsorted, invalid slots last."""
    keys, values, queries = tensors(n=200)
    view = CacheView.of(keys, values)
    state = {"notes": torch.rand(2, 2, 200, 3)}
    state["notes"][:, :, 200 - q :] = 0
    plain = observe_blocks(Diary(), view, queries[:, :, -q:], state)["notes"]

    order = torch.stack([torch.randperm(200) for _ in range(4)]).view(2, 2, 200)
    moved = lambda t: t.gather(2, order[..., None].expand(-1, -1, -1, t.shape[-1]))  # noqa: E731
    padded = lambda t, fill: torch.cat([t, torch.full_like(t[:, :, :7], fill)], 2)  # noqa: E731
    positions = padded(order, -1)
    shuffled = replace(
        CacheView.of(padded(moved(keys), 9.0), padded(moved(values), 9.0)),
        positions=positions,
        valid=positions >= 0,
        seen=view.seen,
    )
    got = observe_blocks(Diary(), shuffled, queries[:, :, -q:], {"notes": padded(moved(state["notes"]), 0.0)})["notes"]
    torch.testing.assert_close(got[:, :, :200], moved(plain), atol=1e-5, rtol=1e-5)
    assert (got[:, :, 200:] == 0).all(), "a slot that is not there must not change"
