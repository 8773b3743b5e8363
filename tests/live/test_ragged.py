"""Heads of different lengths, padded rows and blocks inside a forward, against slow references."""

from dataclasses import dataclass

import pytest
import torch
from live_models import FULL, feed, tiny, tokens
from masked_reference import MaskedReference

from kv_gym import EvictingCache, make_policy
from kv_gym.live import ragged_attention
from kv_gym.live.slots import EqualSlots, RaggedSlots, concatenate
from kv_gym.policies import Policy


@dataclass(frozen=True)
class BiasedByHead(Policy):
    """Looks at the keys, and likes later layers and heads better: heads hold from nothing to everything."""

    comparable = True

    def score(self, view):
        taste = view.layer * 2 + torch.arange(view.keys.shape[1])[:, None]
        return view.keys.sum(-1).tanh() + 0.7 * taste


@dataclass(frozen=True)
class LikesKeys(Policy):
    """Looks at the keys alone, and rounds: some slots of different heads have equal scores."""

    comparable = True
    static = True

    def score(self, view):
        return (4 * view.keys.sum(-1).tanh()).round()


EXACT = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def compare(model, cache, pieces, layers=(0, 1, 2)):
    """Feed the pieces to the cache and to the reference, which hides what the cache evicted; returns slots held."""
    reference, held = MaskedReference(model), []
    for piece in pieces:
        live = model(piece, past_key_values=cache).logits
        torch.testing.assert_close(live, reference(piece), **EXACT)
        for layer in layers:
            reference.hide(layer, cache.kept_positions(layer))
        held.append(cache.kept().sum((0, 2)).tolist())
    return held


def split(ids, *sizes):
    return torch.split(ids, sizes, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FULL)
def test_one_threshold_then_question_and_answer(family, attention):
    model = tiny(family, attention)
    slots = 3 * (4 if family == "gpt_neox" else 2)
    with EvictingCache(model, BiasedByHead(), 0.25, allocation="global") as cache:
        held = compare(model, cache, split(tokens(2, 41), 32, 5, 1, 1, 1, 1))
        assert held == [[slots * (8 + new)] * 2 for new in (0, 5, 6, 7, 8, 9)]  # the total is exact, in every row
        assert cache.kept().min() == 9  # nothing of the context, and the nine tokens that came later
        assert cache.kept().max() > 2 * 8 + 9  # more than twice an equal share


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["h2o", "keydiff", "snapkv"])
def test_one_threshold_again_and_again(policy, attention):
    model = tiny("llama", attention)
    with EvictingCache(model, policy, 8, allocation="global:zscore", trigger="every:4", sinks=0, recent=0) as cache:
        held = compare(model, cache, split(tokens(2, 50), 20, 1, 1, 1, 1, 1, 3, 6, *[1] * 16))
        assert [row[0] for row in held[:8]] == [48, 54, 60, 66, 48, 54, 48, 48]
        assert all(a == b for a, b in held)


def slow_global(cache_view_scores, positions, total, shield):
    """Kept (layer, head, position) of one row, over Python lists: the best `total` slots of all."""
    ranked = []
    for layer, per_head in enumerate(cache_view_scores):
        for head, scores in enumerate(per_head):
            for slot, score in enumerate(scores):
                position = positions[layer][head][slot]
                ranked.append((position in shield, score, position, -layer, -head))
    return {(-a, -b, position) for _, _, position, a, b in sorted(ranked, reverse=True)[:total]}


@pytest.mark.parametrize("interval", [1, 3])
def test_one_threshold_step_by_step(interval, monkeypatch):
    """A few slots go at a time, in place: the same ones that a list of all slots says, and attention reads the rest."""
    copied, keep = [], RaggedSlots.keep
    monkeypatch.setattr(RaggedSlots, "keep", lambda self, *args: copied.append(1) or keep(self, *args))
    model, policy, budget, sinks, recent = tiny("llama"), LikesKeys(), 24, 2, 1
    reference, heads, scores = MaskedReference(model), 2, {}
    with EvictingCache(
        model, policy, budget, allocation="global", trigger=f"every:{interval}", sinks=sinks, recent=recent
    ) as cache:
        for at, piece in enumerate(split(tokens(1, 100), 40, *[1] * 60)):
            before = dict(scores)
            torch.testing.assert_close(feed(model, piece, cache), reference(piece).to(torch.float64), **EXACT)
            for layer in range(3):
                reference.hide(layer, cache.kept_positions(layer))
                view = cache.layers[layer].state.view()
                for head in range(heads):
                    for slot, score in zip(
                        view.positions[0, head].tolist(), policy.score(view)[0, head].tolist(), strict=True
                    ):
                        if slot >= 0:
                            scores[layer, head, slot] = score
            held = {key for key in scores if key[2] in cache.kept_positions(key[0])[0][key[1]].tolist()}
            if at and at % interval == 0:
                seen = 40 + at
                came = [key for key in scores if key not in before]
                assert all(key[2] == seen - 1 for key in came)
                kept = sorted(
                    scores,
                    key=lambda key: (key[2] < sinks or key[2] >= seen - recent, scores[key], key[2], -key[0], -key[1]),
                )[-3 * heads * budget :]
                assert held == set(kept)
            scores = {key: scores[key] for key in held}
    assert len(copied) == 3  # the first eviction of each layer


@pytest.mark.parametrize("allocation", ["ada", "pyramid"])
def test_uneven_heads_of_a_layer_step_by_step(allocation):
    """Scores that are stored do not keep a layer from being cut at every step, as its own rule says."""
    model = tiny("llama")
    with EvictingCache(model, LikesKeys(), 24, allocation=allocation, trigger="every:1") as cache:
        held = compare(model, cache, split(tokens(1, 60), 40, *[1] * 20))
        assert held == [[3 * 2 * 24]] * 21


def test_one_threshold_keeps_the_best_slots_of_the_model():
    model = tiny("qwen2")
    ids = tokens(2, 40)
    policy = make_policy("snapkv")
    with EvictingCache(model, policy, 1.0) as full:
        feed(model, ids, full)
        views = [layer.state.view() for layer in full.layers]
    with EvictingCache(model, policy, 10, allocation="global", sinks=1, recent=2) as cache:
        feed(model, ids, cache)
    for row in range(2):
        scores = [policy.score(view)[row].tolist() for view in views]
        positions = [view.positions[row].tolist() for view in views]
        expected = slow_global(scores, positions, 60, {0, 38, 39})
        kept = {
            (layer, head, position)
            for layer in range(3)
            for head in range(2)
            for position in cache.kept_positions(layer)[row, head].tolist()
            if position >= 0
        }
        assert kept == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("h2o", {}),
        ("h2o", {"trigger": "every:3"}),
        ("h2o", {"trigger": "block:4"}),
        ("snapkv", {"trigger": "every:3"}),
        ("snapkv", {"trigger": "block:4"}),
        ("keydiff", {"allocation": "global:raw"}),
        ("h2o", {"allocation": "global", "trigger": "every:3"}),
        ("knorm", {"allocation": "global:zscore", "trigger": "lagged:3"}),
    ],
)
def test_a_padded_row_equals_the_row_alone(policy, settings, attention):
    """Left padding, three rows of 5, 14 and 20 tokens, then a question with padding too, then single tokens."""
    model = tiny("llama", attention)
    ids, sizes = tokens(3, 32), (5, 14, 20)
    questions = (4, 1, 3)
    mask = torch.zeros(3, 32, dtype=torch.int64)
    for row, (size, question) in enumerate(zip(sizes, questions, strict=True)):
        mask[row, 20 - size : 20] = 1
        mask[row, 24 - question :] = 1
    with EvictingCache(model, policy, 0.5, recent=2, **settings) as cache, torch.no_grad():
        logits, stop = [], 0
        for piece in (20, 4, *[1] * 8):
            stop += piece
            out = model(
                ids[:, stop - piece : stop], attention_mask=mask[:, :stop], past_key_values=cache,
                position_ids=(mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, -piece:],
            )  # fmt: skip
            logits.append(out.logits)
        together = torch.cat(logits, 1)
    for row in range(3):
        real = mask[row].bool()
        mine = ids[row : row + 1, real]
        with EvictingCache(model, policy, 0.5, recent=2, **settings) as alone, torch.no_grad():
            pieces = split(mine, sizes[row], questions[row], *[1] * 8)
            expected = torch.cat([model(piece, past_key_values=alone).logits for piece in pieces], 1)
        torch.testing.assert_close(together[row, real], expected[0], **EXACT)
        for layer in range(3):
            for head in range(2):
                ours, theirs = cache.kept_positions(layer)[row, head], alone.kept_positions(layer)[0, head]
                assert ours[ours >= 0].tolist() == theirs[theirs >= 0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_with_left_padding_equals_rows_alone(attention):
    model = tiny("llama", attention)
    ids, sizes = tokens(3, 20), (7, 13, 20)
    mask = torch.stack([torch.arange(20) >= 20 - size for size in sizes]).long()
    more = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings = {"budget": 0.5, "trigger": "every:3", "recent": 2}
    with EvictingCache(model, "h2o", **settings) as cache:
        together = model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=0, **more)
    for row, size in enumerate(sizes):
        with EvictingCache(model, "h2o", **settings) as alone:
            single = model.generate(ids[row : row + 1, 20 - size :], past_key_values=alone, pad_token_id=0, **more)
        assert together.sequences[row, 20:].tolist() == single.sequences[0, size:].tolist()
        for step in range(8):
            torch.testing.assert_close(together.logits[step][row], single.logits[step][0], **EXACT)


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "keydiff", "recency"])
def test_a_block_inside_a_forward_equals_a_forward_per_block(policy):
    model = tiny()
    ids = tokens(2, 45)
    whole, parts = (EvictingCache(model, policy, 6, trigger="block:8", recent=1) for _ in range(2))
    with torch.no_grad():
        at_once = torch.cat([model(piece, past_key_values=whole).logits for piece in split(ids, 21, 1, 1, 22)], 1)
        piecewise = torch.cat([model(piece, past_key_values=parts).logits for piece in split(ids, *[8] * 5, 5)], 1)
    torch.testing.assert_close(at_once, piecewise, rtol=0, atol=1e-9)
    for layer in range(3):
        assert torch.equal(whole.kept_positions(layer), parts.kept_positions(layer))
    assert whole.kept().tolist() == [[[6 + 45 % 8] * 2] * 2] * 3


def test_block_wise_reading_equals_masking():
    model = tiny()
    with EvictingCache(model, "h2o", 6, trigger="block:8", recent=1) as cache:
        held = compare(model, cache, split(tokens(2, 32), 8, 8, 3, 5, 8))
        assert [row[0] for row in held] == [36, 36, 36 + 18, 36, 36]


def ragged(batch=2, kv_heads=3, new=1, seed=0):
    """Slots of lengths 0 to 12 before `new` tokens, in a layout with room."""
    torch.manual_seed(seed)
    equal = EqualSlots()
    n = 12
    positions = torch.arange(n).expand(batch, kv_heads, n)
    pairs = lambda m: {name: torch.randn(batch, kv_heads, m, 4).double() for name in ("keys", "values")}  # noqa: E731
    equal.append(pairs(n) | {"positions": positions}, 0)
    kept = torch.rand(batch, kv_heads, n) < torch.rand(batch, kv_heads, 1)
    kept[0, 0] = False
    slots = equal.keep(kept, 0)
    slots.append(pairs(new) | {"positions": torch.arange(n, n + new).expand(batch, kv_heads, new)}, 3)
    return slots


def slow_attention(query, slots, scaling):
    """Head by head and query by query, in plain loops over slots."""
    batch, query_heads, m, d = query.shape
    group = query_heads // slots.lengths.shape[1]
    out = torch.zeros(batch, m, query_heads, d, dtype=query.dtype)
    for row in range(batch):
        for head in range(query_heads):
            start, length = int(slots.starts[row, head // group]), int(slots.lengths[row, head // group])
            for i in range(m):
                seen = range(start, start + length - (m - 1 - i))
                products = [float(query[row, head, i] @ slots.buffers["keys"][s]) * scaling for s in seen]
                weights = torch.tensor(products, dtype=query.dtype).softmax(0)
                out[row, i, head] = sum(w * slots.buffers["values"][s] for w, s in zip(weights, seen, strict=True))
    return out


def varlen_stand_in(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k
):  # fmt: skip
    """What the kernel documents, one sequence at a time: causal with the last query at the last key in use."""
    assert window_size == (-1, 0)
    out = torch.empty_like(query)
    for s in range(len(cu_seq_q) - 1):
        asking = query[cu_seq_q[s] : cu_seq_q[s + 1]]
        used = int(seqused_k[s])
        assert len(asking) <= max_q and used <= max_k and used <= cu_seq_k[s + 1] - cu_seq_k[s]
        keys, values = (part[cu_seq_k[s] : cu_seq_k[s] + used, 0] for part in (key, value))
        hidden = torch.ones(len(asking), used, dtype=torch.bool).triu(used - len(asking) + 1)
        for head in range(query.shape[1]):
            weights = (asking[:, head] @ keys.T * scale).masked_fill(hidden, float("-inf")).softmax(-1)
            out[cu_seq_q[s] : cu_seq_q[s + 1], head] = weights @ values
    return out


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_three_forms_of_ragged_attention_agree_with_plain_loops(monkeypatch, group, new):
    from torch.nn.attention import varlen

    slots = ragged(new=new)
    query = torch.randn(2, 3 * group, new, 4).double()
    expected = slow_attention(query, slots, 0.7)
    torch.testing.assert_close(ragged_attention.attend_per_head(query, slots, 0.7, None, 0.0), expected)
    torch.testing.assert_close(ragged_attention.attend_padded(query, slots, 0.7), expected)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    torch.testing.assert_close(ragged_attention.attend_varlen(query, slots, 0.7), expected)


def test_ragged_attention_over_concatenated_slots(monkeypatch):
    """Slices, padding and variable length read concatenated slots alike: a tier's first, the newest last."""
    from torch.nn.attention import varlen

    tier, slots = ragged(new=0, seed=1), ragged(new=2)
    both = concatenate(tier, slots)
    assert torch.equal(both.lengths, tier.lengths + slots.lengths)
    for row in range(2):
        for head in range(3):
            cut = [part.buffers["keys"][part.starts[row, head] :][: part.lengths[row, head]] for part in (tier, slots)]
            there = both.buffers["keys"][both.starts[row, head] :][: both.lengths[row, head]]
            assert torch.equal(there, torch.cat(cut))
    query = torch.randn(2, 6, 2, 4).double()
    expected = slow_attention(query, both, 0.7)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_stand_in)
    for found in (
        ragged_attention.attend_per_head(query, both, 0.7, None, 0.0),
        ragged_attention.attend_padded(query, both, 0.7),
        ragged_attention.attend_varlen(query, both, 0.7),
    ):
        torch.testing.assert_close(found, expected)


def test_slots_scored_before_bounds_became_tighter_are_handed_to_the_tier():
    """On an accelerator the lengths of an earlier eviction may arrive while the next one is under way."""
    caches = []
    for more in (0, 3):
        with EvictingCache(tiny("llama", head_dim=32), "keydiff", 0.5, "global:raw", evicted="bits:4") as cache:
            feed(cache.model, tokens(1, 24), cache)
            state = cache.layers[0].state
            filled, valid = state.slots.padded(("positions",))
            kept = valid & (filled["positions"] % 2 == 0)
            state.keep_slots(torch.nn.functional.pad(kept, (0, more)))
            caches.append([*state.tier.stored.buffers.values(), state.slots.lengths])
    assert all(torch.equal(first, second) for first, second in zip(*caches, strict=True))
