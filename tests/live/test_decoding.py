"""Every way of generating, against a full cache under masks, rows alone, or a beam search written by hand."""

import pytest
import torch
from live_models import VERSION, VOCABULARY, feed, tiny, tokens
from masked_reference import MaskedReference
from transformers import Cache

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.live.config import CacheConfig
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies.scorer import GroupedScorer, Scorer

EXACT = {"rtol": 0, "atol": 1e-5}
UNIFORM = {"policy": "h2o", "budget": 0.5, "trigger": "every:3", "recent": 2}
RAGGED = {"policy": "h2o", "budget": 0.4, "allocation": "global", "trigger": "every:2", "sinks": 1, "recent": 1}
SETTINGS = {"uniform": UNIFORM, "global": RAGGED}
LAYERS = range(3)
both = pytest.mark.parametrize("settings", SETTINGS)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
chunks_work = pytest.mark.skipif(
    VERSION.release < (5, 4), reason="transformers gave every chunk the positions of the last one before 5.4"
)


def cache_of(model, settings, **changes):
    return EvictingCache(model, **{**SETTINGS.get(settings, {}), **changes})


class Transcript:
    """What came into a cache, forward by forward, and what every head held before."""

    def __init__(self, cache):
        self.forwards, check = [], cache.before_forward

        def watched(arguments):
            held = [cache.kept_positions(layer) for layer in LAYERS] if cache.seen else None
            self.forwards.append((arguments["input_ids"].clone(), held))
            check(arguments)

        cache.before_forward = watched

    def reference_logits(self, model):
        """Logits of the last token of every forward, from a cache that keeps all and masks what was not held."""
        reference, last = MaskedReference(model), []
        for ids, held in self.forwards:
            for layer in LAYERS if held else ():
                reference.hide(layer, held[layer])
            last.append(reference(ids)[:, -1])
        return last


def generated(model, ids, cache, new=8, **how):
    """Generate with all logits kept."""
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0} | how
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=new, output_logits=True, return_dict_in_generate=True, **how
    )


@every_attention
@both
def test_greedy(settings, attention):
    model, ids = tiny("llama", attention), tokens(2, 24)
    with cache_of(model, settings) as cache:
        transcript = Transcript(cache)
        out = generated(model, ids, cache)
        expected = transcript.reference_logits(model)
        assert len(out.logits) == len(expected) == 8
        for got, wanted in zip(out.logits, expected, strict=True):
            torch.testing.assert_close(got.double(), wanted, **EXACT)
        chosen = torch.stack([wanted.argmax(-1) for wanted in expected], 1)
        assert torch.equal(out.sequences[:, 24:], chosen)
        spread = cache.kept().flatten()
        assert spread.max() < cache.seen == 31
        assert (spread.unique().numel() > 1) == (settings == "global")


@every_attention
@both
def test_sampling_and_several_sequences(settings, attention):
    """The same seed draws the same tokens from the reference's logits; three sequences of each of two prompts."""
    model, ids = tiny("llama", attention), tokens(2, 24)
    with cache_of(model, settings) as cache:
        transcript = Transcript(cache)
        torch.manual_seed(3)
        more = {"do_sample": True, "temperature": 4.0, "top_k": 0, "num_return_sequences": 3}
        out = generated(model, ids, cache, **more)
        assert out.sequences.shape == (6, 32)
        expected = transcript.reference_logits(model)
        torch.manual_seed(3)
        drawn = torch.cat([torch.multinomial((each.float() / 4).softmax(-1), 1) for each in expected], 1)
        assert torch.equal(out.sequences[:, 24:], drawn)
        assert not torch.equal(drawn[0], drawn[1])


@torch.no_grad()
def beams_by_hand(model, ids, cache, beams, new):
    """Best `beams` continuations of one prompt and their mean log-probabilities; every beam has a cache of its own."""
    alive = [(0.0, [], cache.fork(), model(ids, past_key_values=cache).logits[0, -1])]
    alive = [(0.0, [], cache.fork(), alive[0][3])]
    for step in range(new):
        grown = []
        for place, (score, chosen, _, logits) in enumerate(alive):
            ahead = score + logits.float().log_softmax(-1)
            grown += [(float(ahead[token]), place, [*chosen, token]) for token in range(VOCABULARY)]
        grown = sorted(grown, key=lambda each: -each[0])[:beams]
        following = []
        for score, place, chosen in grown:
            mine = alive[place][2].fork()
            logits = model(torch.tensor([chosen[-1:]]), past_key_values=mine).logits[0, -1] if step + 1 < new else None
            following.append((score, chosen, mine, logits))
        for old in alive:
            old[2].detach()
        alive = following
    for each in alive:
        each[2].detach()
    return [(chosen, score / new) for score, chosen, _, _ in alive]


@every_attention
@both
@pytest.mark.parametrize("padded", [False, True])
def test_beam_search(padded, settings, attention):
    model, ids, sizes, new = tiny("llama", attention), tokens(2, 18), (11 if padded else 18, 18), 6
    mask = torch.stack([torch.arange(18) >= 18 - size for size in sizes]).long()
    with cache_of(model, settings) as cache:
        beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.0, "output_scores": True}
        out = generated(model, ids, cache, new, attention_mask=mask, **beams)
        assert cache.seen == 23
    for row, size in enumerate(sizes):
        with cache_of(model, settings) as alone:
            best = beams_by_hand(model, ids[row : row + 1, 18 - size :], alone, 3, new)
        for rank in range(2):
            assert out.sequences[2 * row + rank, 18:].tolist() == best[rank][0]
            assert float(out.sequences_scores[2 * row + rank]) == pytest.approx(best[rank][1], abs=1e-4)


@every_attention
@both
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_two_turns_of_a_padded_batch(family, settings, attention):
    """Three rows padded on the left, then a question for each, padded too: every row as alone, in tokens and logits."""
    model, sizes = tiny(family, attention), (5, 12, 20)
    # transformers counts padding between two turns as a part of a sliding window
    asked = (6, 6, 6) if family == "gemma3" else (3, 6, 1)
    ids, questions = tokens(3, 20), tokens(3, 6, seed=1)
    mask = torch.stack([torch.arange(20) >= 20 - size for size in sizes]).long()
    with cache_of(model, settings) as cache:
        first = generated(model, ids, cache, 5, attention_mask=mask)
        longer = torch.cat((first.sequences, questions), 1)
        more = torch.stack([torch.arange(6) >= 6 - size for size in asked]).long()
        mask = torch.cat((mask, torch.ones(3, 5, dtype=torch.long), more), 1)
        second = generated(model, longer, cache, 5, attention_mask=mask)
        assert cache.seen == 35
    for row in range(3):
        with cache_of(model, settings) as alone:
            begun = generated(model, ids[row : row + 1, 20 - sizes[row] :], alone, 5)
            assert begun.sequences[0, sizes[row] :].tolist() == first.sequences[row, 20:].tolist()
            whole = torch.cat((begun.sequences, questions[row : row + 1, 6 - asked[row] :]), 1)
            ended = generated(model, whole, alone, 5)
        assert ended.sequences[0, -5:].tolist() == second.sequences[row, -5:].tolist()
        for step in range(5):
            torch.testing.assert_close(second.logits[step][row], ended.logits[step][0], **EXACT)


@chunks_work
@every_attention
@pytest.mark.parametrize("settings", [UNIFORM | {"trigger": "block:8"}, RAGGED | {"trigger": "block:8"}])
def test_chunked_prefill(settings, attention):
    """The cache stays at the budget and a block while generate reads the prompt in blocks."""
    model, ids = tiny("llama", attention), tokens(2, 40)
    with EvictingCache(model, **settings | {"budget": 6}) as cache:
        transcript = Transcript(cache)
        out = generated(model, ids, cache, 6, prefill_chunk_size=8)
        expected = transcript.reference_logits(model)
        assert [len(ids[0]) for ids, _ in transcript.forwards] == [8, 8, 8, 8, 8, 1, 1, 1, 1, 1]
        for got, wanted in zip(out.logits, expected[4:], strict=True):
            torch.testing.assert_close(got.double(), wanted, **EXACT)
        held = [sum(int((layer >= 0).sum()) for layer in each) for _, each in transcript.forwards[1:]]
        assert held[:5] == [3 * 2 * 2 * 6] * 5


@both
def test_a_loop_with_a_fork_and_a_cut_in_the_middle(settings):
    """No position ids anywhere; the fork follows another question, is cut, and its parent does not notice."""
    model = tiny()
    pieces = torch.split(tokens(2, 40), [20, 1, 1, 6, 1, 1, 1, 9], 1)
    with cache_of(model, settings) as cache:
        reference = MaskedReference(model)

        def step(piece):
            with torch.no_grad():
                torch.testing.assert_close(model(piece, past_key_values=cache).logits, reference(piece), **EXACT)
            follow()

        def follow():
            for layer in LAYERS:
                reference.hide(layer, cache.kept_positions(layer))

        for place, piece in enumerate(pieces):
            step(piece)
            if place == 3:
                with cache.fork(budget=3) as fork:
                    feed(model, tokens(2, 5, seed=2), fork)
                    fork.compress()
                    assert int(fork.kept().sum()) == 3 * 2 * 2 * 3
            if place == 5:
                cache.compress()
                follow()


# drafts

DRAFTERS = {
    "assistant": lambda: {"assistant_model": tiny()},
    "lookup": lambda: {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
}
drafters = pytest.mark.parametrize("drafter", DRAFTERS)
memories = pytest.mark.parametrize(
    "settings",
    [
        {"policy": "h2o"},
        {"policy": "snapkv"},
        {"policy": "knorm"},
        {"policy": "h2o", "allocation": "global"},
        {"policy": "keydiff", "allocation": "global:zscore"},
    ],
)
DRAFTS_ARE_ANNOUNCED = hasattr(Cache, "activate_past_recording")  # not yet in 5.12
OUTSIDE = VOCABULARY + 1  # an end token that never comes: some versions want one


class Nothing:
    """A streamer that counts what it is given."""

    def __init__(self):
        self.given = 0

    def put(self, value):
        self.given += 1

    def end(self):
        pass


def same_afterwards(model, cache, plain, budget=None):
    """Whether two caches go on alike, with all that they remember."""
    assert cache.seen == plain.seen
    with cache.fork(budget=budget) as one, plain.fork(budget=budget) as two:
        one.compress(), two.compress()
        for layer in one.evicting_layers:
            assert torch.equal(one.kept_positions(layer), two.kept_positions(layer))
        after, wanted = (feed(model, tokens(1, 3, seed=4), each) for each in (one, two))
        torch.testing.assert_close(after, wanted, **EXACT)


@memories
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_loop_with_drafts_is_exact(family, settings):
    """Speculative decoding by hand after an eviction; two of five drafted tokens are drawn at random."""
    model, ids, new = tiny(family), tokens(1, 30), 24
    if family == "gemma3" and not DRAFTS_ARE_ANNOUNCED:
        pytest.skip("this transformers cannot crop its sliding windows")
    with EvictingCache(model, budget=0.5, **settings) as cache:
        feed(model, ids[:, :-1], cache)
        plain = cache.fork()
        greedy = [int(ids[0, -1])]
        for _ in range(new):
            greedy.append(int(feed(model, torch.tensor([greedy[-1:]]), plain).argmax()))
        for layer in cache.layers:  # sliding ones
            getattr(layer, "activate_past_recording", int)()
        text, right = greedy[:1], []
        torch.manual_seed(0)
        while len(text) <= new:
            ahead = torch.tensor(greedy[len(text) : min(len(text) + 4, new)])
            drafted = torch.where(torch.rand(len(ahead)) < 0.4, tokens(1, len(ahead), seed=len(right))[0], ahead)
            told = feed(model, torch.tensor([text[-1:] + drafted.tolist()]), cache)[0].argmax(-1)
            agreed = int((drafted == told[:-1]).long().cumprod(0).sum())
            cache.crop(agreed - len(drafted))
            text += told[: agreed + 1].tolist()
            right.append((agreed, len(drafted)))
        assert text == greedy
        assert any(0 == agreed < drafted for agreed, drafted in right)
        assert any(0 < agreed < drafted for agreed, drafted in right)
        same_afterwards(model, cache, plain)


@drafters
@memories
def test_drafts_through_generate_into_a_cache_that_keeps_all(settings, drafter):
    """Tokens, and what a fork then evicts, are those of decoding token by token."""
    model, ids = tiny(), torch.cat((tokens(1, 12), tokens(1, 4, seed=1).repeat(1, 3)), 1)
    with EvictingCache(model, budget=1.0, **settings) as cache, EvictingCache(model, budget=1.0, **settings) as plain:
        drafted = generated(model, ids, cache, 20, eos_token_id=OUTSIDE, **DRAFTERS[drafter]())
        expected = generated(model, ids, plain, 20, eos_token_id=OUTSIDE)
        assert drafted.sequences.tolist() == expected.sequences.tolist()
        same_afterwards(model, cache, plain, budget=9)


@drafters
@pytest.mark.parametrize("read", [0, 12])
@pytest.mark.parametrize("trigger", ["prefill", "every:4", "lagged:4", "block:4"])
def test_drafts_that_an_eviction_would_see_are_refused(trigger, read, drafter):
    model, ids = tiny(), torch.cat((tokens(1, 12), tokens(1, 12)), 1)
    streamer = Nothing()
    with EvictingCache(model, "h2o", 0.25, trigger=trigger) as cache:
        if read:
            feed(model, ids[:, :read], cache)
        if read and trigger == "prefill" and VERSION.release < (5, 4):
            pytest.skip("served: this transformers reads only what the cache has not read")
        # where drafts are not announced they are noticed by positions, or by the first crop
        with pytest.raises(UserError, match=r"and a cache would evict by them|do not count on from the 12 tokens seen"):
            generated(model, ids, cache, 6, eos_token_id=OUTSIDE, streamer=streamer, **DRAFTERS[drafter]())
        if DRAFTS_ARE_ANNOUNCED:
            assert cache.seen == read
            assert streamer.given == 1  # the prompt


@pytest.mark.skipif(VERSION.release >= (5, 4), reason="transformers reads the context again from 5.4 on")
@drafters
@memories
def test_drafts_after_the_context(settings, drafter):
    model, ids = tiny(), torch.cat((tokens(1, 24), tokens(1, 4, seed=1).repeat(1, 3)), 1)
    with EvictingCache(model, budget=0.25, **settings) as cache:
        feed(model, ids[:, :24], cache)
        plain = cache.fork()
        drafted = generated(model, ids, cache, 20, eos_token_id=OUTSIDE, **DRAFTERS[drafter]())
        expected = generated(model, ids, plain, 20, eos_token_id=OUTSIDE)
        assert drafted.sequences.tolist() == expected.sequences.tolist()
        same_afterwards(model, cache, plain)


@both
def test_a_crop_after_an_eviction_is_refused_and_changes_nothing(settings):
    model = tiny("gemma3")
    with cache_of(model, settings) as cache:
        feed(model, tokens(2, 20), cache)
        for piece in (1, 1, 1):
            feed(model, tokens(2, piece), cache)
        kept = cache.kept_positions(1)
        with pytest.raises(UserError, match="cannot be cropped by the newest 4 tokens but by 0"):
            cache.crop(-4)
        cache.crop(0)
        assert cache.seen == 23
        assert torch.equal(cache.kept_positions(1), kept)
        assert [layer.get_seq_length() for layer in cache.layers] == [23, 23, 23]


@pytest.mark.parametrize("policy", ["h2o", "knorm"])
@pytest.mark.parametrize("allocation", ["uniform", "global:rank"])
def test_taking_back_equals_never_having_come(allocation, policy):
    model, context, wrong, right = tiny(), tokens(2, 20), tokens(2, 7, seed=1), tokens(2, 5, seed=2)
    with EvictingCache(model, policy, 0.5, allocation=allocation) as cache:
        feed(model, context, cache)
        plain = cache.fork()
        feed(model, torch.cat((right[:, :2], wrong), 1), cache)
        cache.crop(-7)
        assert cache.seen == 22
        feed(model, right[:, :2], plain)
        after = feed(model, right[:, 2:], cache)
        torch.testing.assert_close(after, feed(model, right[:, 2:], plain), rtol=0, atol=1e-12)
        cache.compress(), plain.compress()
        for layer in LAYERS:
            assert torch.equal(cache.kept_positions(layer), plain.kept_positions(layer))


def test_other_caches_are_transformers_own_business():
    model = tiny()
    with EvictingCache(model) as cache, pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens(1, 4), past_key_values=cache, cache_implementation="static", max_new_tokens=1)


@pytest.mark.parametrize("trigger", ["every:1", "lagged:2"])
@pytest.mark.parametrize("policy", ["knorm", "scorer"])
def test_deciding_for_all_layers_together_equals_layer_by_layer(policy, trigger, monkeypatch, tmp_path):
    """Scores of new tokens in one product, and new tokens where evicted ones lay, change no decision and no logit."""
    model, ids = tiny(), tokens(2, 40)
    if policy == "scorer":
        torch.manual_seed(0)
        fingerprint = Fingerprint.of(model)
        network = GroupedScorer(3 * fingerprint.kv_heads, fingerprint.head_dim, 8, ("key", "value"))
        policy = Scorer(network, fingerprint, (1, 100), (1, 2))
    seen = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(CacheConfig, "decides_together", False)
        with EvictingCache(model, policy, 12, trigger=trigger, recent=2) as cache, torch.no_grad():
            assert cache.config.decides_together == together
            logits = [model(ids[:, :20], past_key_values=cache).logits[:, -1]]
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(20, 33)]
            saved = EvictingCache.load(cache.save(tmp_path / f"{together}.safetensors"), model, policy)
            for each in (cache.fork(), saved, cache):
                with each:
                    logits += [model(ids[:, i : i + 1], past_key_values=each).logits[:, -1] for i in range(33, 37)]
                    logits.append(model(ids[:, 37:], past_key_values=each).logits[:, -1])
            seen.append((torch.stack(logits), [cache.kept_positions(layer) for layer in LAYERS]))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=1e-9)
    assert all(torch.equal(mine, alone) for mine, alone in zip(seen[0][1], seen[1][1], strict=True))
