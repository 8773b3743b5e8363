"""Hidden states: recorded as the attention receives them, read lazily, and seen live by policies that keep none."""

import gc
import json
import math
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace

import h5py
import numpy as np
import pytest
import torch
from known_traces import write_known_traces
from live_models import feed, prefilled, tiny, tokens
from traced_models import CONTEXT, some_prompt, tiny_model

from kv_gym import EvictingCache
from kv_gym.budgets import parse_allocation, select, select_slots
from kv_gym.budgets.calibrated import policy_identity
from kv_gym.errors import UserError
from kv_gym.evaluation import calibrate
from kv_gym.evaluation.measure import replay
from kv_gym.live import PolicyGroup
from kv_gym.models import hidden_states
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import Policy, make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.testing import check_policy
from kv_gym.traces import Prompt, open_traces, record
from kv_gym.traces.recorder import record_sequence
from kv_gym.training import train
from kv_gym.training.kvzap import KVzap, KVzapSettings
from kv_gym.training.learner import sequence_inputs

WIDTH, HEADS = 32, 2


def hidden_policy(model, inputs=("hidden",), seed=0):
    """Random networks of one hidden layer over the hidden states of a tiny model."""
    torch.manual_seed(seed)
    network = GroupedScorer(3 * HEADS, 8, 12, inputs, WIDTH, depth=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Scorer(network, Fingerprint.of(model), (1, 10**6), protect=(0, 0), calibrated=True, absolute=True)


@contextmanager
def overheard(model):
    """What every attention module receives, by a hook of the test's own: layer -> list of `[B, m, D]`."""
    heard, hooks = {}, []
    for module in model.modules():
        if hasattr(module, "layer_idx") and (hasattr(module, "o_proj") or hasattr(module, "dense")):

            def keep(module, args, kwargs):
                got = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                heard.setdefault(module.layer_idx, []).append(got.detach().clone())

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    yield heard
    for hook in hooks:
        hook.remove()


def slow_scores(policy, layer, hidden):
    """`[H][n]` by a loop over heads and tokens, in double precision; `hidden [n, D]`."""
    network = policy.network
    first, last, one, two = (tensor.detach().double() for tensor in (*network.weights, *network.biases))
    scores = []
    for head in range(layer * HEADS, (layer + 1) * HEADS):
        row = []
        for token in hidden.double():
            inner = (token @ first[head] + one[head, 0]).clamp(min=0)
            row.append(float(inner @ last[head, :, 0] + two[head, 0, 0]))
        scores.append(row)
    return scores


def best(scores, count):
    """Ties go to the newer: in layer 0 equal words have equal hidden states."""
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)[:count])


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# -- traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gemma3"])
def test_what_is_recorded_is_what_the_attention_receives(family):
    model = tiny_model(family)
    before = hooks_of(model)
    with overheard(model) as heard:
        sequence = record_sequence(model, some_prompt((8,)), stats=(), hidden=True)
    assert sequence.hidden.shape == (len(sequence.layers), CONTEXT, WIDTH)
    for place, layer in enumerate(sequence.layers):
        first = heard[layer][0][0]  # the context comes first, then its continuations
        assert np.array_equal(sequence.hidden[place], first.numpy())
        assert torch.equal(sequence.view(place, hidden=True).hidden[0], first)
    assert sequence.view(0).hidden is None and hooks_of(model) == before


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A float32 model, and a trace set of one context of 60 tokens with its hidden states."""
    folder = tmp_path_factory.mktemp("hidden") / "traces"
    model = tiny("llama").float()
    prompt = Prompt("a", tokens(1, 60)[0].tolist(), [tokens(1, 8, seed=1)[0].tolist()])
    record(model, [prompt], folder, stats=(), progress=False, hidden=True)
    return model, folder


def test_they_are_read_from_the_disk_when_asked_for_a_layer_at_a_time(recorded, tmp_path):
    model, folder = recorded
    copy = tmp_path / "traces"
    shutil.copytree(folder, copy)
    sequence = open_traces(copy)[0]
    ids = torch.from_numpy(sequence.tokens)[None]
    with overheard(model) as heard, torch.no_grad():
        model(ids)
    for layer in range(3):
        assert np.array_equal(sequence.hidden[layer], heard[layer][0][0].numpy())
    assert open_traces(copy).manifest["settings"]["hidden"] is True
    assert open_traces(copy).verify(0) == len(["tokens", "keys", "values", "queries", "hidden", "tokens", "future"])
    next(copy.glob("*.h5")).unlink()
    assert sequence.keys.shape == (3, 2, 60, 8)
    with pytest.raises(UserError, match="there is no trace file"):
        sequence.hidden[0]


def test_bfloat16_comes_back_to_the_digit(tmp_path):
    model = tiny_model("llama").bfloat16()
    record(model, [some_prompt((4,), context=20)], tmp_path / "traces", stats=(), progress=False, hidden=True)
    with overheard(model) as heard, torch.no_grad():
        model(torch.tensor([some_prompt((4,), context=20).context_ids]))
    sequence = open_traces(tmp_path / "traces")[0]
    for layer in range(3):
        assert np.array_equal(sequence.hidden[layer], heard[layer][0][0].float().numpy())
        assert sequence.view(layer, hidden=True).hidden.dtype == torch.bfloat16


DAMAGE = {
    "tokens": (np.zeros((3, 59, WIDTH), np.float32), r"has shape \[3, 59, 32\]; expected \[3, 60, any\]"),
    "layers": (np.zeros((2, 60, WIDTH), np.float32), r"has shape \[2, 60, 32\]"),
    "axes": (np.zeros((3, 60), np.float32), r"has shape \[3, 60\]"),
    "type": (np.zeros((3, 60, WIDTH), np.int64), "is of type int64"),
    "numbers": (np.full((3, 60, WIDTH), np.nan, np.float32), "NaN or infinite"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_hidden_states_of_another_form_are_refused(recorded, tmp_path, name):
    array, sentence = DAMAGE[name]
    shutil.copytree(recorded[1], tmp_path / "traces")
    with h5py.File(next((tmp_path / "traces").glob("*.h5")), "r+") as file:
        context = file["sequences/a/context"]
        del context["hidden"]
        context.create_dataset("hidden", data=array, chunks=array.shape, fletcher32=True)
    with pytest.raises(UserError, match=sentence):
        open_traces(tmp_path / "traces")[0].hidden_of(0)


def test_a_context_without_them_names_the_command(tmp_path):
    model = tiny("llama").float()
    prompt = Prompt("a", tokens(1, 20)[0].tolist(), [tokens(1, 8, seed=1)[0].tolist()])
    sequence = record(model, [prompt], tmp_path, stats=(), progress=False)[0]
    assert sequence.hidden is None and "hidden" not in open_traces(tmp_path).manifest["settings"]
    with pytest.raises(UserError, match="kv-gym record --hidden"):
        sequence.view(0, hidden=True)
    with pytest.raises(UserError, match="needs hidden states and context a holds none: record with --hidden"):
        replay({"p": hidden_policy(model)}, [sequence], [4])


# -- live --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [("hidden",), ("key", "value", "hidden"), ("norms", "hidden")])
def test_live_keeps_what_replay_keeps(recorded, inputs):
    model, folder = recorded
    sequence, policy = open_traces(folder)[0], hidden_policy(model, inputs)
    ids = torch.from_numpy(sequence.tokens)[None]
    for budget in (9, 0.25):
        with EvictingCache(model, policy, budget) as cache:
            feed(model, ids, cache)
        for layer in range(3):
            kept = select(policy, sequence.view_for(policy, layer, budget), 0, 0)[0]
            assert cache.kept_positions(layer)[0].tolist() == [torch.nonzero(head)[:, 0].tolist() for head in kept]
    with EvictingCache(model, policy, 0.25, allocation="global") as cache:
        feed(model, ids, cache)
    masks = select_slots(
        policy, parse_allocation("global"), [sequence.view_for(policy, i, 0.25) for i in range(3)], 0, 0
    )
    assert cache.kept()[:, 0].tolist() == [mask[0].sum(-1).tolist() for mask in masks]
    assert len(set(cache.kept().flatten().tolist())) > 1
    assert replay({"p": policy}, [sequence], [0.25])[0]["n"] == 1


DECODE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from kv_gym import EvictingCache

folder, ids = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32, attn_implementation="sdpa")
with EvictingCache(model, folder + "/policy", 9) as cache, torch.no_grad():
    model(torch.tensor([ids]), past_key_values=cache)
    print(json.dumps([cache.kept_positions(layer)[0].tolist() for layer in cache.evicting_layers]))
"""


@pytest.mark.slow
def test_live_keeps_what_replay_keeps_in_a_fresh_process(recorded, tmp_path):
    model, folder = recorded
    model.save_pretrained(tmp_path / "model")
    policy = make_policy(hidden_policy(model).save_pretrained(tmp_path / "policy"))
    sequence = open_traces(folder)[0]
    asked = json.dumps([str(tmp_path), sequence.tokens.tolist()])
    done = subprocess.run([sys.executable, "-c", DECODE, asked], capture_output=True, text=True, check=True)
    kept = [select(policy, sequence.view_for(policy, layer, 9), 0, 0)[0] for layer in range(3)]
    replayed = [[torch.nonzero(head)[:, 0].tolist() for head in layer] for layer in kept]
    assert json.loads(done.stdout.splitlines()[-1]) == replayed


@pytest.mark.parametrize(("trigger", "last"), [("prefill", 40), ("every:8", 56), ("block:8", 56)])
def test_live_cuts_by_the_hidden_states_of_the_forward_that_brought_a_token(trigger, last):
    """Scores never change, so what is left of all cuts is the best of all tokens seen at the last one."""
    model = tiny("llama")
    policy = hidden_policy(model)
    with overheard(model) as heard, EvictingCache(model, policy, 10, trigger=trigger) as cache:
        feed(model, tokens(1, 40), cache)
        for token in tokens(1, 20, seed=5)[0]:
            feed(model, token[None, None], cache)
    for layer in range(3):
        scores = slow_scores(policy, layer, torch.cat(heard[layer], 1)[0])
        expected = [best(row[:last], 10) + list(range(last, 60)) for row in scores]
        assert cache.kept_positions(layer)[0].tolist() == expected


@pytest.mark.parametrize("trigger", ["prefill", "block:8"])
def test_rows_of_a_padded_batch_keep_what_they_keep_alone(trigger):
    model = tiny("llama")
    policy, ids = hidden_policy(model), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :11] = 0
    with EvictingCache(model, policy, 7, trigger=trigger) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    for row, own in enumerate((ids[:1], ids[1:, 11:])):
        with EvictingCache(model, policy, 7, trigger=trigger) as alone:
            feed(model, own, alone)
        for layer in range(3):
            kept = cache.kept_positions(layer)[row]
            assert [[p for p in head if p >= 0] for head in kept.tolist()] == alone.kept_positions(layer)[0].tolist()


def test_one_prefill_serves_forks_for_several_policies():
    model = tiny("llama")
    policy, other = hidden_policy(model), hidden_policy(model, ("key", "hidden"), seed=1)
    with EvictingCache(model, PolicyGroup((other, make_policy("h2o"), policy)), 1.0) as cache:
        feed(model, tokens(1, 40), cache)
        for chosen in (policy, other):
            with EvictingCache(model, chosen, 9) as direct:
                feed(model, tokens(1, 40), direct)
            with cache.fork(chosen, 9) as fork, fork.fork() as twin:
                twin.compress()
                feed(model, tokens(1, 3, seed=2), twin)
            feed_again = direct.kept_positions(1)[0].tolist()
            assert [head[:9] for head in twin.kept_positions(1)[0].tolist()] == feed_again
            assert set(fork.layers[0].state.slots.buffers) == {"keys", "values", "positions", "scores"}
        plain = cache.fork("knorm", 9)
        assert set(plain.layers[0].state.slots.buffers) == {"keys", "values", "positions"}
        plain.detach()
        with pytest.raises(UserError, match="did not keep what policy 'scorer' needs"):
            plain.fork(policy)


def test_nothing_of_a_hidden_state_is_held():
    model = tiny("llama")
    with EvictingCache(model, hidden_policy(model), 8) as cache:
        feed(model, tokens(1, 40), cache)
        cache.compress()
        slot = (8 + 8) * 8 + 8 + 4  # a float64 key and value, the position, the score
        assert cache.nbytes() == 3 * HEADS * 8 * slot
    assert hidden_states._current.input is None


def test_scores_go_to_a_file_and_come_back(tmp_path):
    model = tiny("llama")
    policy = hidden_policy(model)
    cache = prefilled(model, policy, 12, trigger="every:4")
    loaded = EvictingCache.load(cache.save(tmp_path / "c.safetensors"), model, policy)
    for each in (cache, loaded):
        feed(model, tokens(1, 9, seed=3), each)
    for layer in range(3):
        assert torch.equal(loaded.kept_positions(layer), cache.kept_positions(layer))


def test_hooks_are_there_while_such_a_cache_is_attached_and_no_longer():
    model = tiny("llama")
    before = hooks_of(model)
    with EvictingCache(model, "knorm", 8):
        attached = hooks_of(model)  # what every cache needs
    first = EvictingCache(model, hidden_policy(model), 8)
    assert hooks_of(model) == attached + 6
    feed(model, tokens(1, 20), first)
    second = first.fork()
    first.detach()
    feed(model, tokens(1, 5), second)
    assert hooks_of(model) == attached + 6
    del second
    gc.collect()
    assert hooks_of(model) == before
    with first:
        feed(model, tokens(1, 2), first)
    assert hooks_of(model) == before


def test_a_forward_that_raises_leaves_no_hook_and_no_state():
    model = tiny("llama")
    before = hooks_of(model)
    cache = EvictingCache(model, hidden_policy(model), 8)
    failing = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, tokens(1, 20), cache)
    failing.remove()
    assert hidden_states._current.input is None
    assert hooks_of(model) == before and hidden_states._current.input is None


def test_keys_without_a_model_are_refused():
    model = tiny("llama")
    cache = EvictingCache(model, hidden_policy(model), 8)
    with pytest.raises(UserError, match="reached the cache past the hooks"):
        cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)


@dataclass(frozen=True)
class Changing(Policy):
    """Needs hidden states and does not say that its scores never change."""

    needs_hidden = True

    def score(self, view):
        return view.hidden[:, None, :, 0].expand(view.positions.shape)


def test_what_cannot_be_served_is_refused_in_one_sentence():
    model = tiny("llama")
    with pytest.raises(UserError, match="needs hidden states and is not static"):
        EvictingCache(model, Changing(), 8)
    with pytest.raises(UserError, match="do not bring along"):
        EvictingCache(model, hidden_policy(model), 8, offload=True)


def test_a_policy_of_hidden_states_keeps_the_contract():
    """The contract's views have hidden states of 16 numbers."""
    torch.manual_seed(0)
    fingerprint = Fingerprint("llama", "a" * 64, "{}", layers=(0, 2), query_heads=4, kv_heads=2, head_dim=8)
    policy = Scorer(GroupedScorer(4, 8, 8, ("key", "norms", "hidden"), 16, depth=1), fingerprint, (1, 99))
    assert policy.static and policy.needs_hidden and policy.needs_queries == 0
    check_policy(policy, layers=(0, 2))


def test_it_is_exported_with_its_sizes(tmp_path):
    policy = hidden_policy(tiny("llama"))
    folder = policy.save_pretrained(tmp_path / "policy")
    about = json.loads((folder / "policy.json").read_text())
    assert (about["format"], about["inputs"], about["depth"], about["hidden_size"]) == (3, ["hidden"], 1, WIDTH)
    loaded = make_policy(folder)
    assert loaded.absolute and loaded.needs_hidden and loaded.static
    for name, tensor in policy.network.state_dict().items():
        assert torch.equal(tensor, loaded.network.state_dict()[name])


# -- kvzap -------------------------------------------------------------------------------------------------------

FAST = {"hidden": 8, "progress": False}


def test_the_loss_is_the_squared_error_of_the_logarithm_of_worth():
    learner = KVzap(KVzapSettings(), 0, GroupedScorer(2, 4, 2, ("hidden",), 3, depth=0))
    learner.variance = torch.tensor([2.0, 0.5])
    worth = torch.tensor([[[math.e, 1.0], [0.0, 1e-9]]])  # one context, two heads, two slots; zero counts as 1e-6
    scores = torch.tensor([[[0.0, 2.0], [math.log(1e-6), math.log(1e-6) + 1]]])
    loss, told = learner.loss(scores, worth)
    assert loss.item() == pytest.approx((1 + 4 + 0 + 1) / 4, abs=1e-5)
    assert told["explained"].item() == pytest.approx(((1 - 2.5 / 2) + (1 - 0.5 / 0.5)) / 2, abs=1e-5)


def test_a_linear_kvzap_comes_near_the_least_squares_of_each_head(tmp_path):
    traces = open_traces(write_known_traces(tmp_path / "traces"))
    policy = train("kvzap", traces, tmp_path / "out", steps=150, rate=0.1, network="linear", every=150, **FAST)
    assert policy.network.depth == 0 and [tuple(w.shape) for w in policy.network.weights] == [(4, 16, 1)]
    train_set = list(traces.select(split="train"))
    scores = torch.cat([policy.network(sequence_inputs(s, ("hidden",))) for s in train_set], 1).detach().numpy()
    for head in range(4):
        x = np.concatenate([s.hidden[head // 2] for s in train_set]).astype(float)
        y = np.log(np.concatenate([s.utility()[head // 2, head % 2] for s in train_set]))
        x = np.concatenate((x, np.ones((len(x), 1))), 1)
        least = ((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2).mean()
        assert least < 0.2 * y.var()
        assert ((scores[head] - y) ** 2).mean() < least + 0.05 * y.var()


def test_the_target_is_the_mean_or_the_most_of_the_recorded_attention(tmp_path):
    sequence = open_traces(write_known_traces(tmp_path / "traces"))[0]
    network = GroupedScorer(4, 4, 2, ("hidden",), 16, depth=0)
    blocks = sequence.continuations[0].future[..., 0] / 2  # two queries in each of three blocks
    expected = KVzap(KVzapSettings(), 0, network).utility(sequence)
    most = KVzap(KVzapSettings(target="max"), 0, network).utility(sequence)
    np.testing.assert_allclose(expected, blocks.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(most, blocks.max(-1), rtol=1e-5)
    assert not np.allclose(expected, most)


def test_kvzap_refuses_traces_without_hidden_states(tmp_path):
    traces = write_known_traces(tmp_path / "traces", hidden=False)
    with pytest.raises(UserError, match="recorded without hidden states: record with `kv-gym record --hidden`") as said:
        train("kvzap", traces, tmp_path / "out", steps=1, **FAST)
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="network is 'deep'; expected 'linear' or 'mlp'"):
        train("kvzap", traces, tmp_path / "out", network="deep")
    with pytest.raises(UserError, match="target is 'sum'"):
        train("kvzap", traces, tmp_path / "out", target="sum")


def test_thresholds_on_scores_without_an_absolute_scale_come_with_a_note(tmp_path):
    traces = write_known_traces(tmp_path / "traces")
    absolute = train("kvzap", traces, tmp_path / "a", steps=1, **FAST)
    ranked = train("joint", traces, tmp_path / "b", steps=1, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = calibrate(absolute, traces, [0.5], progress=False)
    assert json.loads(rule.about)["absolute"] is True
    with pytest.warns(UserWarning, match="trained to rank slots within a context"):
        rule = calibrate(ranked, traces, [0.5], progress=False)
    assert json.loads(rule.about)["absolute"] is False
    assert policy_identity(ranked) == policy_identity(
        replace(ranked, absolute=True)
    )  # the thresholds are for the scores
