"""What becomes of evicted pairs, against a full cache in which they are replaced by hand."""

from dataclasses import dataclass

import pytest
import torch
from live_models import feed, padded_and_alone, tokens
from live_models import tiny as cast
from masked_reference import MaskedReference
from tier_reference import TieredReference

from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.live import PolicyGroup
from kv_gym.live.tiers import Drop, EvictedPairs, LowPrecision, Merge, MergeValues, parse_tier
from kv_gym.live.tiers.quantiser import dequantise, quantise
from kv_gym.policies import Policy

EXACT = {"rtol": 0, "atol": 1e-5}
TIERS = {
    "bits:2": ("bits", {"bits": 2}),
    "bits:8": ("bits", {"bits": 8}),
    "bits:4:balanced": ("bits", {"bits": 4, "balanced": True}),
    "bits:8:most=3": ("bits", {"bits": 8, "most": 3}),
    "merge": ("merge", {}),
    "merge:values": ("merge:values", {}),
}
TRIGGERS = {
    "prefill": ((20, 5, 1, 1, 1, 1), {}),
    "every": ((20, 1, 1, 1, 1, 1, 3, 6, 1), {"trigger": "every:3"}),
    "block": ((8, 8, 8, 3, 5, 8), {"trigger": "block:8"}),
}
PADDED = [{}, {"trigger": "every:3"}, {"trigger": "block:4"}, {"allocation": "global:zscore"}]


@pytest.fixture(autouse=True)
def softmax_as_given(monkeypatch):
    """Eager attention in float64 too: transformers asks for float32, in which two equal models differ."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def tiny(family="llama", attention="sdpa"):
    """A tiny model that is float64 throughout: rounding to a few bits makes a step of the least difference."""
    model = cast(family, attention)
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):  # transformers' own go through float32
                plain = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                plain.weight = norm.weight
                setattr(module, name, plain)
    return model


def split(ids, *sizes):
    return torch.split(ids, sizes, 1)


@torch.no_grad()
def compare(model, cache, reference, sizes, batch=2):
    for piece in split(tokens(batch, sum(sizes)), *sizes):
        live = model(piece, past_key_values=cache).logits
        torch.testing.assert_close(live, reference(piece), **EXACT)
        for layer in range(3):
            reference.evict(layer, cache.kept_positions(layer))


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("evicted", TIERS)
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("qwen3", "eager")])
def test_equals_a_full_cache_with_replaced_pairs(family, attention, evicted, allocation, trigger):
    model = tiny(family, attention)
    sizes, settings = TRIGGERS[trigger]
    if trigger == "block" and allocation != "uniform":
        settings = {"trigger": "every:8"}  # one threshold cuts at the end of a forward
    tier, how = TIERS[evicted]
    with EvictingCache(model, "h2o", 6, allocation, sinks=1, recent=1, evicted=evicted, **settings) as cache:
        compare(model, cache, TieredReference(model, tier, **how), sizes)


@pytest.mark.parametrize(("family", "attention"), [("llama", "eager"), ("qwen3", "sdpa")])
@pytest.mark.parametrize("evicted", ["bits:2", "merge"])
def test_other_attention_implementations(family, attention, evicted):
    model = tiny(family, attention)
    tier, how = TIERS[evicted]
    with EvictingCache(model, "keydiff", 5, trigger="every:4", evicted=evicted) as cache:
        compare(model, cache, TieredReference(model, tier, **how), (16, 1, 1, 1, 1, 2, 4, 1))


@pytest.mark.parametrize(("bits", "group"), [(2, 4), (4, 2), (8, 8)])
def test_groups_of_channels(bits, group):
    model = tiny()
    with EvictingCache(model, "knorm", 4, trigger="every:2", evicted=LowPrecision(bits, group)) as cache:
        compare(model, cache, TieredReference(model, "bits", bits, group), (12, 1, 1, 1, 1, 3))


@dataclass(frozen=True)
class BiasedByHead(Policy):
    """Likes later layers and heads better, so much that some evict nothing for long."""

    comparable = True

    def score(self, view):
        return view.keys.sum(-1).tanh() + 5 * (view.layer * 2 + torch.arange(view.keys.shape[1])[:, None])


def test_a_head_is_balanced_when_it_first_evicts():
    model = tiny()
    settings = {"allocation": "global", "trigger": "every:4", "sinks": 0, "recent": 0, "evicted": "bits:2:balanced"}
    with EvictingCache(model, BiasedByHead(), 12, **settings) as cache:
        reference = TieredReference(model, "bits", bits=2, balanced=True)
        compare(model, cache, reference, (14, 4, 8, 8, 8, 1), batch=1)
        assert len(reference.balance) == 5  # the last head has evicted nothing yet


def test_the_reference_tells_tiers_apart():
    """The comparison is worth something: three bits more or less, or another threshold, give other logits."""
    model = tiny()
    for evicted, other in (("bits:2", ("bits", {"bits": 4})), ("merge", ("merge", {"decay": 0.9}))):
        tier, how = other
        with EvictingCache(model, "knorm", 4, trigger="every:4", evicted=evicted) as cache, pytest.raises(
            AssertionError, match="Tensor-likes are not close"
        ):  # fmt: skip
            compare(model, cache, TieredReference(model, tier, **how), (12, 4, 4, 1))


@pytest.mark.parametrize("evicted", ["merge", "bits:2"])
def test_policies_choose_among_full_precision_slots(evicted):
    """`knorm` by hand: the smallest keys stay of what is there in full precision, merged ones as they are."""
    model = tiny()
    tier, how = TIERS[evicted]
    reference = TieredReference(model, tier, **how)
    with EvictingCache(model, "knorm", 5, trigger="every:4", sinks=0, recent=0, evicted=evicted) as cache:
        for piece in split(tokens(1, 24), 12, 4, 4, 4):
            feed(model, piece, cache)
            reference(piece)
            for layer in range(3):
                for head in range(2):
                    held, until = reference.shown.get((layer, 0, head), (set(), 0))
                    present = held | set(range(until, cache.seen))
                    sizes = reference.keys[layer][0, head].norm(dim=-1).tolist()
                    expected = sorted(sorted(present, key=lambda p: sizes[p])[:5])
                    assert cache.kept_positions(layer)[0, head].tolist() == expected
                reference.evict(layer, cache.kept_positions(layer))


@pytest.mark.parametrize("evicted", TIERS)
@pytest.mark.parametrize("settings", PADDED)
def test_a_padded_row_equals_the_row_alone(settings, evicted):
    model = tiny("llama", "eager" if evicted == "bits:2" else "sdpa")
    settings = {"policy": "h2o", "budget": 0.5, "recent": 1, "evicted": evicted} | settings
    for together, alone in padded_and_alone(model, (16, 4, 1, 1, 1, 1), **settings):
        torch.testing.assert_close(together, alone, **EXACT)


def test_blocks_inside_a_forward():
    model = tiny()
    ids = tokens(2, 40)
    for evicted in TIERS:
        with (
            EvictingCache(model, "h2o", 5, trigger="block:8", evicted=evicted) as whole,
            EvictingCache(model, "h2o", 5, trigger="block:8", evicted=evicted) as parts,
        ):
            at_once = feed(model, ids, whole)
            piecewise = torch.cat([feed(model, piece, parts) for piece in split(ids, *[8] * 5)], 1)
            torch.testing.assert_close(at_once, piecewise, rtol=0, atol=1e-9)
            assert whole.nbytes() >= parts.nbytes() > 0


def reachable(thing, seen=None):
    """Bytes of the distinct storages that can be reached from an object's attributes, models left out."""
    seen = {} if seen is None else seen
    if isinstance(thing, torch.Tensor):
        seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            reachable(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            reachable(value, seen)
    elif type(thing).__module__.startswith("kv_gym.live") and type(thing).__name__ != "CacheConfig":
        held = {name: value for name, value in vars(thing).items() if name != "_model"}
        # which slots of flat buffers belong to whom is no part of the cache's own count
        bookkeeping = ("lengths", "capacities", "starts", "starts_on_device", "_bounds", "_since_copy")
        reachable({name: value for name, value in held.items() if name not in bookkeeping}, seen)
    return sum(seen.values())


@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("evicted", ["drop", *TIERS, "bits:4", LowPrecision(2, 4)])
def test_bytes(evicted, allocation):
    """All that can be reached is the formula: 10 slots of 50 tokens in 8 bytes a number, 40 in a few bits."""
    tier = parse_tier(evicted)
    model = tiny()
    with EvictingCache(model, "knorm", 10, allocation, evicted=evicted) as cache:
        feed(model, tokens(2, 50), cache)
        places, d = 3 * 2 * 2, 8
        expected = places * 10 * (2 * d * 8 + 8)
        if isinstance(tier, LowPrecision):
            group = min(tier.group, d)
            pair = 2 * d * tier.bits // 8 + 2 * (d // group) * 2 * 2 + 4 * (tier.most is not None)
            expected += places * (tier.most or 40) * pair
            assert tier.nbytes(d) == pair
            if tier.balanced:
                expected += 3 * 2 * (4 + 2) * d * 8
        if isinstance(tier, Merge):
            expected += places * 8
        assert reachable(cache) == cache.nbytes() == expected


@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
def test_bytes_after_many_evictions(allocation):
    """The tier's buffers have room for what is evicted next, and `compress` frees it."""
    model = tiny()
    with EvictingCache(model, "knorm", 10, allocation, "every:4", evicted="bits:4") as cache:
        for piece in split(tokens(1, 80), 40, *[1] * 40):
            feed(model, piece, cache)
        roomy = cache.nbytes()
        cache.compress()
        places, d = 6, 8
        scores = 4 if "scores" in cache.layers[0].state.slots.buffers else 0
        exact = places * (10 * (2 * d * 8 + 8 + scores) + 70 * (2 * d // 2 + 2 * 4))
        slack = places * (max(16, 70 // 8 + 1) + 16 * (allocation != "uniform"))
        assert exact < roomy <= exact + slack * (2 * d * 8 + 8 + scores + 2 * d // 2 + 2 * 4)
        feed(model, tokens(1, 1), cache)
        cache.compress()
        assert reachable(cache) == cache.nbytes() == exact + places * (2 * d // 2 + 2 * 4)


@pytest.mark.parametrize("allocation", ["uniform", "global:zscore"])
@pytest.mark.parametrize("evicted", TIERS)
def test_rows_forks_and_reset(evicted, allocation):
    model = tiny()
    settings = {"policy": "h2o", "budget": 6, "allocation": allocation, "trigger": "every:4", "evicted": evicted}
    with EvictingCache(model, **settings) as cache:
        begin = feed(model, tokens(2, 20), cache)
        questions = split(tokens(2, 10, seed=1), 5, 5)

        def asked(twin, change):
            return torch.cat([feed(model, change(question), twin) for question in questions], 1)

        expected = asked(cache.fork(), lambda ids: ids)
        assert torch.equal(expected, asked(cache.fork(), lambda ids: ids))  # the first fork changed nothing here
        repeated, picked, swapped = cache.fork(), cache.fork(), cache.fork()
        repeated.batch_repeat_interleave(2)
        picked.batch_select_indices(torch.tensor([1]))
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(asked(repeated, lambda ids: ids.repeat_interleave(2, 0))[1::2], expected)
        torch.testing.assert_close(asked(picked, lambda ids: ids[1:]), expected[1:])
        torch.testing.assert_close(asked(swapped, lambda ids: ids.flip(0)).flip(0), expected)
        cache.reset()
        assert cache.nbytes() == 0
        assert torch.equal(feed(model, tokens(2, 20), cache), begin)
        torch.testing.assert_close(asked(cache, lambda ids: ids), expected)


@pytest.mark.parametrize("evicted", TIERS)
def test_generate_and_inference_mode(evicted):
    model = tiny()
    ids = tokens(1, 20)
    through = EvictingCache(model, "h2o", 6, trigger="every:3", evicted=evicted)
    out = model.generate(
        ids, past_key_values=through, max_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    by_hand = EvictingCache(model, "h2o", 6, trigger="every:3", evicted=evicted)
    with torch.inference_mode():
        logits = [model(ids, past_key_values=by_hand).logits[:, -1]]
    for token in out.sequences[0, 20:-1]:
        logits.append(feed(model, token.view(1, 1), by_hand)[:, -1])
    torch.testing.assert_close(torch.stack(out.logits).double(), torch.stack(logits), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_stays_within_half_a_step(bits, dtype):
    torch.manual_seed(0)
    x = (torch.randn(3, 5, 64) * torch.linspace(0.1, 30, 64)).to(dtype)
    codes, grid = quantise(x, bits, 32)
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 5, 64 * bits // 8)
    assert (grid.dtype, grid.shape) == (torch.float16, (3, 5, 2, 2))
    back = dequantise(codes, grid, bits, dtype)
    assert back.dtype == dtype
    step = (grid[..., 0].double() / 2)[..., None].expand(3, 5, 2, 32).flatten(2)
    # float16 holds the scale to 11 bits, and the result has the numbers' own rounding
    room = step * (1 + 2**bits * 2**-10) + x.abs().double() * torch.finfo(dtype).eps + grid[..., 1].abs().max() * 2**-11
    assert bool(((back.double() - x.double()).abs() <= room).all())
    every = torch.arange(2.0**bits)[None]
    assert torch.equal(dequantise(*quantise(every, bits, 2**bits), bits, torch.float32), every)


def test_packing_by_hand():
    """Two bits: 0, 1, 2, 3 fill one byte from its low end, 0 + 4 + 32 + 192; equal numbers have scale 0."""
    codes, grid = quantise(torch.tensor([[5.0, 6.0, 7.0, 8.0, 2.0, 2.0, 2.0, 2.0]]), 2, 4)
    assert codes.tolist() == [[228, 0]]
    assert grid.tolist() == [[[1.0, 5.0], [0.0, 2.0]]]
    codes, _ = quantise(torch.tensor([[0.0, 15.0, 7.0, 3.0]]), 4, 4)
    assert codes.tolist() == [[0 + 15 * 16, 7 + 3 * 16]]


def test_merging_by_hand():
    """One survivor along x; (3, 0) resembles it, (0, 2) does not and falls below the mean of 1 and 0."""
    keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]).view(1, 1, 3, 2)
    values = torch.tensor([[4.0, 0.0], [0.0, 4.0], [8.0, 8.0]]).view(1, 1, 3, 2)
    kept = torch.tensor([[[True, False, False]]])
    positions, most = torch.arange(3).view(1, 1, 3), torch.tensor([[2]])
    pairs = EvictedPairs(keys, values, positions, torch.ones(1, 1, 3).bool(), kept, most, 3, True, 0)
    layer = Merge().begin()
    changed = layer.take(pairs)
    assert layer.threshold.tolist() == [[0.5]]
    torch.testing.assert_close(changed["keys"][0, 0, 0], torch.tensor([2.0, 0.0]))  # weights e and e
    torch.testing.assert_close(changed["values"][0, 0, 0], torch.tensor([2.0, 2.0]))
    changed = MergeValues().begin().take(pairs)  # weight 1 * 4 / (4 + 4) against 1
    torch.testing.assert_close(changed["values"][0, 0, 0], torch.tensor([4.0, 2.0]) / 1.5)
    assert list(changed) == ["values"]


def test_dropping_is_the_default_and_costs_nothing():
    model = tiny()
    reference = MaskedReference(model)
    with EvictingCache(model, "h2o", 6) as cache:
        for piece in split(tokens(2, 22), 20, 1, 1):
            torch.testing.assert_close(feed(model, piece, cache), reference(piece), **EXACT)
            for layer in range(3):
                reference.hide(layer, cache.kept_positions(layer))
        assert cache.layers[0].state.tier.stored is None


def test_evaluate_compares_tiers():
    from kv_gym.evaluation import evaluate
    from kv_gym.evaluation.report import markdown
    from kv_gym.evaluation.tasks import TaskContext, TaskQuestion
    from kv_gym.traces import TraceSet

    model = tiny()
    ids = tuple(tokens(1, 30)[0].tolist())
    tasks = [TaskContext(ids, (TaskQuestion((3, 4), (5, 6)), TaskQuestion((7,), (8,))), "t")]
    tiers = ("drop", "bits:8", "bits:2:balanced", "merge")
    data = evaluate(["h2o"], [5], model=model, tasks=tasks, evicted=tiers, progress=False)
    rows = {row["evicted"]: row for row in data["rows"] if row["policy"] == "h2o"}
    assert set(rows) == set(tiers)
    for evicted, row in rows.items():
        with EvictingCache(model, "h2o", 5, evicted=evicted) as cache:
            feed(model, torch.tensor([ids]), cache)
            nll = []
            for question in tasks[0].questions:
                with cache.fork() as fork:
                    asked = torch.tensor([[*question.question_ids, *question.answer_ids]])
                    likelihood = feed(model, asked[:, :-1], fork).log_softmax(-1)[0, -len(question.answer_ids) :]
                    nll.append(-sum(likelihood[i, t] for i, t in enumerate(question.answer_ids)) / len(likelihood))
        assert row["nll"] == pytest.approx(float(sum(nll) / 2), abs=1e-5)
    assert "| h2o, uniform, bits:8 | 5 |" in markdown(data["rows"])
    with pytest.raises(UserError, match="replay knows what is kept"):
        evaluate(["h2o"], [5], traces=TraceSet.__new__(TraceSet), evicted=["merge"], progress=False)


def test_a_fork_may_have_another_tier():
    model = tiny()
    ids, question = tokens(1, 20), tokens(1, 4, seed=2)
    group = PolicyGroup((make_policy("h2o"), make_policy("knorm")))
    with EvictingCache(model, group, 1.0, evicted="bits:2:balanced") as full:
        feed(model, ids, full)
        for evicted in ("drop", *TIERS):
            with EvictingCache(model, "h2o", 5, evicted=evicted) as alone, full.fork("h2o", 5, evicted=evicted) as fork:
                feed(model, ids, alone)
                fork.compress()
                assert torch.equal(feed(model, question, alone), feed(model, question, fork))
    with EvictingCache(model, "h2o", 5, evicted="bits:4") as cache:
        feed(model, ids, cache)
        with pytest.raises(UserError, match="cannot treat them otherwise"):
            cache.fork(evicted="drop")
    with EvictingCache(model, "h2o", 1.0) as cache:
        feed(model, ids, cache)
        with pytest.raises(UserError, match="did not see"):
            cache.fork(evicted="bits:4:balanced")


def test_refusals():
    model = tiny()
    with pytest.raises(UserError, match="evicted='bits:3' is unknown; expected one of drop, merge"):
        EvictingCache(model, evicted="bits:3")
    for wrong in ("merge:most=3", "bits:4:most=", "bits:4:most=-1"):
        with pytest.raises(UserError, match="is unknown; expected one of drop, merge"):
            parse_tier(wrong)
    with pytest.raises(UserError, match="cannot keep 0 evicted pairs"):
        parse_tier("bits:4:most=0")
    with pytest.raises(UserError, match="in 3 bits; expected 2, 4 or 8"):
        LowPrecision(3)
    with pytest.raises(UserError, match="number from 1"):
        LowPrecision(4, 0)
    with pytest.raises(UserError, match="expected a number from 0 to 1"):
        Merge(1.5)
    with pytest.raises(UserError, match="heads have 8 channels"):
        EvictingCache(model, evicted=LowPrecision(2, group=3))
    assert parse_tier("drop") == Drop()
