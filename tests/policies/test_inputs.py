"""What a scorer sees of a slot: each input against a loop in double precision; padding, files, settings, training."""

import cmath
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from known_traces import write_known_traces
from live_models import feed, tiny, tokens

from kv_gym import EvictingCache
from kv_gym.budgets import select
from kv_gym.cache_view import CacheView
from kv_gym.errors import UserError
from kv_gym.interop import export_tensors
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer, input_frequencies
from kv_gym.policies.scoring import inputs as module
from kv_gym.policies.scoring.inputs import DEFAULT, INPUTS, check_inputs, input_width, read_inputs, slot_inputs
from kv_gym.testing import check_policy
from kv_gym.traces import Prompt, open_traces, record
from kv_gym.training import train
from kv_gym.training.learner import read_context, sequence_inputs
from kv_gym.training.registry import agent_settings

FROM_SLOTS = tuple(name for name in INPUTS if name != "hidden")
ROPE = '{"rope_theta": 100.0, "rope_type": "default"}'
FINGERPRINT = Fingerprint("llama", "a" * 64, ROPE, layers=(0, 2), query_heads=4, kv_heads=2, head_dim=8)
FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.02])


def ragged_view(n=9, seed=0):
    """Two rows, two heads that hold other tokens each, some of them invalid; 16 queries of four heads."""
    random = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, n, 8, generator=random)
    positions, seen = torch.full((2, 2, n), -1), torch.tensor([30, 41])
    for row in range(2):
        for head in range(2):
            count = n - row - 2 * head
            chosen = torch.randperm(int(seen[row]), generator=random)[:count]
            positions[row, head, :count] = chosen
    queries = torch.randn(2, 4, 16, 8, generator=random)
    budget = torch.full((2, 2), 3)
    return CacheView(
        keys, values, positions, positions >= 0, seen, budget, scaling=0.5, queries=queries, frequencies=FREQUENCIES
    )


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow(view, row, head, name):
    """`[valid slots][width]` of one head, by the definitions."""
    there = [i for i in range(view.keys.shape[2]) if view.valid[row, head, i]]
    keys, values = view.keys[row, head].double(), view.values[row, head].double()
    positions, seen = view.positions[row, head].tolist(), int(view.seen[row])
    if name in ("key", "value"):
        return [(keys if name == "key" else values)[i].tolist() for i in there]
    if name == "position":
        return [[math.log(1 + positions[i]) / 4, math.log(seen - positions[i]) / 4] for i in there]
    if name == "pre_rope_key":
        found = []
        for i in there:
            pairs = [complex(keys[i, k], keys[i, k + 4]) for k in range(4)]
            back = [z * cmath.exp(-1j * positions[i] * f) for z, f in zip(pairs, FREQUENCIES.tolist(), strict=True)]
            found.append([z.real for z in back] + [z.imag for z in back])
        return found
    if name == "norms":
        return [[math.log(math.dist(t[i], [0] * 8)) for t in (keys, values)] for i in there]
    if name == "similarity":
        means = [sum(t[i] for i in there) / len(there) for t in (keys, values)]
        return [[cosine(t[i], mean) for t, mean in zip((keys, values), means, strict=True)] for i in there]
    if name == "redundancy":
        return [[max((cosine(keys[i], keys[j]) for j in there if j != i), default=0.0)] for i in there]
    assert name == "attention"
    paid = []
    for q in range(16):
        at = seen - 16 + q
        weights = []
        for own in (2 * head, 2 * head + 1):
            query = view.queries[row, own, q].double()
            odds = [math.exp(0.5 * float(query @ keys[i])) if positions[i] <= at else 0.0 for i in there]
            weights.append([o / sum(odds) if sum(odds) else 0.0 for o in odds])
        paid.append([max(pair) for pair in zip(*weights, strict=True)])
    return [
        [math.log(max(1e-6, f(column))) for f in (lambda c: sum(c) / 16, max)] for column in zip(*paid, strict=True)
    ]


@pytest.mark.parametrize("chunk", [2, 64])
@pytest.mark.parametrize("name", FROM_SLOTS)
def test_every_input_equals_its_definition(name, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    view = ragged_view()
    found = INPUTS[name].read(view)
    assert found.shape == (2, 2, 9, INPUTS[name].width(8, 0)) and found.dtype == torch.float32
    for row in range(2):
        for head in range(2):
            got = found[row, head][view.valid[row, head]].tolist()
            np.testing.assert_allclose(got, slow(view, row, head, name), atol=2e-5)


@pytest.mark.parametrize("name", FROM_SLOTS)
def test_what_lies_in_invalid_slots_changes_nothing(name):
    view, valid = ragged_view(), ragged_view().valid
    loud = [torch.where(valid[..., None], t, torch.full_like(t, 1e4)) for t in (view.keys, view.values)]
    other = INPUTS[name].read(replace(view, keys=loud[0], values=loud[1]))
    torch.testing.assert_close(other[valid], INPUTS[name].read(view)[valid], rtol=1e-4, atol=1e-5)


def test_queries_that_came_before_the_text_are_not_counted():
    """A row of three tokens in a batch whose other rows have sixteen queries: the mean is over three of them."""
    view = ragged_view()
    short = replace(
        view, positions=torch.arange(3).expand(2, 2, 3), valid=torch.ones(2, 2, 3, dtype=torch.bool),
        keys=torch.zeros(2, 2, 3, 8), values=view.values[:, :, :3], seen=torch.tensor([3, 3]),
    )  # fmt: skip
    mean, most = INPUTS["attention"].read(short)[0, 0].exp().unbind(-1)
    # equal keys: the first token gets 1, 1/2 and 1/3 of the three queries
    np.testing.assert_allclose(mean, [(1 + 1 / 2 + 1 / 3) / 3, (1 / 2 + 1 / 3) / 3, 1 / 9], rtol=1e-5)
    np.testing.assert_allclose(most, [1, 1 / 2, 1 / 3], rtol=1e-5)


def test_a_key_alone_is_like_no_other():
    view = CacheView.of(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert read_inputs(view, ("redundancy",)).tolist() == [[[[0.0]], [[0.0]]]]


def test_the_usual_inputs_are_what_they_were():
    view = ragged_view()
    assert torch.equal(read_inputs(view), slot_inputs(view.keys, view.values, view.positions, view.seen[:, None, None]))
    assert input_width(DEFAULT, 8) == 18 and read_inputs(view).shape[-1] == 18


def scorer(names, **more):
    torch.manual_seed(0)
    network = GroupedScorer(4, 8, 16, names, frequencies=input_frequencies(names, FINGERPRINT), **more)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Scorer(network, FINGERPRINT, (8, 64), (1, 1))


@pytest.mark.parametrize("names", [*[(name,) for name in FROM_SLOTS], FROM_SLOTS], ids=lambda names: "+".join(names))
def test_a_scorer_keeps_the_contract_whatever_it_sees(names):
    policy = scorer(names)
    static = {"key", "value", "norms", "pre_rope_key"}
    assert policy.static == (set(names) <= static) and not policy.needs_hidden
    assert policy.needs_queries == (16 if "attention" in names else 0)
    check_policy(policy, layers=FINGERPRINT.layers)


# -- files -------------------------------------------------------------------------------------------------------


def write_old(file, leave_out=(), **changes):
    """Write policy.json as before there were checksums."""
    about = json.loads(file.read_text()) | {"format": 2} | changes
    file.write_text(json.dumps({name: value for name, value in about.items() if name not in ("sha256", *leave_out)}))


def test_inputs_are_stored_with_the_policy(tmp_path):
    names = ("key", "norms", "attention", "pre_rope_key")
    policy, view = scorer(names, depth=1), replace(ragged_view(), layer=2)
    folder = policy.save_pretrained(tmp_path / "policy")
    loaded = make_policy(folder)
    assert loaded.inputs == names and loaded.network.depth == 1 and loaded.needs_queries == 16
    assert torch.equal(loaded.score(view), policy.score(view))
    assert json.loads((folder / "policy.json").read_text())["format"] == 3


def test_a_folder_that_does_not_say_is_as_it_was_when_none_did(tmp_path):
    policy, view = scorer(DEFAULT), replace(ragged_view(), layer=2)
    file = policy.save_pretrained(tmp_path / "policy") / "policy.json"
    write_old(file, leave_out=("inputs", "depth", "hidden_size", "absolute"))
    loaded = make_policy(tmp_path / "policy")
    assert loaded.inputs == DEFAULT and not loaded.absolute
    assert torch.equal(loaded.score(view), policy.score(view))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": ["key", "scent"]}, "expected some of key, value, position"),
        ({"inputs": ["key"]}, "other sizes"),
        ({"inputs": 3}, "inputs"),
        ({"depth": 99}, "depth"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, changes, sentence):
    file = scorer(("key", "norms")).save_pretrained(tmp_path / "policy") / "policy.json"
    write_old(file, **changes)
    with pytest.raises(UserError, match=sentence) as refused:
        make_policy(tmp_path / "policy")
    assert "\n" not in str(refused.value)


def test_tensors_for_ports_hold_the_usual_inputs_alone(tmp_path):
    with pytest.raises(UserError, match=r"its inputs: key, value, position, norms; 20 numbers"):
        export_tensors(scorer((*DEFAULT, "norms")), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="1 hidden layers, and the tensor format holds two"):
        export_tensors(scorer(DEFAULT, depth=1), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# -- settings and training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["key", "smell"], "expected some of key, value"),
        (["key", "key"], "each once"),
        ([], "expected some of"),
        ("key", r"inputs is 'key'; expected a list"),
        (["position", "hidden"], "'hidden' and 'position': hidden states are there only while a token arrives"),
    ],
)
def test_inputs_that_there_are_not_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        agent_settings("joint", inputs=given)


def test_hidden_states_come_last():
    assert check_inputs(["hidden", "value", "key"], "x") == ("value", "key", "hidden")
    assert agent_settings("joint").inputs == DEFAULT and agent_settings("kvzap").inputs == ("hidden",)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return write_known_traces(tmp_path_factory.mktemp("known") / "traces")


@pytest.mark.parametrize("names", [FROM_SLOTS[:-1], ("hidden",), ("key", "hidden")], ids="+".join)
def test_training_sees_what_the_policy_sees(traces, names):
    """Also of networks that were handed standardised inputs."""
    sequence = open_traces(traces)[0]
    torch.manual_seed(0)
    network = GroupedScorer(4, 4, 8, names, 16, frequencies=FREQUENCIES[:2])
    seen = sequence_inputs(sequence, names, network.frequencies)
    network.standardise(seen)
    policy = Scorer(network, open_traces(traces).fingerprint, (40, 40))
    views = [sequence.view_for(policy, layer) for layer in range(2)]
    scores = torch.cat([policy.score(view)[0] for view in views]).detach()
    torch.testing.assert_close(network(seen).detach(), scores, rtol=1e-4, atol=1e-5)
    context = read_context(sequence, names=names, frequencies=network.frequencies)
    context.standardise(network)
    some = torch.tensor([7, 0, 33])
    torch.testing.assert_close(
        network.scores(context.network_inputs(some)).detach(), scores[:, some], rtol=1e-4, atol=1e-5
    )


def test_training_needs_the_queries_that_its_inputs_read(traces):
    with pytest.raises(UserError, match="need the last 16 queries and context s0 has 1: record with --window 16"):
        sequence_inputs(open_traces(traces)[0], ("key", "attention"))


FAST = {"steps": 2, "hidden": 4, "every": 2, "progress": False}


@pytest.mark.parametrize("agent", ["joint", "distill", "kvzap"])
def test_agents_train_on_other_inputs_and_go_on_from_such_policies(traces, tmp_path, agent):
    first = train(agent, traces, tmp_path / "a", inputs=["norms", "key", "hidden"], **FAST)
    assert first.inputs == ("norms", "key", "hidden") and first.network.hidden_size == 16
    assert first.absolute == (agent == "kvzap")
    second = train("joint", traces, tmp_path / "b", init=tmp_path / "a", steps=2, every=2, progress=False)
    assert second.inputs == first.inputs
    with pytest.raises(UserError, match="the policy to start from has inputs"):
        train("joint", traces, tmp_path / "c", init=tmp_path / "a", inputs=["key", "value"], **FAST)


@pytest.mark.parametrize("agent", ["foresight", "ppo"])
def test_agents_that_see_the_environment_refuse_other_inputs(traces, tmp_path, agent):
    with pytest.raises(UserError, match=f"agent '{agent}' learns from key, value, position alone"):
        train(agent, traces, tmp_path / "a", inputs=["key", "norms"], **FAST)


def test_a_policy_from_before_there_were_inputs_is_not_trained_again(traces, tmp_path):
    train("joint", traces, tmp_path / "a", **FAST)
    file = tmp_path / "a" / "policy.json"
    about = json.loads(file.read_text())
    assert about["training"]["settings"].pop("inputs") == list(DEFAULT)
    write_old(file, training=about["training"])
    again = train("joint", traces, tmp_path / "a", **FAST)
    assert again.training["seconds"] == about["training"]["seconds"]
    with pytest.raises(UserError, match="was trained otherwise"):
        train("joint", traces, tmp_path / "a", inputs=["key"], **FAST)


# -- live --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("norms", "similarity"), ("redundancy", "pre_rope_key"), ("attention", "position")])
def test_live_keeps_what_replay_keeps(names, tmp_path):
    model = tiny("llama").float()
    ids = tokens(1, 50)
    record(model, [Prompt("a", ids[0].tolist(), [[1, 2, 3]])], tmp_path, stats=(), progress=False)
    torch.manual_seed(0)
    fingerprint = Fingerprint.of(model)
    network = GroupedScorer(6, 8, 8, names, frequencies=input_frequencies(names, fingerprint))
    policy = Scorer(network, fingerprint, (1, 99), (0, 0))
    sequence = open_traces(tmp_path)[0]
    with EvictingCache(model, policy, 12) as cache:
        feed(model, ids, cache)
    for layer in range(3):
        kept = select(policy, sequence.view_for(policy, layer, 12), 0, 0)[0]
        assert cache.kept_positions(layer)[0].tolist() == [torch.nonzero(head)[:, 0].tolist() for head in kept]
