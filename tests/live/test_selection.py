"""Selection at query time: against plain loops, and whatever a cache does in between."""

import math

import pytest
import torch
from live_models import feed, prefilled, tiny, tokens

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live import Guard
from kv_gym.live.selection import (
    LayerSelection,
    MPCacheSelection,
    QuestSelection,
    parse_selection,
)
from kv_gym.live.slots import EqualSlots

EXACT = {"rtol": 0, "atol": 1e-9}


def bounds(groups):
    """Low and high of groups of keys, `[1, 1, groups, d]` each."""
    keys = torch.tensor(groups, dtype=torch.float64)[None, None]
    return keys.amin(3), keys.amax(3)


def slow_choice(query_group, keys, share, size=16, wide_share=0.5, alpha=0.6):
    """Slots that one query reads, a set: MPCache's rule in plain loops.

    Args:
        query_group: `[group, d]`, of the query heads that share the KV head.
        keys: `[n, d]`, what the query sees; the last one is its own.
    """
    n = len(keys)

    def ranked(size, groups):
        def bound(g):
            part = keys[g * size : (g + 1) * size]
            middle = alpha * part.max(0).values + (1 - alpha) * part.min(0).values
            return max(float(query @ middle) for query in query_group)

        return sorted(groups, key=lambda g: -bound(g))

    newest, newest_wide = (n - 1) // size, (n - 1) // (2 * size)
    wide = [0, *ranked(2 * size, range(1, newest_wide))][: max(1, math.floor(wide_share * (newest_wide + 1))) + 1]
    opened = {newest_wide, *(g for g in wide if g < newest_wide)}
    fine = [g for g in range(newest) if g // 2 in opened]
    best = [*fine[:1], *ranked(size, fine[1:])][: max(1, math.floor(share * (newest + 1) + 1e-9)) + 1]
    return {slot for g in {*best, newest} for slot in range(size * g, min(n, size * g + size))}


@pytest.mark.parametrize(
    ("prompt", "forwards", "size", "wide"),
    [(100, (1, 1, 40, 1, 7), 16, 0.5), (31, (1, 1, 1), 16, 0.5), (5, (1, 1, 3), 16, 0.5), (60, (1, 1, 7, 1), 3, 1.0)],
)
def test_equals_plain_loops(prompt, forwards, size, wide):
    torch.manual_seed(0)
    batch, heads, group, d = 2, 2, 3, 4
    n = prompt + sum(forwards)
    keys, values = torch.randn(2, batch, heads, n, d, dtype=torch.float64)
    positions = torch.arange(n).expand(batch, heads, n)
    layer, slots, start = LayerSelection(MPCacheSelection(0.25, group=size, wide=wide), 0), EqualSlots(), 0
    for m in (prompt, *forwards):
        part = slice(start, start + m)
        start += m
        new = {"keys": keys[:, :, part], "values": values[:, :, part], "positions": positions[:, :, part]}
        slots = slots.append(new, 0)
        if m == prompt:
            continue
        query = torch.randn(batch, heads * group, m, d, dtype=torch.float64)
        out = layer.attend(query, slots, 0.7, start)
        grouped = query.unflatten(1, (heads, group))
        most = 0
        for row, head, i in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(m)).tolist():
            seen = start - m + i + 1
            read = sorted(slow_choice(grouped[row, head, :, i], keys[row, head, :seen], 0.25, size, wide))
            weights = (grouped[row, head, :, i] @ keys[row, head, read].T * 0.7).softmax(-1)
            expected = weights @ values[row, head, read]
            torch.testing.assert_close(out[row, i, head * group : (head + 1) * group], expected, **EXACT)
            most = max(most, len(read))
        assert int(layer.read.max()) == most


@pytest.mark.parametrize("kind", ["mpcache", "quest", "random"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.7, 1.0])
def test_as_many_groups_as_it_says(kind, share):
    settings = parse_selection(f"{kind}:{share:g}")
    torch.manual_seed(0)
    for n in (1, 15, 16, 17, 33, 64, 65, 200, 513):
        low, high = torch.randn(2, 1, 2, -(-n // 16), 4)
        chosen = settings.chosen_groups(torch.randn(1, 4, 1, 4), low, high, torch.full((1, 2, 1), n), 0)
        assert set(chosen.sum(-1).flatten().tolist()) == {settings.groups_read(n)}
        assert bool(chosen[..., 0].all()) and bool(chosen[..., -1].all())
        assert share < 1 or bool(chosen.all())


def test_settings_are_part_of_the_name():
    for name in (
        "mpcache:0.2",
        "mpcache:0.2:group=8:wide=1:alpha=0.8:paired",
        "quest:0.1:group=4",
        "random:0.2:paired",
    ):
        assert parse_selection(name).name == name
    for name, said in (
        ("quest:0.2:alpha=1", "settings of quest: group=8, wide=0.5"),
        ("mpcache:0.2:group=0.5", "group=0.5"),
        ("mpcache:0.2:group=0", "groups of 0 slots"),
        ("mpcache:0.2:wide=2", "shares in"),
        ("mpcache:0.2:alpha=2", "alpha=2"),
    ):
        with pytest.raises(UserError, match=said):
            parse_selection(name)


def test_the_linear_bound_is_blind_to_opposite_signs_and_quests_is_not():
    low, high = bounds([[[1, 0], [0, 1]], [[-1, 2], [2, -1]]])

    def both(settings, query):
        return (
            settings.bound(torch.tensor(query, dtype=torch.float64).view(1, 1, 1, 1, 2), low, high, 0)
            .flatten()
            .tolist()
        )

    assert both(MPCacheSelection(), [1, 1]) == pytest.approx([1.2, 1.6])
    assert both(QuestSelection(), [1, 1]) == [2, 4]
    # the best keys have products 1 and 3: the second group is the one to read
    assert both(MPCacheSelection(), [1, -1]) == pytest.approx([0, 0])
    assert both(QuestSelection(), [1, -1]) == [1, 3]


@pytest.mark.parametrize("settings", [{}, {"allocation": "global:zscore"}, {"evicted": "merge"}])
@pytest.mark.parametrize("select", ["mpcache:0.1", "quest:0.1", "mpcache:0.1:paired"])
def test_tokens_together_as_one_by_one(settings, select):
    model, ids = tiny(num_hidden_layers=4), tokens(2, 90)
    outputs = []
    for sizes in ((70, 20), (70, 1, 1, 6, 12)):
        with EvictingCache(model, "keydiff", 60, select=select, **settings) as cache:
            logits = [feed(model, piece, cache) for piece in ids.split(sizes, 1)]
            outputs.append(torch.cat(logits, 1))
            assert int(cache.slots_read().max()) < int(cache.kept().min())
    torch.testing.assert_close(*outputs, **EXACT)
    with EvictingCache(model, "keydiff", 60, **settings) as cache:
        everything = torch.cat([feed(model, piece, cache) for piece in ids.split((70, 20), 1)], 1)
        assert torch.equal(cache.slots_read(), cache.kept())
    assert not torch.allclose(outputs[0], everything)


@pytest.mark.parametrize("settings", [{}, {"allocation": "global:zscore"}])
def test_whole_share_reads_everything(settings):
    model, ids = tiny(), tokens(2, 60)
    outputs = []
    for select in ("all", "quest:1"):
        with EvictingCache(model, "knorm", 40, select=select, **settings) as cache:
            outputs.append(torch.cat([feed(model, piece, cache) for piece in ids.split((50, 1, 1, 8), 1)], 1))
    torch.testing.assert_close(*outputs, **EXACT)


@pytest.mark.parametrize("trigger", ["prefill", "every:3", "block:32"])
def test_bounds_follow_evictions_rows_and_forks(trigger):
    model, ids = tiny(), tokens(3, 80)
    with EvictingCache(model, "keydiff", 40, trigger=trigger, select="mpcache:0.1") as cache:
        feed(model, ids[:, :64], cache)
        for step in range(64, 70):
            feed(model, ids[:, step : step + 1], cache)
        with cache.fork() as fork:
            torch.testing.assert_close(feed(model, ids[:, 70:71], fork), feed(model, ids[:, 70:71], cache), **EXACT)
            fork.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_select_indices(torch.tensor([2, 0]))
            for state in cache._states:
                state.selection.forget()
            for step in range(71, 80):
                one = ids[[2, 0], step : step + 1]
                torch.testing.assert_close(feed(model, one, fork), feed(model, one, cache), **EXACT)


def test_padded_rows_as_alone():
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    mask[0, 62:64] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with EvictingCache(model, "keydiff", 1.0, select="mpcache:0.1") as cache, torch.no_grad():
        model(ids[:, :60], attention_mask=mask[:, :60], position_ids=positions[:, :60], past_key_values=cache)
        padded = model(ids[:, 60:], attention_mask=mask, position_ids=positions[:, 60:], past_key_values=cache).logits
    for row in (0, 1):
        own = ids[row : row + 1, mask[row].bool()]
        split = int(mask[row, :60].sum())
        with EvictingCache(model, "keydiff", 1.0, select="mpcache:0.1") as alone:
            feed(model, own[:, :split], alone)
            logits = feed(model, own[:, split:], alone)
        torch.testing.assert_close(padded[row, mask[row, 60:].bool()], logits[0], **EXACT)


def test_a_paired_layer_reads_what_the_layer_before_chose(monkeypatch):
    read = {}
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, keys, values, mask, *args, **kwargs):
        if mask is not None and mask.dtype == torch.bool:
            read[len(read)] = mask
        return plain(query, keys, values, mask, *args, **kwargs)

    model = tiny(num_hidden_layers=6)
    for select, same in (("mpcache:0.1:paired", [3, 5]), ("mpcache:0.1", [])):
        with EvictingCache(model, "knorm", 1.0, select=select) as cache:
            feed(model, tokens(1, 200), cache)
            read.clear()
            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
                feed(model, tokens(1, 3, seed=1), cache)
        assert [layer for layer in range(1, 6) if torch.equal(read[layer], read[layer - 1])] == same


def test_saved_and_loaded(tmp_path):
    model, one = tiny(), tokens(1, 1)
    with prefilled(model, "knorm", 60, n=80, select="mpcache:0.1") as cache:
        file = cache.save(tmp_path / "a.safetensors")
        expected = feed(model, one, cache)
        small = cache.nbytes()
    with EvictingCache.load(file, model) as loaded:
        assert loaded.config.select.name == "mpcache:0.1"
        torch.testing.assert_close(feed(model, one, loaded), expected, **EXACT)
    with prefilled(model, "knorm", 60, n=80) as cache:
        feed(model, one, cache)
        bounds_bytes = 3 * 2 * 2 * -(-61 // 16) * 8 * 8  # layers, bounds, heads, groups, d, float64
        assert small == cache.nbytes() + bounds_bytes
    with (
        prefilled(model, "knorm", 60, n=80, select=MPCacheSelection(0.1, alpha=1 / 3)) as cache,
        pytest.raises(UserError, match="a file knows the name"),
    ):
        cache.save(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "best:0.2"}, "select='best:0.2' is unknown; expected 'all', 'mpcache:SHARE'"),
        ({"select": "mpcache:0"}, "a share of 0 of the groups"),
        ({"select": "mpcache:1.5"}, "a share of 1.5 of the groups"),
        ({"policy": "h2o"}, "policy 'h2o' needs the attention of every query"),
        ({"evicted": "bits:4"}, "chooses among full-precision slots alone"),
        ({"guard": Guard("missing")}, "chooses among full-precision slots alone"),
        ({"offload": True}, "chooses among full-precision slots alone"),
        ({"policy": "streaming_llm_reindexed"}, "moves keys at every step"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        EvictingCache(tiny(), **{"policy": "knorm", "select": "mpcache:0.2"} | settings)
