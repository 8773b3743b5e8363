"""The traps that others fell into with caches that evict, one test or more for each.

The trap of spaces and rewards (clipped actions, Python floats) is that of tests/test_env_*.py. All models here compute
in float64, because rows of a batch and rows alone are multiplied in other shapes and differ in the last digits.
"""

import ast
import configparser
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live_models import FAMILIES, FULL, LIVE, VERSION, feed, prefilled, tiny, tokens
from masked_reference import MaskedReference
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import kv_gym
from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.models.attention import PREFIX, SUPPORTED, full_layers, refuse_unsupported
from kv_gym.policies import Policy, policy_class

EXACT = {"rtol": 0, "atol": 1e-5}
RAGGED = {"budget": 0.5, "allocation": "global:zscore", "trigger": "every:4"}
EQUAL = {"budget": 8, "trigger": "every:4"}
both = pytest.mark.parametrize("settings", [EQUAL, RAGGED], ids=["equal", "ragged"])


def padded_run(model, cache, ids, mask, pieces):
    """Logits of all pieces of a padded batch, with the position ids that generate would give."""
    logits, stop = [], 0
    for piece in pieces:
        stop += piece
        so_far = mask[:, :stop]
        positions = (so_far.cumsum(1) - 1).clamp(min=0)[:, -piece:]
        with torch.no_grad():
            out = model(
                ids[:, stop - piece : stop], attention_mask=so_far, position_ids=positions, past_key_values=cache
            )
        logits.append(out.logits)
    return torch.cat(logits, 1)


def kept(cache, row):
    """Positions that each head of a row holds, as lists."""
    return [[head[head >= 0].tolist() for head in cache.kept_positions(layer)[row]] for layer in cache.evicting_layers]


def same_as_alone(model, settings, ids, mask, pieces):
    """Compare every row of a padded batch with a cache of its own that gets the row's real tokens, piece by piece."""
    with EvictingCache(model, **settings) as cache:
        together = padded_run(model, cache, ids, mask, pieces)
        assert together[mask.bool()].isfinite().all()
        for row in range(len(ids)):
            with EvictingCache(model, **settings) as alone:
                expected = []
                for piece, real in zip(ids[row].split(pieces), mask[row].bool().split(pieces), strict=True):
                    if real.any():
                        expected.append(feed(model, piece[None, real], alone)[0])
                torch.testing.assert_close(together[row, mask[row].bool()], torch.cat(expected), **EXACT)
                assert kept(cache, row) == kept(alone, 0)


def left_padded(n, pads):
    return torch.stack([torch.arange(n) >= pad for pad in pads]).long()


def test_trap_1_nothing_pulls_in_another_transformers():
    """Installing kvpress pins transformers to an old one: nothing that kv_gym installs or imports may ask for it."""
    setup = configparser.ConfigParser()
    setup.read(Path(kv_gym.__file__).parents[1] / "setup.cfg")
    assert "kvpress" not in setup["options"]["install_requires"]
    assert not [name for name, wants in setup["options.extras_require"].items() if "kvpress" in wants]
    for file in (Path(kv_gym.__file__).parent / "live").rglob("*.py"):
        names = {
            name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)] if name
        }  # fmt: skip
        assert not [name for name in names if name.startswith("kvpress")]


def test_trap_2_the_length_is_what_was_seen():
    """A length of what is stored gives later tokens wrong positions in loops without position ids."""
    model, ids = tiny(), tokens(1, 21)
    with EvictingCache(model, "h2o", 5) as cache:
        feed(model, ids[:, :20], cache)
        reference = MaskedReference(model)
        reference(ids[:, :20])
        for layer in range(3):
            reference.hide(layer, cache.kept_positions(layer))
        assert cache.kept().eq(5).all()
        assert cache.get_seq_length() == 20
        torch.testing.assert_close(feed(model, ids[:, 20:], cache), reference(ids[:, 20:]), **EXACT)
        assert cache.kept_positions(0)[0, 0, -1] == 20


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FULL, "gemma3"])
def test_trap_3_left_padding(family, attention):
    """After eviction a slot is no token, and the padding mask of a batch silently hides the wrong ones."""
    mask = left_padded(26, (13, 0, 6))
    settings = {"policy": "h2o", "budget": 0.4, "trigger": "every:3", "recent": 1}
    same_as_alone(tiny(family, attention), settings, tokens(3, 26), mask, [20, 1, 1, 3, 1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@both
def test_trap_4_rows_of_nothing_but_padding(settings, attention):
    """A row that sees nothing becomes NaN in float64; and it must not count as the row's first forward."""
    mask = left_padded(25, (14, 0, 9))
    mask[2, 19:21] = 0
    same_as_alone(tiny("llama", attention), settings | {"policy": "h2o"}, tokens(3, 25), mask, [8, 9, 2, 2, 1, 1, 1, 1])


def test_trap_5_chunks_with_wrong_positions_are_refused():
    """transformers gave every chunk of a prefill the positions of the last one before 5.4."""
    model = tiny()
    more = {"prefill_chunk_size": 8, "max_new_tokens": 1, "pad_token_id": 0}
    with EvictingCache(model) as cache:
        if VERSION.release < (5, 4):
            with pytest.raises(UserError, match="do not count on from the 8 tokens seen"):
                model.generate(tokens(1, 24), past_key_values=cache, **more)
        else:
            model.generate(tokens(1, 24), past_key_values=cache, **more)
            assert cache.seen == 24


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("allocation", ["pyramid", "global:zscore"])
def test_trap_6_layers_of_different_lengths(allocation, attention):
    """transformers makes one mask for all layers, from the first one's length; single tokens hide that."""
    model = tiny("qwen2", attention)
    settings = {"policy": "h2o", "budget": 9, "allocation": allocation, "trigger": "every:4", "recent": 1}
    with EvictingCache(model, **settings) as cache:
        reference, lengths = MaskedReference(model), set()
        for piece in torch.split(tokens(2, 40), [20, 1, 4, 7, 1, 1, 6], 1):
            torch.testing.assert_close(feed(model, piece, cache), reference(piece), **EXACT)
            for layer in range(3):
                reference.hide(layer, cache.kept_positions(layer))
            lengths.add(tuple(cache.kept().sum((1, 2)).tolist()))
        assert any(len(set(each)) > 1 for each in lengths)
    same_as_alone(model, settings, tokens(2, 30), left_padded(30, (7, 0)), [20, 1, 4, 1, 4])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trap_7_the_switched_attention_keeps_masks(attention):
    """A new attention name without a mask function of that name gets no padding mask, and nothing warns."""
    # transformers' own eager attention of a padded batch is NaN in float64
    model, ids, mask = tiny("llama", attention).float(), tokens(2, 12), left_padded(12, (5, 0))
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping)
    expected = padded_run(model, DynamicCache(), ids, mask, [10, 2])
    with EvictingCache(model):
        assert model.config._attn_implementation == PREFIX + attention
        assert torch.equal(padded_run(model, DynamicCache(), ids, mask, [10, 2])[mask.bool()], expected[mask.bool()])
    for name in SUPPORTED:
        assert ALL_MASK_ATTENTION_FUNCTIONS[PREFIX + name] is ALL_MASK_ATTENTION_FUNCTIONS[name]
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is before[name]  # nothing of transformers' own was replaced


@dataclass(frozen=True)
class ConstantScores(Policy):
    """All slots alike."""

    comparable = True

    def score(self, view):
        return torch.zeros_like(view.positions, dtype=torch.float32)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_trap_8_ties_and_the_order_of_slots(allocation):
    """Ties break by position and not by slot, however often slots were overwritten: the sinks stay, and the newest."""
    model = tiny()
    with EvictingCache(model, ConstantScores(), 6, allocation, "every:1", sinks=2, recent=1) as cache:
        feed(model, tokens(1, 9), cache)
        for step in range(9, 30):
            feed(model, tokens(1, 1, seed=step), cache)
            if allocation == "uniform":
                assert kept(cache, 0) == [[[0, 1, *range(step - 3, step + 1)]] * 2] * 3
            # heads tie too, and the first ones take what is left: every one has its sinks and its newest token
            assert all(head[:2] == [0, 1] and head[-1] == step for layer in kept(cache, 0) for head in layer)
            assert int(cache.kept().sum()) == 36


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "knorm", "lazy_eviction"])
@both
def test_trap_9_and_13_memory_is_that_of_the_storages(settings, policy):
    """A slice keeps all of its storage, which no count of elements shows."""
    model = tiny()
    with EvictingCache(model, policy, **settings) as cache:
        feed(model, tokens(2, 300), cache)
        for step in range(6):
            feed(model, tokens(2, 1, seed=step), cache)
        cache.compress()
        held = list(cache._tensors())
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in held)
        assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
        slots, memory = int(cache.kept().sum()), {"h2o": 4, "snapkv": 0, "knorm": 4, "lazy_eviction": 16}[policy]
        queries = 3 * 2 * 4 * make_policy(policy).needs_queries * 64
        assert cache.nbytes() == slots * (64 + 64 + 8 + memory) + queries
        assert slots == (3 * 2 * 2 * 8 if settings is EQUAL else 3 * 2 * 2 * 153)


def test_trap_10_a_cache_that_evicted_is_not_croppable():
    """`is_croppable` is inherited as true, and a crop of slots that are no tokens cuts the wrong ones."""
    cache = prefilled(tiny(), budget=8)
    assert not any(layer.is_croppable for layer in cache.layers)
    assert not getattr(cache, "is_croppable", False)
    with pytest.raises(UserError, match="cannot be cropped"):
        cache.crop(-1)


def state_of(cache, row):
    """All that a cache holds of a row, slot by slot in the order of positions."""
    found = []
    for layer in cache._evicting:
        state = layer.state
        filled, valid = state.slots.padded()
        for head in range(valid.shape[1]):
            order = filled["positions"][row, head][valid[row, head]].argsort()
            found += [filled[name][row, head][valid[row, head]][order] for name in sorted(filled)]
        found += [] if state.queries is None else [state.queries[row]]
        found.append(torch.tensor([state.tokens_seen[row], state.evicted_at[row]]))
    return found


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "knorm", "lazy_eviction"])
@pytest.mark.parametrize("way", ["select", "repeat", "reorder"])
@both
def test_trap_10_rows_move_with_all_that_belongs_to_them(settings, way, policy):
    """Positions, state, scores and queries follow keys and values; what comes next is what it would have been."""
    model, mask = tiny(), left_padded(24, (10, 0, 5))
    with EvictingCache(model, policy, **settings) as cache:
        padded_run(model, cache, tokens(3, 24), mask, [20, 1, 1, 1, 1])
        chosen = {"select": [2, 0, 2, 1], "repeat": [0, 0, 1, 1, 2, 2], "reorder": [2, 2, 0]}[way]
        with cache.fork() as moved:
            if way == "select":
                moved.batch_select_indices(torch.tensor(chosen))
            elif way == "repeat":
                moved.batch_repeat_interleave(2)
            else:
                moved.reorder_cache(torch.tensor(chosen))
            assert torch.equal(moved.kept(), cache.kept()[:, chosen])
            assert moved.seen == 24
            for row, source in enumerate(chosen):
                for mine, theirs in zip(state_of(moved, row), state_of(cache, source), strict=True):
                    assert torch.equal(mine, theirs)
            for step in range(5):
                ids = tokens(3, 1, seed=step)
                torch.testing.assert_close(feed(model, ids[chosen], moved), feed(model, ids, cache)[chosen], **EXACT)
            for row, source in enumerate(chosen):
                assert kept(moved, row) == kept(cache, source)
            moved.reset()
            assert (moved.seen, moved.nbytes()) == (0, 0)
            again = EvictingCache(model, policy, **settings)
            for each in (moved, again):
                padded_run(model, each, tokens(3, 24), mask, [20, 4])
            assert [kept(moved, row) for row in range(3)] == [kept(again, row) for row in range(3)]
            again.detach()


def test_trap_11_layers_of_other_kinds_are_left_alone():
    """An evicting layer in the place of a sliding one runs too, unnoticed; layers without tokens are not supported."""
    model, ids = tiny("gemma3"), tokens(2, 30)
    full = DynamicCache(config=model.config)
    with EvictingCache(model, "h2o", 6, trigger="every:2") as cache:
        assert [type(layer) is type(own) for layer, own in zip(cache.layers, full.layers, strict=True)] == [
            True, False, False,
        ]  # fmt: skip
        for piece in torch.split(ids, [20, 1, 1, 8], 1):
            feed(model, piece, cache)
            feed(model, piece, full)
        # the first layer comes before any eviction, so it is that of the full cache to the digit
        assert torch.equal(cache.layers[0].keys, full.layers[0].keys)
        assert torch.equal(cache.layers[0].values, full.layers[0].values)
        assert cache.layers[0].get_seq_length() == 30
    for kind in ("linear_attention", "mamba", "hybrid"):
        with pytest.raises(UserError, match=f"layers of type '{kind}'"):
            full_layers(SimpleNamespace(layer_types=["full_attention", kind]))
    model = tiny()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UserError, match="share keys and values"):
        refuse_unsupported(model)


@pytest.mark.parametrize("allocation", ["uniform", "global:rank"])
@pytest.mark.parametrize("name", LIVE)
def test_trap_12_a_policy_protects_what_it_says_without_being_asked(name, allocation):
    """Policies that drop the first tokens score nothing: protection is a default, shrunk to half of small budgets."""
    policy = make_policy(name)
    sinks, recent = policy.protection
    with EvictingCache(tiny(), name, 0.5, allocation) as cache:
        feed(cache.model, tokens(1, 40), cache)
        sinks = min(sinks, 10)
        safe = {*range(sinks), *range(40 - min(recent, 10 - sinks), 40)}
        assert all(safe <= set(head) for layer in kept(cache, 0) for head in layer)
    if name in ("h2o", "snapkv", "streaming_llm"):
        assert safe


def test_trap_14_scores_of_query_heads_are_reduced_and_it_is_said_how():
    """Attention is per query head: whoever reads it names its reduction over the heads of a KV head."""
    folder = Path(kv_gym.__file__).parent / "policies"
    for name in LIVE:
        text = Path(inspect.getfile(policy_class(name))).read_text()
        text += (
            (folder / "scoring" / "attention_hits.py").read_text() if "scoring.attention_hits import" in text else ""
        )
        if "attention(" in text or "def observe" in text or "view.queries" in text:
            assert "query head" in text or "group" in text, f"{name} does not say how it reduces query heads"


def test_trap_14_h2o_takes_the_mean_of_a_group():
    """Two query heads of one KV head, by hand from the reference's queries and keys."""
    model, ids = tiny("qwen3"), tokens(1, 12)
    reference = MaskedReference(model)
    reference(ids)
    with EvictingCache(model, "h2o", 1.0) as cache:
        feed(model, ids, cache)
        mass = cache.layers[1].state.view().state["mass"][0, 1]
    products = reference.queries[1][0, 2:4] @ reference.keys[1][0, 1].T * 8**-0.5
    weights = products.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    torch.testing.assert_close(mass.double(), weights.sum(1).mean(0), rtol=0, atol=1e-5)


def test_trap_16_exactness_is_claimed_in_float64():
    """The models of all these tests, so that 1e-5 is far above rounding and far below a wrong mask."""
    assert {next(tiny(family).parameters()).dtype for family in ("llama", "gemma3")} == {torch.float64}
    assert len(FAMILIES) == 9
