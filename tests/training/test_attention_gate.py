"""The agent `attention_gate`: its network, losses and flags by hand, and its policies in a live cache."""

import math

import pytest
import torch
from traced_models import VOCABULARY, tiny_model

from kv_gym import EvictingCache
from kv_gym.errors import UserError
from kv_gym.evaluation.measure import replay
from kv_gym.models.fingerprint import Fingerprint
from kv_gym.policies import make_policy
from kv_gym.policies.scorer import GroupedScorer, Scorer
from kv_gym.policies.scoring.attention_gate import AttentionGate
from kv_gym.testing import check_policy
from kv_gym.traces import Prompt, record
from kv_gym.training import train
from kv_gym.training.attention_gate import continuation_loss, eviction_loss, straight_through
from kv_gym.training.registry import agent_settings

FAST = {"steps": 30, "every": 30, "hidden": 8, "gate_heads": 2, "rate": 0.05, "protect": (0, 2), "progress": False}


def random_gate(heads=4, kv_heads=2, width=16, seed=0):
    torch.manual_seed(seed)
    network = AttentionGate(heads, kv_heads, width, hidden=8, gate_heads=2)
    torch.nn.init.normal_(network.weight)
    network.mean.copy_(torch.randn(width))
    return network


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny random model and contexts of two lengths, of which it repeats some tokens."""
    model = tiny_model("qwen3", num_hidden_layers=2)
    prompts = []
    for i in range(10):
        generator = torch.Generator().manual_seed(i)
        context = torch.randint(0, VOCABULARY, (24 + 2 * (i % 2),), generator=generator).tolist()
        prompts.append(Prompt(f"c{i}", context, [context[3 + k : 9 + k] for k in range(2)], text_hash=f"c{i}"))
    folder = tmp_path_factory.mktemp("attention_gate") / "traces"
    return model, record(model, prompts, folder, hidden=True, progress=False)


def slow_logits(network, layer, hidden):
    """`[n][kv_heads]` by loops in double precision; `hidden [n, D]`."""
    x = (hidden.double() - network.mean[0].double()) * network.scale[0].double()
    project, weight, bias = (each[layer].detach().double() for each in (network.project, network.weight, network.bias))
    width, heads = network.hidden, network.gate_heads
    q, k, v = (x @ project[:, i * width : (i + 1) * width] for i in range(3))
    out = []
    for i in range(len(x)):
        pooled = []
        for a in range(heads):
            part = slice(a * width // heads, (a + 1) * width // heads)
            weights = torch.tensor([math.exp(float(q[i, part] @ k[j, part]) / 2) for j in range(len(x))])
            pooled.append((weights / weights.sum()).double() @ v[:, part])
        out.append(torch.cat((*pooled, x[i])) @ weight + bias[0])
    return torch.stack(out)


def test_the_network_is_attention_over_all_tokens_and_a_linear_map():
    network, hidden = random_gate(), torch.randn(7, 16)
    found = network(hidden.expand(4, 7, 16))
    for layer in range(2):
        expected = slow_logits(network, layer, hidden).T
        torch.testing.assert_close(found[2 * layer : 2 * layer + 2].double(), expected, atol=1e-4, rtol=1e-4)
    assert (
        network(hidden[:1].expand(4, 5, 16)).std(1) < 1e-5
    ).all()  # twins have the same gates: it knows no positions
    untrained = AttentionGate(4, 2, 16, 8, 2)(hidden.expand(4, 7, 16))
    assert (untrained == 4).all()  # everything is kept at first


def test_a_gate_keeps_the_contract_and_is_exported_with_its_sizes(tmp_path):
    fingerprint = Fingerprint("llama", "a" * 64, "{}", layers=(0, 2), query_heads=4, kv_heads=2, head_dim=8)
    policy = Scorer(random_gate(), fingerprint, (1, 99), (0, 4), calibrated=True)
    assert policy.needs_hidden and policy.scores_on_arrival and not policy.static and policy.comparable
    check_policy(policy, layers=(0, 2))
    loaded = make_policy(policy.save_pretrained(tmp_path / "gate"))
    for name, tensor in policy.network.state_dict().items():
        assert torch.equal(tensor, loaded.network.state_dict()[name])


def test_losses_by_hand():
    kept = torch.tensor([0.9, 0.5, 0.3])
    assert eviction_loss(kept, 0.4, "hinge").item() == pytest.approx(0.2)
    assert eviction_loss(kept, 0.4, "absolute").item() == pytest.approx(0.7 / 3)
    logits = torch.tensor([[[[0.0, 0.0], [math.log(3), 0.0], [9.0, 0.0]]]])
    tokens, mask = torch.tensor([[[0, 1, 0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    expected = (math.log(2) - math.log(3 / 4)) / 2  # the last logits speak of nothing that is there
    assert continuation_loss(logits, tokens, mask).item() == pytest.approx(expected)


def test_flags_are_hard_and_pass_the_gradient_on_outside_of_the_window():
    p = torch.tensor([[0.3, 0.7, 0.3, 0.2, 0.1]], requires_grad=True)
    flags = straight_through(p, 1, 1)
    assert flags.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0]]
    flags.sum().backward()
    assert p.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.fixture(scope="module")
def trained(recorded, tmp_path_factory):
    model, traces = recorded
    return train("attention_gate", traces, tmp_path_factory.mktemp("gate") / "out", model=model, **FAST)


def kept_rate(policy, traces, threshold=0.0):
    """The share of the slots whose flags are 1."""
    flags = [policy.score(context.view(layer, hidden=True)) > threshold for context in traces for layer in range(2)]
    return float(torch.cat([each.flatten() for each in flags]).float().mean())


def test_the_eviction_loss_brings_the_gates_to_their_rates(recorded, trained):
    """By default to those between an eighth and a half, each with a threshold of its own."""
    assert trained.training["settings"]["keep_rate"] == [0.125, 0.5]
    half, eighth = (kept_rate(trained, recorded[1], threshold) for threshold in (0, math.log(7)))
    assert eighth + 0.05 < half < 0.6
    assert trained.training["agent"] == "attention_gate" and trained.protection == (0, 2)


def test_a_live_cache_keeps_what_replay_keeps_and_padding_changes_nothing(recorded, trained):
    model, traces = recorded
    contexts = traces.load()[:2]
    short, long = ([int(token) for token in context.tokens] for context in contexts)
    assert len(short) < len(long)
    alone = []
    for ids, context in zip((short, long), contexts, strict=True):
        with EvictingCache(model, trained, budget=0.5, allocation="global") as cache, torch.no_grad():
            model(torch.tensor([ids]), past_key_values=cache)
            alone.append([cache.kept_positions(layer)[0] for layer in range(2)])
            gates = torch.stack([trained.score(context.view(layer, hidden=True))[0] for layer in range(2)])
            assert int(cache.kept().sum()) == len(ids) // 2 * 4
        gates[:, :, -2:] = math.inf
        best = gates.flatten().argsort(descending=True, stable=True)[: len(ids) // 2 * 4]
        mask = torch.zeros(gates.numel(), dtype=torch.bool).index_fill_(0, best, True).view_as(gates)
        for layer in range(2):
            for head in range(2):
                kept = alone[-1][layer][head]
                assert kept[kept >= 0].tolist() == mask[layer, head].nonzero()[:, 0].tolist()
    padded = torch.tensor([[0] * (len(long) - len(short)) + short, long])
    real = torch.tensor([[0] * (len(long) - len(short)) + [1] * len(short), [1] * len(long)])
    with EvictingCache(model, trained, budget=0.5, allocation="global") as cache, torch.no_grad():
        model(padded, attention_mask=real, past_key_values=cache)
        for layer in range(2):
            for row in range(2):
                for head in range(2):
                    found, expected = cache.kept_positions(layer)[row, head], alone[row][layer][head]
                    assert found[found >= 0].tolist() == expected[expected >= 0].tolist()


def test_the_flags_as_they_are_whatever_the_budget(recorded, trained):
    model, traces = recorded
    context = traces[0]
    flags = torch.stack([trained.score(context.view(layer, hidden=True))[0] for layer in range(2)]) > 0
    flags[:, :, -2:] = True
    for budget, kept in ((0.5, flags.sum(2)), (0.25, flags.sum(2)), (1.0, torch.full((2, 2), len(context.tokens)))):
        with EvictingCache(model, trained, budget, allocation="threshold:0") as cache, torch.no_grad():
            model(torch.from_numpy(context.tokens)[None], past_key_values=cache)
            assert torch.equal(cache.kept()[:, 0], kept)
    with pytest.raises(UserError, match="no scale that holds for every head"):
        EvictingCache(model, "expected_attention", 0.5, allocation="threshold:0")
    with pytest.raises(UserError, match="unknown allocation 'threshold:high'"):
        EvictingCache(model, trained, 0.5, allocation="threshold:high")


def test_it_is_replayed_beside_other_policies(recorded, trained):
    rows = replay({"gate": trained, "recency": make_policy("recency")}, recorded[1], [0.5])
    assert {row["policy"] for row in rows} == {"gate", "recency"}


def test_a_keep_rate_is_a_number_or_a_range():
    assert agent_settings("attention_gate", keep_rate=0.25).keep_rate == (0.25, 0.25)
    assert agent_settings("attention_gate", keep_rate=[0.1, 0.25]).keep_rate == (0.1, 0.25)
    for wrong, said in (
        ([0.5, 0.1], r"such as \[0.1, 0.5\]"),
        (1.5, "keep_rate"),
        ("half", "keep_rate"),
        (True, "rate"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            agent_settings("attention_gate", keep_rate=wrong)
        assert "\n" not in str(raised.value)


def test_refusals(recorded, trained, tmp_path):
    model, traces = recorded
    with pytest.raises(UserError, match="trains through the model"):
        train("attention_gate", traces, tmp_path / "a", **FAST)
    with pytest.raises(UserError, match="a width of 9 for 2 attention heads"):
        train("attention_gate", traces, tmp_path / "b", model=model, **FAST | {"hidden": 9})
    with pytest.raises(UserError, match="class AttentionGate and agent 'kvzap' trains one of class GroupedScorer"):
        train("kvzap", traces, tmp_path / "c", init=trained, steps=1, progress=False)
    other = tiny_model("qwen3", num_hidden_layers=3)
    with pytest.raises(UserError, match="layers"):
        EvictingCache(other, trained, budget=0.5)
    for network in (random_gate(), GroupedScorer(4, 16, 8, ("hidden",), 16, depth=0)):
        narrow = Scorer(network, trained.fingerprint, (1, 99), calibrated=True)
        cache = EvictingCache(model, narrow, budget=0.5)
        with cache, pytest.raises(UserError, match="hidden states of 16 numbers and the model's have 32"):
            model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
