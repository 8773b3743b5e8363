"""KVzip: the second reading against a slow one, by hand, and what becomes of its statistics."""

from dataclasses import dataclass, replace

import pytest
import torch
from live_models import feed, tiny, tokens
from second_reading_reference import paid_when_repeated

from kv_gym import CacheView, EvictingCache, Policy, evaluate, make_policy
from kv_gym.errors import UserError
from kv_gym.live import Conversation, PolicyGroup, generate
from kv_gym.models.context_repetition import ContextRepetition
from kv_gym.traces import Prompt
from kv_gym.traces.recorder import record_sequence

SETTINGS = [{}, {"chunk": 16, "overlap": 3}, {"chunk": 7, "overlap": 0, "instruction": "5 60 11"}, {"projected": True}]


def slow(model, ids, settings):
    lead = tuple(map(int, settings.get("instruction", "").split()))
    rest = {name: value for name, value in settings.items() if name != "instruction"}
    return paid_when_repeated(model, ids, lead=lead, **rest)


def statistics(cache):
    """State by layer, of slots in the order of their positions."""
    found = {}
    for layer in cache.evicting_layers:
        view = cache.layers[layer].state.view()
        found[layer] = view.state["paid"].gather(2, view.positions.sort(-1).indices)
    return found


def forked(cache, policy, budget):
    """The fork that was cut to `budget`, and its statistics right before."""
    fork = cache.fork(policy, budget)
    fork.compress()
    return fork


def test_the_order_by_hand():
    # two query heads of one KV head; the second query pays token 3 most, the first one token 1
    attention = torch.tensor(
        [[[[0.1, 0.6, 0.0, 0.1], [0.2, 0.1, 0.1, 0.0]], [[0.3, 0.1, 0.0, 0.2], [0.0, 0.0, 0.2, 0.7]]]]
    )
    policy = make_policy("kvzip")
    view = CacheView.of(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    state = policy.observe_again(view, attention, policy.initial_state(view))
    scores = policy.score(replace(view, state=state))[0, 0]
    assert scores.tolist() == pytest.approx([0.3, 0.6, 0.2, 0.7])
    # a later chunk only ever raises
    state = policy.observe_again(view, attention.flip(3) / 2, state)
    assert state["paid"][0, 0].tolist() == pytest.approx([0.35, 0.6, 0.3, 0.7])


def test_the_projected_order_by_hand():
    # |W_O v| of the tokens is 1 and 8, the inputs of the two queries have norms 1 and 4
    policy = make_policy("kvzip", projected=True)
    values = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    view = CacheView.of(torch.zeros(1, 1, 2, 2), values, output=torch.tensor([[[1.0, 0.0, 0.0], [0.0, 4.0, 0.0]]]))
    attention, hidden = torch.tensor([[[[0.5, 0.0], [0.2, 0.4]]]]), torch.tensor([[[0.6, 0.8, 0.0], [0.0, 0.0, 4.0]]])
    state = policy.observe_again(view, attention, policy.initial_state(view), hidden)
    assert state["paid"][0, 0].tolist() == pytest.approx([0.5, 0.4 * 8 / 4])


def test_chunks_by_hand():
    text = torch.tensor([[-1, -1, 10, 11, 12], [20, 21, 22, 23, 24]])
    one, two, three = ContextRepetition(2, 1, 4, (7,)).chunks(text, (1,))
    assert one[0].tolist() == [[7, 10, 11], [7, 20, 21]]
    assert two[0].tolist() == [[7, 11, 12, -1], [7, 21, 22, 23]]
    assert three[0].tolist() == [[-1, -1, -1], [7, 23, 24]]
    assert [(chunk[1].tolist(), chunk[2].tolist()) for chunk in (one, two, three)] == [
        ([0, 0], [2, 2]), ([2, 2], [3, 4]), ([3, 4], [3, 5]),
    ]  # fmt: skip
    assert ContextRepetition(9, 0, 4).chunks(text[1:], (1,))[0][0].tolist() == [[1, 20, 21, 22, 23, 24]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_live_statistics_are_those_of_a_slow_reading(attention, settings):
    model, ids, policy = tiny("qwen3", attention), tokens(2, 40), make_policy("kvzip", **settings)
    expected = slow(model, ids, settings)
    with EvictingCache(model, policy, 0.5) as cache:
        feed(model, ids, cache)
        for layer, paid in statistics(cache).items():
            positions = cache.kept_positions(layer)
            torch.testing.assert_close(paid, expected[layer].gather(2, positions), rtol=1e-4, atol=1e-6)
            assert paid.unique().numel() > 20


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_recorded_statistics_are_those_of_a_slow_reading(settings):
    model, ids, policy = tiny("llama"), tokens(1, 40), make_policy("kvzip", **settings)
    sequence = record_sequence(model, Prompt("a", ids[0].tolist(), [[1, 2, 3]]), stats=[policy, "h2o"])
    plain = record_sequence(model, Prompt("a", ids[0].tolist(), [[1, 2, 3]]), stats=["h2o"])
    for layer, paid in slow(model, ids, settings).items():
        found = torch.from_numpy(sequence.stats[policy.statistics]["paid"][layer])
        torch.testing.assert_close(found, paid[0], rtol=1e-4, atol=1e-6)
    # the second reading leaves no trace in anything else
    assert (sequence.continuations[0].future == plain.continuations[0].future).all()
    assert (sequence.stats["h2o"]["mass"] == plain.stats["h2o"]["mass"]).all()


@pytest.mark.parametrize("counted", [False, True], ids=["columns", "positions"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_padded_rows_are_read_again_as_if_alone(settings, counted):
    model, policy = tiny("llama"), make_policy("kvzip", **settings)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with EvictingCache(model, policy, "1/2") as cache, torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0) if counted else None
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    with EvictingCache(model, policy, "1/2") as alone:
        feed(model, ids[1:, 11:], alone)
    for layer in cache.evicting_layers:
        kept = cache.kept_positions(layer)[1]
        assert [head[head >= 0].tolist() for head in kept] == alone.kept_positions(layer)[0].tolist()


def test_a_panel_remembers_the_text_for_its_forks():
    model, ids, policy = tiny(), tokens(1, 40), make_policy("kvzip", chunk=16)
    with EvictingCache(model, policy, 0.25) as direct:
        feed(model, ids, direct)
    with EvictingCache(model, PolicyGroup((make_policy("snapkv"), policy)), 1.0) as cache:
        feed(model, ids[:, :25], cache)
        feed(model, ids[:, 25:], cache)
        fork = cache.fork(policy, 0.25)
        fork.compress()
        for layer in direct.evicting_layers:
            assert torch.equal(fork.kept_positions(layer), direct.kept_positions(layer))
        fork.detach()
        assert cache.kept().eq(40).all()


def test_tokens_after_a_cut_are_repeated_before_the_next():
    model, policy = tiny(), make_policy("kvzip")
    with EvictingCache(model, policy, 12, trigger="every:8", recent=0) as cache:
        feed(model, tokens(1, 24), cache)
        feed(model, tokens(1, 7, seed=3), cache)
        state = cache.layers[0].state
        assert state.unread.shape == (1, 7, 2) and state.view().state["paid"][0, 0, -7:].eq(0).all()
        feed(model, tokens(1, 1, seed=4), cache)
        assert state.unread is None
        view = state.view()
        later = view.positions >= 24
        assert later.any() and (view.state["paid"][later] > 0).all()


def test_beams_and_drafts_take_the_text_along():
    model, policy = tiny(), make_policy("kvzip")
    with EvictingCache(model, policy, 1.0) as cache:
        feed(model, tokens(2, 20), cache)
        feed(model, tokens(2, 6, seed=1), cache)
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 1]))
        text = torch.cat((tokens(2, 20), tokens(2, 6, seed=1)[:, :2]), 1)[[1, 1]]
        assert torch.equal(cache.layers[0].state.unread[..., 0], text)
        fork = forked(cache, policy, 0.5)
        paid, expected = statistics(fork), paid_when_repeated(model, text)
        for layer in fork.evicting_layers:
            torch.testing.assert_close(paid[layer], expected[layer].gather(2, fork.kept_positions(layer)))
        fork.detach()


def test_a_saved_cache_remembers_what_is_to_be_read_again(tmp_path):
    model, policy = tiny(), make_policy("kvzip", chunk=9)
    with EvictingCache(model, policy, 1.0) as cache:
        feed(model, tokens(2, 20), cache)
        with EvictingCache.load(cache.save(tmp_path / "a.safetensors"), model) as loaded:
            kept = [forked(each, policy, 0.5) for each in (cache, loaded)]
            for layer in cache.evicting_layers:
                assert torch.equal(*(fork.kept_positions(layer) for fork in kept))
            for fork in kept:
                fork.detach()


def test_embeddings_cannot_be_repeated():
    model = tiny()
    with EvictingCache(model, "kvzip", 0.5) as cache, pytest.raises(UserError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64), past_key_values=cache)


@pytest.mark.parametrize("settings", [{"chunk": 0}, {"overlap": -1}, {"instruction": "repeat 5"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match="expected"):
        make_policy("kvzip", **settings)


# -- the words that ask for the repetition -------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are characters, with a chat template."""

    chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    bos_token_id, special_tokens_map = None, {}

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


class OldWords(Letters):
    """One that does not know the published words, as the bundled model's."""

    def decode(self, ids):
        return "thou"


def test_the_published_words_and_the_chat_templates_answer_where_there_is_a_tokenizer():
    words = "\n\nRepeat the previous context exactly."
    policy = make_policy("kvzip")
    asked = policy.with_tokenizer(Letters())
    assert asked.repetition.instruction == tuple(map(ord, words + "</><assistant>"))
    wrapped = make_policy("same_tokens:over=kvzip").with_tokenizer(Letters())
    assert wrapped.repetition == asked.repetition
    plain = Letters()
    plain.chat_template = None
    assert policy.with_tokenizer(plain).repetition.instruction == tuple(map(ord, words))
    assert policy.with_tokenizer(OldWords()) is policy
    given = make_policy("kvzip:instruction=17 4")
    assert given.with_tokenizer(Letters()) is given and make_policy("knorm").with_tokenizer(None).name == "knorm"


@dataclass(frozen=True)
class AsksForTokenizer(Policy):
    def with_tokenizer(self, tokenizer):
        raise UserError(f"given {type(tokenizer).__name__}")

    def score(self, view):
        raise NotImplementedError


@pytest.mark.parametrize(
    "call",
    [
        lambda policy: generate(tiny(), Letters(), "text", policy),
        lambda policy: Conversation(tiny(), Letters(), policy),
        lambda policy: evaluate([policy], [0.5], model=tiny(), tokenizer=Letters(), tasks=[], progress=False),
    ],
    ids=["generate", "chat", "evaluate"],
)
def test_policies_are_told_of_the_tokenizer(call):
    with pytest.raises(UserError, match="given Letters"):
        call(AsksForTokenizer())
