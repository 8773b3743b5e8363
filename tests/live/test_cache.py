"""The cache as an object: memory, forks, batches, reset, and equality with DynamicCache."""

import copy
from dataclasses import dataclass

import pytest
import torch
from live_models import LIVE, feed, prefilled, tiny, tokens
from transformers import DynamicCache

from kv_gym import EvictingCache, make_policy
from kv_gym.errors import UserError
from kv_gym.live import CacheConfig, Guard, PolicyGroup
from kv_gym.policies import Policy

KEY_BYTES = VALUE_BYTES = 8 * 8  # head_dim 8, float64
SLOT_BYTES = KEY_BYTES + VALUE_BYTES + 8  # and an int64 position
PIECES = [tokens(3, size, seed=size) for size in (20, 1, 5, 1)]
LATER = [tokens(3, 4, seed=40), tokens(3, 1, seed=41)]


def storages(cache):
    """Bytes of the distinct storages behind all tensors that are reachable from the cache's layers, but for weights."""
    found, todo, visited = {}, list(cache.layers), set()
    while todo:
        item = todo.pop()
        if id(item) in visited or isinstance(item, torch.nn.Parameter | Policy | CacheConfig):
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            todo += vars(item).values()
    return sum(found.values())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_memory_is_freed(family):
    model = tiny(family)
    cache = prefilled(model, "knorm", 8, n=400, batch=2)
    exact = 3 * 2 * 2 * 8 * SLOT_BYTES  # layers, rows, heads, slots
    assert cache.nbytes() == storages(cache) == exact
    feed(model, tokens(2, 1), cache)
    with_slack = 3 * 2 * 2 * (8 + 16) * SLOT_BYTES  # a grown buffer has room for 16 new ones
    assert cache.nbytes() == storages(cache) == with_slack
    for step in range(15):
        feed(model, tokens(2, 1, seed=step), cache)
    assert cache.nbytes() == storages(cache) == with_slack
    cache.compress()
    assert cache.nbytes() == storages(cache) == exact


def test_state_and_queries_are_counted():
    model = tiny()
    assert prefilled(model, "h2o", 8).nbytes() == 3 * 2 * 8 * (SLOT_BYTES + 4)  # float32 mass
    assert prefilled(model, "tova", 8).nbytes() == 3 * (2 * 8 * SLOT_BYTES + 4 * KEY_BYTES)  # one query of 4 heads


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_an_uncompressed_cache_holds_no_foreign_memory(family):
    model = tiny(family)
    cache = prefilled(model, "recency", 1.0, n=20)
    heads = 4 if family == "gpt_neox" else 2
    assert cache.nbytes() == storages(cache) == 3 * heads * 20 * SLOT_BYTES


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("budget", [1.0, 1000])
def test_a_budget_of_all_equals_dynamic_cache(family, attention, budget):
    model = tiny(family, attention)
    pieces = torch.split(tokens(2, 30), [20, 1, 1, 6, 2], 1)
    full = DynamicCache(config=model.config)
    expected = [feed(model, piece, full) for piece in pieces]
    with EvictingCache(model, "h2o", budget, trigger="every:2") as cache:
        for piece, each in zip(pieces, expected, strict=True):
            torch.testing.assert_close(feed(model, piece, cache), each, rtol=0, atol=1e-12)
        last = cache.evicting_layers[-1]
        assert torch.equal(cache.kept_positions(last)[0, 0], torch.arange(30))
        assert torch.equal(cache.layers[last].keys, full.layers[last].keys)


def test_a_fork_is_independent():
    model = tiny("gemma3")
    cache = prefilled(model, "h2o", 8, trigger="every:4")
    question = tokens(1, 6, seed=1)
    held, kept, size = cache.nbytes(), cache.kept_positions(1), storages(cache)
    fork, twin = cache.fork(), copy.deepcopy(cache)
    mine = {t.untyped_storage().data_ptr() for t in cache._tensors()}
    assert not mine & {t.untyped_storage().data_ptr() for t in fork._tensors()}
    answer = feed(model, question, fork)
    for step in range(9):
        feed(model, tokens(1, 1, seed=step), fork)
    assert (cache.seen, cache.nbytes(), storages(cache)) == (32, held, size)
    assert torch.equal(cache.kept_positions(1), kept)
    assert torch.equal(feed(model, question, cache), answer)
    fork.reset()
    assert fork.seen == 0
    assert torch.equal(feed(model, question, twin), answer)


def test_one_prefill_serves_a_group_of_policies():
    model = tiny()
    policies = [make_policy(name) for name in ("h2o", "snapkv", "tova", "knorm", "keydiff")]
    full = prefilled(model, PolicyGroup(tuple(policies)), 1.0, batch=2)
    with pytest.raises(UserError, match="a policy group does not score"):
        full.fork(budget=0.5).compress()
    for policy in policies:
        alone = prefilled(model, policy, 0.25, batch=2)
        with full.fork(policy=policy, budget=0.25) as fork:
            fork.compress()
            assert fork.nbytes() == alone.nbytes()
            for layer in range(3):
                assert torch.equal(fork.kept_positions(layer), alone.kept_positions(layer))
    assert full.kept_positions(0).shape == (2, 2, 32)
    other = full.fork(policy="recency", budget=6, recent=2, sinks=3)
    other.compress()
    assert other.kept_positions(0)[0, 0].tolist() == [0, 1, 2, 29, 30, 31]


def test_a_fork_needs_what_was_kept():
    model = tiny()
    cache = prefilled(model, "knorm", 1.0)
    for policy in ("h2o", "snapkv"):
        with pytest.raises(UserError, match=f"did not keep what policy '{policy}' needs"):
            cache.fork(policy=policy)


def test_rows_can_be_repeated_selected_and_reordered():
    model = tiny()
    cache = prefilled(model, "h2o", 8, batch=2, trigger="every:4")
    question = tokens(2, 6, seed=1)
    expected = feed(model, question, cache.fork())
    repeated = cache.fork()
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(feed(model, question.repeat_interleave(2, 0), repeated)[::2], expected)
    picked = cache.fork()
    picked.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(feed(model, question[1:], picked), expected[1:])
    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(feed(model, question.flip(0), swapped), expected.flip(0))
    for layer in range(3):  # state and positions went along, so both choose alike again
        assert torch.equal(picked.kept_positions(layer)[0], repeated.kept_positions(layer)[2])
        assert torch.equal(picked.kept_positions(layer)[0], swapped.kept_positions(layer)[0])


def test_beam_search_runs_and_one_beam_is_greedy():
    model = tiny()
    ids = tokens(2, 24)
    greedy, one, many = (
        model.generate(ids, past_key_values=EvictingCache(model, "h2o", 8), max_new_tokens=5, do_sample=False, **beams)
        for beams in ({}, {"num_beams": 1}, {"num_beams": 3})
    )
    assert torch.equal(greedy, one)
    assert many.shape == greedy.shape


def test_reset_begins_anew():
    model = tiny()
    ids = tokens(1, 20)
    cache = EvictingCache(model, "tova", 6)
    first = feed(model, ids, cache), cache.kept_positions(2)
    cache.reset()
    assert (cache.seen, cache.nbytes()) == (0, 0)
    again = feed(model, ids, cache), cache.kept_positions(2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_prefill_under_inference_mode():
    model = tiny()
    cache = EvictingCache(model, "h2o", 8, trigger="every:4")
    expected = EvictingCache(model, "h2o", 8, trigger="every:4")
    for step, size in enumerate((20, 1, 1, 1, 1, 2, 1)):
        piece = tokens(1, size, seed=step)
        with torch.inference_mode(step < 2):
            got = model(piece, past_key_values=cache).logits
        assert torch.equal(got, feed(model, piece, expected))


def test_nothing_of_the_graph_is_held():
    model = tiny()
    cache = EvictingCache(model, "h2o", 8)
    out = model(tokens(1, 20), past_key_values=cache).logits
    assert out.requires_grad
    assert not any(tensor.requires_grad for tensor in cache._tensors())


def read_pieces(model, name, rows):
    """A cache that has read the first pieces in these rows, evicting on the way."""
    cache = EvictingCache(model, name, 9, trigger="every:3", recent=2)
    for piece in PIECES:
        feed(model, piece[rows], cache)
    return cache


def read_later(model, cache, rows):
    """What the later pieces give, and what is kept after them."""
    logits = [feed(model, piece[rows], cache) for piece in LATER]
    return *logits, *(cache.kept_positions(layer) for layer in cache.evicting_layers)


@pytest.mark.parametrize("name", LIVE)
def test_forks_beams_and_reset_equal_a_fresh_cache(name):
    model = tiny("qwen3")
    everybody, beams = [0, 1, 2], [2, 0, 0]
    with read_pieces(model, name, everybody) as cache, cache.fork() as fork, cache.fork() as searched:
        expected = read_later(model, cache, everybody)
        assert all(
            torch.equal(one, other) for one, other in zip(read_later(model, fork, everybody), expected, strict=True)
        )

        searched.reorder_cache(torch.tensor(beams))
        with read_pieces(model, name, beams) as fresh:
            for one, other in zip(read_later(model, searched, beams), read_later(model, fresh, beams), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

        cache.reset()
        for piece in PIECES:
            feed(model, piece, cache)
        assert all(
            torch.equal(one, other) for one, other in zip(read_later(model, cache, everybody), expected, strict=True)
        )


@pytest.mark.parametrize("guard", [Guard("missing", 0.0, then="enlarge"), Guard("missing", 0.0, then="restore")])
def test_reset_brings_back_budget_and_alarms(guard):
    model = tiny()
    with EvictingCache(model, "keydiff", 6, trigger="every:2", offload=True, guard=guard) as cache:
        first = [feed(model, ids, cache) for ids in (tokens(1, 20), tokens(1, 2))]
        assert cache.monitor.alarms == 1 and cache.config.budget != 6
        cache.reset()
        assert (cache.monitor.alarms, cache.monitor.signal, cache.config.budget) == (0, None, 6)
        again = [feed(model, ids, cache) for ids in (tokens(1, 20), tokens(1, 2))]
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_reset_after_restore_evicts_again():
    model = tiny()
    with EvictingCache(model, "knorm", 6, offload=True) as cache:
        feed(model, tokens(1, 20), cache)
        cache.restore()
        fork = cache.fork()
        for each in (cache, fork):
            assert each.kept().eq(20).all()
            each.reset()
            feed(model, tokens(1, 20), each)
            assert each.kept().eq(6).all()
        cache.set_budget(4)
        cache.reset()
        feed(model, tokens(1, 20), cache)
        assert cache.kept().eq(4).all()


@dataclass(frozen=True)
class HiddenNorm(Policy):
    """Scores tokens by the size of their hidden states."""

    scale: float = 1.0
    needs_hidden = True
    static = True

    def score(self, view):
        return self.scale * view.hidden.norm(dim=-1)[:, None].expand(view.positions.shape)


@pytest.mark.parametrize("group", [False, True])
def test_a_fork_with_an_equal_policy_of_hidden_states(group):
    """Stored scores are found by equality of policies, as state and queries are."""
    model = tiny()
    policy = PolicyGroup((make_policy("knorm"), HiddenNorm())) if group else HiddenNorm()
    full = prefilled(model, policy, 1.0)
    direct = prefilled(model, HiddenNorm(), 7)
    with full.fork(policy=HiddenNorm(), budget=7) as fork:
        fork.compress()
        for layer in range(3):
            assert torch.equal(fork.kept_positions(layer), direct.kept_positions(layer))
    with pytest.raises(UserError, match="did not keep what policy"):
        full.fork(policy=HiddenNorm(2.0))


def test_old_names_work_and_warn():
    import kv_gym.live
    import kv_gym.live.safety
    from kv_gym.live.guard import GuardMonitor

    with pytest.warns(DeprecationWarning, match="PolicyGroup"):
        assert kv_gym.live.Panel is PolicyGroup
    with pytest.warns(DeprecationWarning, match="GuardMonitor"):
        assert kv_gym.live.safety.SafetyNet is GuardMonitor
    cache = prefilled(tiny(), "kvzip", 1.0, guard=Guard())
    with pytest.warns(DeprecationWarning, match="EvictingCache.net is now called monitor"):
        assert cache.net is cache.monitor
    with pytest.warns(DeprecationWarning, match="EvictingCache.eviction is now called config"):
        assert cache.eviction is cache.config
    with pytest.warns(DeprecationWarning, match="read_again is now called run_second_reading"):
        cache.read_again()
    assert cache.layers[0].state.unread is None
    with pytest.warns(DeprecationWarning, match="adopt_budget is now called set_budget"):
        cache.adopt_budget(4)
    assert cache.config.budget == 4
