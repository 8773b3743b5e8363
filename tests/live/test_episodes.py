"""Probes between blocks, episodes of a conversation, and a cache for each of them."""

import re
import sys

import pytest
import torch
from live_models import feed, prefilled, tiny, tokens

from kv_gym import EpisodicCache, EvictingCache, evaluate
from kv_gym.errors import UserError
from kv_gym.live.episodes import Episodes, conversation_windows, model_embedding, sentence_embedding
from kv_gym.live.episodic_cache import EpisodeSettings, parse_episodes
from kv_gym.live.layer import EvictingLayer

PROBE = (3, 1, 4, 1, 5)


def probe_attention(model, context, probe):
    """Largest weight `[layers, kv_heads, context]` that the probe's queries give, by a plain forward over both.

    The softmax is renormalised over the context: the probe's own keys are no slots.
    """
    whole = torch.cat([context, torch.tensor([probe])], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(whole, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    n = context.shape[1]
    of_context = [layer[0, :, n:, :n] / layer[0, :, n:, :n].sum(-1, keepdim=True) for layer in weights]
    return torch.stack([layer.unflatten(0, (-1, 2)).amax((1, 2)) for layer in of_context])


def test_a_probe_scores_by_its_queries_and_leaves_nothing():
    model, context = tiny(), tokens(1, 24)
    expected = probe_attention(model, context, PROBE)
    cache = EvictingCache(model, "epicache", 8, probe=PROBE, sinks=0)
    logits = feed(model, context, cache)
    torch.testing.assert_close(logits, feed(model, context, None), rtol=0, atol=1e-9)
    for layer, scores in enumerate(expected):
        best = scores.topk(8).indices.sort(-1).values
        assert torch.equal(cache.kept_positions(layer)[0], best)
    assert cache.seen == 24
    assert {tuple(layer.keys.shape[1:3]) for layer in cache.layers} == {(2, 8)}
    assert not any(state.queries is not None for state in cache._states)
    follow = feed(model, tokens(1, 2), cache)
    assert bool(follow.isfinite().all())


@pytest.mark.parametrize("policy", ["snapkv", "tova", "keydiff"])
@pytest.mark.parametrize("allocation", ["uniform", "global:rank"])
def test_any_policy_can_read_a_probe(policy, allocation):
    model = tiny()
    cache = prefilled(model, policy, 8, allocation=allocation, probe=PROBE, recent=0)
    plain = prefilled(model, policy, 8, allocation=allocation, recent=0)
    assert cache.kept().sum() == plain.kept().sum()
    same = all(torch.equal(cache.kept_positions(layer), plain.kept_positions(layer)) for layer in range(3))
    assert same == (policy == "keydiff")  # which looks at keys alone


def test_a_policy_with_memory_observes_the_probe():
    model = tiny()
    cache = prefilled(model, "h2o", 1.0, probe=PROBE)
    before = cache._states[1].view().state["mass"].sum(-1)
    cache.run_probe()
    after = cache._states[1].view().state["mass"].sum(-1)
    torch.testing.assert_close(after / before, torch.full_like(before, (32 + len(PROBE)) / 32))


def test_a_probe_is_saved_and_refused(tmp_path):
    model = tiny()
    cache = prefilled(model, "epicache", 8, probe=PROBE, trigger="block:16")
    loaded = EvictingCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    more = tokens(1, 16, seed=3)
    assert torch.equal(feed(model, more, loaded), feed(model, more, cache))
    assert torch.equal(loaded.kept_positions(1), cache.kept_positions(1))
    for probe, policy, allocation, said in (
        ((10**6,), "epicache", "uniform", "a probe holds"),
        (5, "epicache", "uniform", "the probe is 5; expected a list of token ids"),
        (PROBE, "kvzip", "uniform", "second reading"),
        (PROBE, "cake", "cake:cascade", "cuts layers while later ones are read"),
    ):
        with pytest.raises(UserError, match=said):
            EvictingCache(model, policy, 8, allocation, probe=probe)
    padded = EvictingCache(model, "epicache", 8, probe=PROBE)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(UserError, match="one at a time"), torch.no_grad():
        model(tokens(2, 12), attention_mask=mask, past_key_values=padded)


def vectors_of(numbers):
    """An embedding that knows the vector of every text by its first token."""
    return lambda texts: torch.tensor([numbers[text[0]] for text in texts])


def test_matching_by_hand():
    embed = vectors_of([(1.0, 0.0), (1.0, 0.0), (0.6, 0.8), (-0.6, 0.8), (0.65, 0.76)])
    centroids = torch.tensor([(1.0, 0.0), (0.0, 0.8)])
    found = {
        match: Episodes(centroids, ((0,), (2,)), ((0, 1), (2, 3)), embed, match).choose([4])
        for match in ("dot", "cosine", "worst")
    }
    assert found == {"dot": 0, "cosine": 1, "worst": 1}


def test_episodes_are_clusters_with_their_nearest_windows_in_order():
    pytest.importorskip("sklearn")
    embed = vectors_of([(0.0, 1.0), (1.0, 0.1), (1.0, -0.1), (1.0, 0.0), (0.1, 1.0)])
    windows = conversation_windows([(number, 9) for number in range(5)], 1)
    episodes = Episodes.find(windows, embed, 2, medoids=2, instruction=(7,))
    wide = episodes.choose([3])
    assert episodes.members[wide][0] == 3 and set(episodes.members[wide]) == {1, 2, 3}
    assert set(episodes.members[1 - wide]) == {0, 4}
    assert episodes.probes[1 - wide] == (7, 0, 9, 4, 9)  # in the order of the conversation
    assert episodes.probes[wide] in {(7, 1, 9, 3, 9), (7, 2, 9, 3, 9)}
    assert conversation_windows([(1,), (2,), (3,)], 2) == [(1, 2), (3,)]


@pytest.fixture
def conversation():
    """A model, a conversation and its episodes."""
    pytest.importorskip("sklearn")
    model, ids = tiny(), tokens(1, 90, seed=5)[0].tolist()
    windows = [ids[start : start + 10] for start in range(0, 90, 10)]
    return model, ids, Episodes.find(windows, model_embedding(model), 3, medoids=2)


def test_every_episode_has_a_cache_of_the_whole_conversation(conversation, tmp_path, monkeypatch):
    model, ids, episodes = conversation
    held, attend = [], EvictingLayer.attend

    def watched(layer, call):
        held.append(call.key.shape[2])
        return attend(layer, call)

    monkeypatch.setattr(EvictingLayer, "attend", watched)
    cache = EpisodicCache(model, episodes, budget=16, block=20)
    cache.read(ids)
    assert max(held) <= 16 + 20  # and nothing of a probe is stored, so that attention sees no more than it on top
    assert cache.kept().tolist() == [[[[16, 16]]] * 3] * 3
    assert cache.tokens_read == sum(90 + 5 * len(probe) for probe in episodes.probes)
    positions = {tuple(cache.of_episode(number).kept_positions(2).flatten().tolist()) for number in range(3)}
    assert len(positions) == 3
    question = ids[10:14]
    with cache.for_question(question) as chosen:
        assert cache.chosen == cache.choose(question) == episodes.choose(question)
        answer = feed(model, torch.tensor([question]), chosen)
    expected = EvictingCache(model, "epicache", 16, trigger="block:20", probe=episodes.probes[cache.chosen])
    for start in range(0, 90, 20):
        feed(model, torch.tensor([ids[start : start + 20]]), expected)
    expected.compress()
    torch.testing.assert_close(answer, feed(model, torch.tensor([question]), expected), rtol=0, atol=1e-9)
    for park in ("host", tmp_path / "parked"):
        parked = EpisodicCache(model, episodes, budget=16, block=20, park=park)
        parked.read(ids)
        with parked.for_question(question) as chosen:
            torch.testing.assert_close(feed(model, torch.tensor([question]), chosen), answer, rtol=0, atol=1e-12)
        assert (parked.nbytes(), parked.host_nbytes() > 0) == (0, park == "host")
    loaded = EpisodicCache.load(cache.save(tmp_path / "saved"), model)
    with loaded.for_question(question) as chosen:
        torch.testing.assert_close(feed(model, torch.tensor([question]), chosen), answer, rtol=0, atol=1e-12)
    assert (loaded.seen, loaded.tokens_read) == (90, cache.tokens_read)
    manifest = tmp_path / "saved" / "episodes.json"
    manifest.write_text(manifest.read_text().replace('"probes":[[', '"probes":[[1],['))
    with pytest.raises(UserError, match="other numbers"):
        EpisodicCache.load(tmp_path / "saved", model)


def test_layers_by_sensitivity_keep_the_total_exact(conversation, tmp_path):
    model, ids, episodes = conversation
    file = tmp_path / "similarity.json"
    file.write_text("[0.9, 0.6, 0.8]")
    cache = EpisodicCache(model, episodes, budget=16, block=20, allocation=f"epicache:{file}")
    cache.read(ids)
    assert cache.kept().sum((1, 2, 3)).tolist() == [3 * 2 * 16] * 3
    assert len(set(cache.kept()[0, :, 0, 0].tolist())) > 1


def test_a_cache_moves_with_all_that_it_holds():
    model = tiny()
    for allocation in ("uniform", "global:rank"):
        cache = prefilled(model, "snapkv", 8, allocation=allocation)
        before = feed(model, tokens(1, 3), cache.fork())
        cache.move("cpu")
        assert torch.equal(feed(model, tokens(1, 3), cache.fork()), before)
        copy = cache.fork()
        copy.move("meta")
        assert {tensor.device.type for tensor in copy._states[0].slots.buffers.values()} == {"meta"}
    with pytest.raises(UserError, match="stays on its device"):
        prefilled(model, "knorm", 8, evicted="bits:4").move("cpu")


def test_bad_conversations_are_refused_in_one_sentence(conversation):
    model, ids, episodes = conversation
    embed = model_embedding(model)
    windows = conversation_windows([ids[:10], ids[10:20]], 1)
    wrong = [
        (lambda: Episodes.find(windows[:1], embed, 1), "1 window"),
        (lambda: Episodes.find(windows, embed, 3), "2 windows and 3 episodes"),
        (lambda: Episodes.find(windows, embed, 0), "expected numbers from 1"),
        (lambda: Episodes.find(windows, lambda texts: torch.zeros(1, 2), 2), "a finite vector for each"),
        (
            lambda: Episodes(episodes.centroids, ((1,),) * 3, ((0,),) * 3, lambda t: torch.ones(1, 5)).choose([1]),
            "has 5",
        ),
        (lambda: Episodes(episodes.centroids, (), (), embed, "l2"), "match='l2'"),
        (lambda: episodes.choose([]), "the question is empty"),
        (lambda: conversation_windows(windows, 0), "0 utterances"),
        (lambda: EpisodicCache(model, episodes).for_question([1]), "the cache is empty"),
        (lambda: EpisodicCache(model, episodes).read([]), "one conversation"),
        (lambda: EpisodicCache(model, episodes, block=0), "0 tokens"),
        (lambda: parse_episodes("4:size=3"), "are not known"),
        (lambda: parse_episodes("0"), "count=0"),
        (lambda: parse_episodes("4:match=l2"), "match='l2'"),
    ]
    for call, said in wrong:
        with pytest.raises(UserError, match=re.escape(said)) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match=r"pip install 'kv-gym\[sentences\]'"):
        sentence_embedding(None)
    with pytest.raises(UserError, match="scikit-learn"):
        Episodes.find([(0,), (1,)], vectors_of([(1.0, 0.0), (0.0, 1.0)]), 2)


@pytest.mark.slow  # the import alone takes seconds
def test_a_model_of_sentences_finds_the_episodes(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is an extra")
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[UNK]", "lamp", "boat", "old", "sold"]
    pieces = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer = Whitespace()
    vectors = torch.eye(len(words))
    embedding = StaticEmbedding(pieces, embedding_weights=vectors.numpy())
    sentence_transformers.SentenceTransformer(modules=[embedding], device="cpu").save(str(tmp_path / "encoder"))

    class Words:
        def decode(self, ids, skip_special_tokens):
            assert skip_special_tokens
            return " ".join(words[token] for token in ids)

    embed = sentence_embedding(Words(), str(tmp_path / "encoder"))
    torch.testing.assert_close(embed([[1], [2, 4]]).float(), torch.stack([vectors[1], vectors[[2, 4]].mean(0)]))
    pytest.importorskip("sklearn")
    episodes = Episodes.find([(1, 3), (2, 4), (1,), (2,)], embed, 2)
    assert {frozenset(own) for own in episodes.members} == {frozenset({0, 2}), frozenset({1, 3})}
    assert set(episodes.members[episodes.choose([2])]) == {1, 3}


def test_names_of_settings():
    for name in ("4", "2:medoids=3:match=cosine", "3:window=2:block=32"):
        assert parse_episodes(name).name == name
    assert parse_episodes("none") is None
    assert parse_episodes("5:block=64") == EpisodeSettings(5)


def test_evaluate_divides_dialogues_into_episodes():
    pytest.importorskip("sklearn")
    from kv_gym.models import load_model
    from kv_gym.reference import MODEL

    model, tokenizer = load_model(MODEL)
    task = "dialogue:128:topics=2:count=1"
    found = evaluate(
        ["epicache"], ["1/4"], model=model, tasks=task, tokenizer=tokenizer, episodes=["none", "2:window=2"],
        progress=False,
    )  # fmt: skip
    full, plain, divided = found["rows"]
    assert (full["episodes"], plain["episodes"], divided["episodes"]) == ("none", "none", "2:window=2")
    assert divided["questions"] == full["questions"] and divided["cache_bytes"] > plain["cache_bytes"]
    assert {sum(map(sum, row["slots"])) for row in (plain, divided)} == {sum(map(len, plain["slots"])) * 32}
    with pytest.raises(UserError, match="read whole"):
        evaluate(
            ["epicache"], ["1/4"], model=model, tasks="dialogue:128:count=1", tokenizer=tokenizer, episodes=["2"],
            progress=False,
        )  # fmt: skip
