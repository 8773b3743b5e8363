"""Attendre's memories, by hand and against plain loops; and the delayed decision of caches and environments."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from live_models import feed, tiny, tokens

from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.live.query_memory import DelayedAttention

EXACT = {"rtol": 0, "atol": 1e-9}


def by_hand(policy):
    """Five tokens, one by one: 3 slots, queries wait for 2 tokens; query i finds the key that `wanted[i]` names."""
    wanted = [1, 3, 1, 1, 4]
    keys = torch.eye(5, dtype=torch.float64)[None, None]
    queries = keys[:, :, wanted] * 50
    layer, outputs, kept = DelayedAttention(policy, slots=3, delay=2, scaling=1.0), [], []
    for t in range(5):
        one = slice(t, t + 1)
        outputs.append(layer.feed(queries[:, :, one], keys[:, :, one], keys[:, :, one]))
        kept.append(layer.kept_positions()[0, 0].tolist())
    outputs.append(layer.flush())
    assert [out.shape[2] for out in outputs] == [0, 0, 1, 1, 1, 2]
    found = torch.cat(outputs, 2)[0, 0].argmax(-1).tolist()
    return kept, found


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        # at t=3 the last hits are k0: 0, k1: 2, k2: 2 (when it came), k3: 3, so k0 goes; at t=4 k1 was hit again
        (make_policy("lra", top=1), [1, 3, 4]),
        # hits per query that could see it, at t=4: k1 2 of 4, k2 0 of 3
        (make_policy("lfa", top=1), [1, 3, 4]),
        (make_policy("recency"), [2, 3, 4]),
    ],
)
def test_five_tokens_by_hand(policy, kept):
    memory, found = by_hand(policy)
    assert memory == [[0], [0, 1], [0, 1, 2], [1, 2, 3], kept]
    # queries 0, 1 and 2 find their keys, which came up to two tokens later; where k1 went, query 3 does not
    assert found[:3] == [1, 3, 1] and found[4] == 4 and (found[3] == 1) == (1 in kept)


@pytest.mark.parametrize("chunks", [(7,), (3, 4), (1,) * 7])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_memory_for_everything_is_attention_with_a_look_ahead(chunks, delay):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 4, 7, 3).double(), *torch.randn(2, 2, 2, 7, 3).double()
    layer, outputs, seen = DelayedAttention("h2o", 7, delay), [], []
    start = 0
    for m in chunks:
        part = slice(start, start + m)
        start += m
        outputs.append(layer.feed(queries[:, :, part], keys[:, :, part], values[:, :, part]))
        seen += [start] * outputs[-1].shape[2]
    outputs.append(layer.flush())
    seen += [7] * outputs[-1].shape[2]
    assert len(seen) == 7 and all(number >= min(7, i + 1 + delay) for i, number in enumerate(seen))
    for i, number in enumerate(seen):
        for head in range(4):
            weights = (queries[:, head, i : i + 1] @ keys[:, head // 2, :number].mT / 3**0.5).softmax(-1)
            torch.testing.assert_close(
                torch.cat(outputs, 2)[:, head, i : i + 1], weights @ values[:, head // 2, :number], **EXACT
            )


def test_memory_refusals():
    for arguments, message in (
        (("lra", 4, 4), "a memory of 4 slots with a delay of 4"),
        (("lra", 4, -1), "expected a delay from 0"),
        (("snapkv", 4, 1), "policy 'snapkv' needs more than"),
    ):
        with pytest.raises(UserError, match=message):
            DelayedAttention(*arguments)
    with pytest.raises(UserError, match=r"slots is 4\.5; expected a whole number"):
        DelayedAttention("lra", 4.5)
    layer = DelayedAttention("lra", 4)
    for use in (layer.flush, layer.kept_positions):
        with pytest.raises(UserError, match="no chunk came"):
            use()
    q, kv = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    layer.feed(q, kv, kv)
    for wrong, message in (
        ((q[0], kv[0], kv[0]), "have the shapes .*; expected queries"),
        ((q[:, :, :0], kv[:, :, :0], kv[:, :, :0]), "none of them empty"),
        ((q[:, :, :2], kv, kv), "which do not fit; expected queries"),
        ((q[:, :3], kv, kv), "which do not fit"),
        ((q, kv, kv[..., :4]), "the chunk before had 1 rows, 4 query heads, 2 KV heads and widths of 8 and 8"),
        ((q.expand(2, -1, -1, -1), kv.expand(2, -1, -1, -1), kv.expand(2, -1, -1, -1)), "the chunk before had 1 rows"),
    ):
        with pytest.raises(UserError, match=message):
            layer.feed(*wrong)


@pytest.mark.parametrize("trigger", ["every:1", "block:4"])
def test_a_cache_decides_when_the_delay_is_over(trigger, tmp_path):
    model, ids, delay = tiny(), tokens(2, 40), 6
    with EvictingCache(model, "lfa", 16, trigger=trigger, sinks=0, recent=0, delay=delay) as cache:
        for piece in ids.split((20, *(1,) * 20), 1):
            feed(model, piece, cache)
            for layer in range(3):
                kept = cache.kept_positions(layer)
                newest = torch.arange(cache.seen - delay, cache.seen)
                assert bool((kept[..., None] == newest).any(2).all())
        cache.save(tmp_path / "cache.safetensors")
        with EvictingCache.load(tmp_path / "cache.safetensors", model) as loaded, cache.fork() as fork:
            assert loaded.config.delay == fork.config.delay == delay
    assert EvictingCache(model, "lfa", 16, recent=9, delay=6).config.protected_recent == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delay": -1}, "delay is -1; expected a number of tokens from 0"),
        ({"delay": 6, "budget": 12, "sinks": 1}, "delay=6 .* at least 14"),
    ],
)
def test_cache_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        EvictingCache(tiny(), **{"policy": "lfa"} | settings)


def test_an_environment_leaves_the_newest_tokens_alone():
    kept, first = {}, np.zeros(1, np.int64)
    for delay in (0, 8):
        mode = gym.make("KVEvict-v0", budget=0.5, delay=delay).unwrapped.replay.mode
        start = mode.full_cache(first)
        n = int(start.sum())
        oldest_first = -start.cumsum(1).astype(np.float32)  # the newest would go
        kept[delay] = mode.evict(first, first, start, oldest_first)[0][0]
    assert kept[8].sum() == kept[0].sum()
    assert not kept[0][n - 8 : n - 1].any() and kept[8][n - 8 : n].all()
    with pytest.raises(UserError, match="decides at the end of a context"):
        gym.make("KVEvict-v0", delay=8)
    with pytest.raises(UserError, match="a delay of 8 tokens"):
        gym.make("KVEvict-v0", delay=8, budget=10)
