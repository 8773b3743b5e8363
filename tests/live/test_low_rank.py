"""The tier that absorbs evicted pairs into a low-rank state (LESS), against its parallel form over a full cache."""

import pytest
import torch
from less_reference import LessReference, phi, psi, state_for
from live_models import feed, padded_and_alone, tiny, tokens

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live import Guard
from kv_gym.live.ragged_attention import attend_absorbed
from kv_gym.live.slots import EqualSlots
from kv_gym.live.tiers import EvictedPairs, parse_tier

EXACT = {"rtol": 0, "atol": 1e-6}


@torch.no_grad()
def compare(model, cache, kernels, sizes, batch=2):
    reference = LessReference(model, kernels)
    for piece in torch.split(tokens(batch, sum(sizes)), sizes, 1):
        torch.testing.assert_close(model(piece, past_key_values=cache).logits, reference(piece), **EXACT)
        for layer in cache.evicting_layers:
            reference.hide(layer, cache.kept_positions(layer))


@pytest.mark.parametrize(
    ("family", "attention", "policy", "settings", "sizes"),
    [
        ("llama", "sdpa", "h2o", {}, (20, 5, 1, 1, 1)),
        ("qwen2", "sdpa", "h2o", {"trigger": "every:3", "allocation": "global:zscore"}, (20, 1, 1, 1, 1, 3, 6, 1)),
        ("gpt_neox", "sdpa", "keydiff", {"trigger": "block:8"}, (8, 8, 8, 3, 5, 8)),
        ("llama", "sdpa", "snapkv", {"trigger": "every:1", "allocation": "ada"}, (12, 1, 1, 4, 1)),
    ],
)
def test_the_state_equals_attention_to_every_evicted_pair(family, attention, policy, settings, sizes):
    """Recurrent and parallel form, with every evicted pair in the sum and each with its own weight."""
    model = tiny(family, attention)
    state = state_for(model)
    with EvictingCache(model, policy, 6, sinks=1, recent=1, evicted=state, **settings) as cache:
        compare(model, cache, state.kernels, sizes)


def test_the_reference_tells_states_apart():
    model = tiny()
    with EvictingCache(model, "knorm", 6, evicted=state_for(model)) as cache, pytest.raises(AssertionError):
        compare(model, cache, state_for(model, scale=0.9).kernels, (20, 1))


def test_kernels_that_absorb_nothing_drop():
    model, pieces = tiny(), torch.split(tokens(2, 30), (20, 1, 1, 8), 1)
    nothing = state_for(model, scale=0.0)
    for settings in ({}, {"trigger": "every:2", "allocation": "global:zscore"}):
        with (
            EvictingCache(model, "h2o", 6, evicted=nothing, **settings) as cache,
            EvictingCache(model, "h2o", 6, **settings) as dropping,
        ):
            for piece in pieces:
                torch.testing.assert_close(feed(model, piece, cache), feed(model, piece, dropping), rtol=0, atol=1e-12)
            assert torch.equal(cache.kept(), dropping.kept())
            places = 3 * 2 * 2  # layers, rows and KV heads, with R = 4 and d = 8 in float64
            assert cache.nbytes() - dropping.nbytes() == places * 4 * (8 + 1) * 8


def test_merge_by_hand():
    """Two absorbed pairs of psi (1, 0) and (0, 2), values 2 and 4; phi (1, 1/2): both weigh 1. One kept pair: 2."""
    sums, mass, weights = torch.tensor([[2.0], [8.0]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])
    logit, value = (weights @ mass).log(), weights @ sums / (weights @ mass)
    one = torch.ones(1, 1, 1, 1)
    slots = EqualSlots().append({"keys": one * 2, "values": one, "positions": torch.zeros(1, 1, 1).long()}, 0)
    out = attend_absorbed(
        one, slots, float(torch.tensor(2.0).log()) / 2, lambda query: (logit.view(1, 1, 1), value.view(1, 1, 1, 1)),
        torch.zeros(1, 1).long(),
    )  # fmt: skip
    assert float(out) == pytest.approx((1 * 2 + 1 * 4 + 2 * 1) / 4) == 2


def test_absorbing_in_parts_and_the_formulas():
    """The sums of two evictions are those of one, head by head from the paper's formulas."""
    model = tiny()
    state = state_for(model)
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 9, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    positions = torch.arange(9).expand(1, 2, 9)
    goes = torch.zeros(1, 2, 9, dtype=torch.bool)
    goes[0, 0, :5], goes[0, 1, 3:6] = True, True  # five pairs of one head, three of the other

    def absorbed(*parts):
        layer = state.begin(1)
        for part in parts:
            layer.take(EvictedPairs(keys, values, positions, torch.ones_like(goes), ~part, part.sum(2), 9, False, 16))
        return layer.sums, layer.mass

    early = positions < 4
    sums, mass = absorbed(goes)
    for found, expected in zip(absorbed(goes & early, goes & ~early), (sums, mass), strict=True):
        torch.testing.assert_close(found, expected)
    for head in range(2):
        features = psi(state.kernels[1], head, keys[0, head, goes[0, head]])
        torch.testing.assert_close(mass[0, head], features.sum(0))
        torch.testing.assert_close(sums[0, head], features.T @ values[0, head, goes[0, head]])
    assert bool((mass >= 0).all()) and sums.dtype == torch.float64
    query = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    layer = state.begin(1)
    layer.sums, layer.mass = sums, mass
    logit, value = layer.absorbed(query)
    weight = phi(state.kernels[1], 3, query[0, 3]) @ mass[0, 1]  # of the second query head of the second group
    torch.testing.assert_close(logit[0, 3], weight.log())
    torch.testing.assert_close(value[0, 3, 0], phi(state.kernels[1], 3, query[0, 3])[0] @ sums[0, 1] / weight)


@pytest.mark.parametrize("settings", [{"trigger": "block:4"}, {"allocation": "global:zscore"}])
def test_a_padded_row_equals_the_row_alone(settings):
    model = tiny()
    settings = {"policy": "h2o", "budget": 0.5, "recent": 1, "evicted": state_for(model)} | settings
    for together, alone in padded_and_alone(model, (16, 4, 1, 3), **settings):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


def test_forks_rows_crops_and_reset():
    model = tiny()
    state = state_for(model)
    settings = {"policy": "h2o", "budget": 6, "trigger": "every:4", "evicted": state}
    question = tokens(2, 3, seed=1)
    with EvictingCache(model, **settings) as cache:
        begin = feed(model, tokens(2, 20), cache)
        with cache.fork() as fork, cache.fork() as swapped, cache.fork() as repeated:
            expected = feed(model, question, fork)
            swapped.reorder_cache(torch.tensor([1, 0]))
            torch.testing.assert_close(feed(model, question.flip(0), swapped).flip(0), expected)
            repeated.batch_repeat_interleave(2)
            torch.testing.assert_close(feed(model, question.repeat_interleave(2, 0), repeated)[1::2], expected)
        torch.testing.assert_close(feed(model, question, cache), expected)  # forks changed nothing here
        with pytest.raises(UserError, match="in a low-rank state, and a fork cannot treat them otherwise"):
            cache.fork(evicted="drop")
        with pytest.raises(UserError, match="cannot be cropped by the newest 6 tokens"):
            cache.crop(-6)  # back into what was absorbed
        cache.reset()
        assert cache.nbytes() == 0
        assert torch.equal(feed(model, tokens(2, 20), cache), begin)
    with EvictingCache(model, "knorm", 6, evicted=state) as cache:
        feed(model, tokens(1, 12), cache)
        drafts = feed(model, tokens(1, 4, seed=3), cache)
        cache.crop(-4)  # came after the eviction: the state knows nothing of them
        torch.testing.assert_close(feed(model, tokens(1, 4, seed=3), cache), drafts)


def test_restore_forgets_what_was_absorbed():
    model = tiny()
    state = state_for(model)
    with (
        EvictingCache(model, "h2o", 6, evicted=state, offload=True, guard=Guard("missing")) as cache,
        EvictingCache(model, "h2o", 1.0) as full,
    ):
        for kept in (cache, full):
            feed(model, tokens(1, 20), kept)
        cache.restore()
        torch.testing.assert_close(feed(model, tokens(1, 3), cache), feed(model, tokens(1, 3), full))


def test_a_cache_is_saved_with_its_state(tmp_path):
    model = tiny()
    folder = state_for(model).save_pretrained(tmp_path / "state")
    evicted, file = f"less:{folder}", tmp_path / "cache.safetensors"
    with EvictingCache(model, "h2o", 6, evicted=evicted) as cache:
        feed(model, tokens(1, 20), cache)
        cache.save(file)
        with EvictingCache.load(file, model, evicted=evicted) as loaded:
            assert torch.equal(feed(model, tokens(1, 3), loaded), feed(model, tokens(1, 3), cache))
    with pytest.raises(UserError, match=r"has a state that kernels were trained for: give them as evicted="):
        EvictingCache.load(file, model)
    with pytest.raises(UserError, match="was saved with another tier than evicted='less'"):
        EvictingCache.load(file, model, evicted=state_for(model, 0.5))
    with EvictingCache(model, "h2o", 6, evicted=evicted) as cache:  # nothing absorbed yet
        feed(model, tokens(1, 5), cache)
        with EvictingCache.load(cache.save(file), model, evicted=evicted) as loaded:
            assert torch.equal(feed(model, tokens(1, 9), loaded), feed(model, tokens(1, 9), cache))


def test_kernels_in_a_folder(tmp_path):
    model = tiny()
    state = state_for(model)
    folder = state.save_pretrained(tmp_path / "state")
    tier = parse_tier(f"less:{folder}")
    assert tier == state and tier.name == f"less:{folder}" and tier.weight_bytes == state.weight_bytes > 0
    with pytest.raises(UserError, match="was made for a model with weights hash"):
        EvictingCache(tiny(seed=1), evicted=tier)
    with pytest.raises(UserError, match=r"holds no state.json; expected a folder that `kv-gym train-less` wrote"):
        parse_tier("less:nowhere")
    with pytest.raises(UserError, match="holds other files and no trained state"):
        state.save_pretrained(tmp_path)
    damaged = bytearray((folder / "state.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "state.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match="was changed or damaged; train the state again"):
        parse_tier(f"less:{folder}")
    with pytest.raises(UserError, match="chooses among full-precision slots alone"):
        EvictingCache(model, "keydiff", evicted=state, select="quest:0.5")
    with pytest.raises(UserError, match="positions='cache' moves kept tokens together"):
        EvictingCache(model, "keydiff", evicted=state, positions="cache")
