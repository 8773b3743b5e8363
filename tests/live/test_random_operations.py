"""Any sequence of forwards, cuts, forks, crops, beams, saves, restores and resets equals a slow reference.

`KV_GYM_PROPERTY_RUNS=200 pytest tests/live/test_random_operations.py --hypothesis-seed=0` runs 200 sequences of 50
operations; the suite runs a few short ones, always the same. A sequence that fails is shrunk and printed as code.
"""

import os
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from live_models import LIVE, VOCABULARY, tiny
from row_reference import RowReference

from kv_gym import EvictingCache
from kv_gym.errors import UserError

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, assume, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

RUNS = int(os.environ.get("KV_GYM_PROPERTY_RUNS", "0"))
EXACT = {"rtol": 0, "atol": 1e-5}
LAYERS, MOST_ROWS, MOST_CACHES, LONGEST = 2, 4, 3, 150
MODEL = tiny(num_hidden_layers=LAYERS)
MIRROR = deepcopy(MODEL)  # for the reference
ALLOCATIONS = ("uniform", "global", "global:zscore", "global:softmax", "pyramid", "ada", "cake", "global+pyramid")
TRIGGERS = ("prefill", "every:1", "every:4", "lagged:3", "block:4")
TIERS = ("drop", "drop", "bits:4", "bits:8")


class RandomOperations(RuleBasedStateMachine):
    """Some caches of one history, each beside a reference for every row."""

    def __init__(self):
        super().__init__()
        self.caches = []  # (cache, references of its rows, columns of its attention mask)

    @initialize(
        policy=st.sampled_from(LIVE),
        allocation=st.sampled_from(ALLOCATIONS),
        trigger=st.sampled_from(TRIGGERS),
        tier=st.sampled_from(TIERS),
        budget=st.sampled_from([3, 6, 0.25, 0.5, 1.0]),
        protection=st.sampled_from([(None, None), (0, 0), (1, 2)]),
        offload=st.booleans(),
        rows=st.integers(1, 3),
    )
    def begin(self, policy, allocation, trigger, tier, budget, protection, offload, rows):
        sinks, recent = protection
        try:
            cache = EvictingCache(
                MODEL, policy, budget, allocation, trigger, sinks, recent, tier, offload=offload, positions="original"
            )
        except UserError:  # an allocation that cannot use the policy's scores, and so on
            assume(False)
        bits = int(tier.partition(":")[2]) if tier.startswith("bits") else None
        self.restored = False
        self.caches = [
            (cache, [RowReference(MIRROR, bits) for _ in range(rows)], torch.ones(rows, 0, dtype=torch.int64))
        ]

    def teardown(self):
        for cache, _, _ in self.caches:
            cache.detach()
        decoder = MODEL.get_decoder()
        assert "forward" not in vars(decoder) and not decoder._forward_hooks and not decoder._forward_pre_hooks

    # operations

    @precondition(lambda self: self.caches)
    @rule(
        which=st.integers(0, 9),
        seed=st.integers(0, 999),
        size=st.integers(1, 9),
        single=st.booleans(),
        pad=st.booleans(),
    )
    def forward(self, which, seed, size, single, pad):
        place = which % len(self.caches)
        cache, rows, mask = self.caches[place]
        draw = torch.Generator().manual_seed(seed)
        size += 0 if cache.seen else 8
        assume(cache.seen + size <= LONGEST)
        if cache.config.block_size:  # what is evicted within a forward cannot be seen from outside
            size = min(size, cache.config.block_size - self._waiting(cache))
        ids = torch.randint(0, VOCABULARY, (len(rows), size), generator=draw)
        new = torch.ones_like(ids)
        if pad and size > 1 and not cache.config.block_size:
            padding = torch.randint(0, size, (len(rows), 1), generator=draw)
            new = (torch.arange(size) >= padding).long()
        mask = torch.cat((mask, new), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -size:]
        before = self._kept(cache)
        past = [len(row.tokens) for row in rows]
        with torch.no_grad():
            logits = MODEL(ids, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
        for row, reference in enumerate(rows):
            real = new[row].bool()
            torch.testing.assert_close(logits[row, real], reference.logits(ids[row, real].tolist()), **EXACT)
        self.caches[place] = cache, rows, mask
        self._follow(cache, rows)
        self._check(cache, rows, before, past)

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9))
    def compress(self, which):
        cache, rows, _ = self.caches[which % len(self.caches)]
        assume(cache.seen)
        cache.compress()
        self._follow(cache, rows)

    @precondition(lambda self: 0 < len(self.caches) < MOST_CACHES)
    @rule(which=st.integers(0, 9), budget=st.sampled_from([None, 2, 5, 0.5]))
    def fork(self, which, budget):
        cache, rows, mask = self.caches[which % len(self.caches)]
        twin, copies = cache.fork(budget=budget), [row.fork() for row in rows]
        if budget is not None:  # which holds from the next cut on
            for row, at in zip(copies, self._last_cuts(twin), strict=bool(twin.seen)):
                row.uncut_since = (at,)
        self.caches.append((twin, copies, mask))

    @precondition(lambda self: len(self.caches) > 1)
    @rule(which=st.integers(0, 9))
    def drop(self, which):
        self.caches.pop(which % len(self.caches))[0].detach()

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9), count=st.integers(0, 5))
    def crop(self, which, count):
        place = which % len(self.caches)
        cache, rows, mask = self.caches[place]
        assume(cache.seen > count and bool(mask[:, mask.shape[1] - count :].all()))
        try:
            cache.crop(-count)
        except UserError:  # evicted since, or remembered
            return
        for row in rows:
            row.crop(count)
        self.caches[place] = cache, rows, mask[:, : mask.shape[1] - count]
        self._follow(cache, rows)

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9), seed=st.integers(0, 99), how=st.sampled_from(["beams", "select", "repeat"]))
    def change_rows(self, which, seed, how):
        place = which % len(self.caches)
        cache, rows, mask = self.caches[place]
        draw = torch.Generator().manual_seed(seed)
        assume(cache.seen)
        if how == "beams":
            indices = torch.randint(0, len(rows), (len(rows),), generator=draw)
            cache.reorder_cache(indices)
        elif how == "select":
            indices = torch.randperm(len(rows), generator=draw)[: 1 + seed % len(rows)]
            cache.batch_select_indices(indices)
        else:
            assume(2 * len(rows) <= MOST_ROWS)
            indices = torch.arange(len(rows)).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        self.caches[place] = cache, [rows[i].fork() for i in indices.tolist()], mask[indices]
        self._follow(cache, self.caches[place][1])

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9))
    def save_and_load(self, which):
        place = which % len(self.caches)
        cache, rows, mask = self.caches[place]
        assume(cache.seen and cache.config.layer_tier.name == "drop")
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache.safetensors")
            loaded = EvictingCache.load(Path(folder) / "cache.safetensors", MODEL)
        assert loaded.config.budget == cache.config.budget and loaded.seen == cache.seen
        cache.detach()
        self.caches[place] = loaded, rows, mask

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9))
    def restore(self, which):
        cache, rows, _ = self.caches[which % len(self.caches)]
        assume(cache.seen)
        try:
            cache.restore()
        except UserError:
            assert not cache.config.offload
            return
        assert [set(range(len(row.tokens))) for row in rows] == [kept[0][0] for kept in self._kept(cache)]
        self._follow(cache, rows)

    @precondition(lambda self: self.caches)
    @rule(which=st.integers(0, 9), really=st.integers(0, 4))
    def reset(self, which, really):
        assume(really == 0)
        place = which % len(self.caches)
        cache, rows, mask = self.caches[place]
        cache.reset()
        assert cache.seen == 0 and cache.nbytes() == 0
        self.caches[place] = cache, [RowReference(MIRROR, row.bits) for row in rows], mask[:, :0]

    # what must hold

    def _kept(self, cache):
        """Row -> layer -> KV head -> set of positions."""
        if not cache.seen:
            return None
        layers = [cache.kept_positions(layer).tolist() for layer in range(LAYERS)]
        return [
            [[{p for p in head if p >= 0} for head in layer[row]] for layer in layers] for row in range(len(layers[0]))
        ]

    def _follow(self, cache, rows):
        for row, kept in zip(rows, self._kept(cache) or (), strict=bool(cache.seen)):
            row.cut(kept)

    def _last_cuts(self, cache):
        """For each row, how many tokens it had when it was last cut."""
        return list(cache.layers[0].state.evicted_at) if cache.seen else []

    def _waiting(self, cache):
        state = cache.layers[0].state
        return max([seen - (at or 0) for seen, at in zip(state.tokens_seen, state.evicted_at, strict=True)], default=0)

    def _check(self, cache, rows, before, past):
        """What was evicted stays away, and no head or model holds more than its budget and what came since."""
        config = cache.config
        for row, kept in enumerate(self._kept(cache)):
            length = len(rows[row].tokens)
            for layer in range(LAYERS):
                for head, now in enumerate(kept[layer]):
                    earlier = before[row][layer][head] if before else set()
                    assert now <= earlier | set(range(past[row], length))
            if rows[row].uncut_since == (self._last_cuts(cache)[row],):
                continue
            if config.trigger.every and not config.keeps_everything:
                most = max(config.slots_after(length), 1) + config.trigger.every + config.trigger.lag
                sizes = [len(head) for layer in kept for head in layer]
                note(f"{length} tokens, {sizes} slots, at most {most}")
                limit = len(sizes) * most if config.allocation.name != "uniform" else most
                assert (sum(sizes) if config.allocation.name != "uniform" else max(sizes)) <= limit


RandomOperations.TestCase.settings = settings(
    max_examples=RUNS or 12,
    stateful_step_count=50 if RUNS else 10,
    deadline=None,
    database=None,
    derandomize=not RUNS,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.filterwarnings("ignore:Using `assume` outside")
TestRandomOperations = pytest.mark.timeout(0 if RUNS else 300)(RandomOperations.TestCase)


# sequences that failed once


def test_a_fork_holds_what_it_held_until_its_next_cut():
    sizes = []
    with torch.no_grad(), EvictingCache(MODEL, "cake", 6, trigger="every:4") as cache:
        MODEL(torch.arange(9)[None], past_key_values=cache)
        with cache.fork(budget=2) as fork:
            for _ in range(4):
                MODEL(torch.tensor([[5]]), past_key_values=fork)
                sizes.append(int(fork.kept().max()))
    assert sizes == [7, 8, 9, 2]


def test_a_fork_is_saved():
    state = RandomOperations()
    state.begin("cake", "uniform", "prefill", "drop", 3, (None, None), False, 1)
    state.forward(0, 0, 2, False, True)
    state.fork(0, None)
    state.save_and_load(1)
    state.teardown()


def test_padding_after_the_rows_were_repeated():
    state = RandomOperations()
    state.begin("cake", "uniform", "prefill", "drop", 3, (None, None), False, 1)
    state.forward(0, 0, 1, False, False)
    state.change_rows(0, 0, "repeat")
    state.forward(0, 0, 2, False, True)
    state.change_rows(0, 0, "repeat")
    state.forward(0, 0, 2, False, True)
    state.teardown()
