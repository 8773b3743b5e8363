"""Traces that hold a sample of a context's slots: what is recorded, and how they are replayed and learned from."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from meta_device import META, OneDevice
from traced_models import CONTEXT, same, some_prompt, tiny_model

from kv_gym.budgets import Uniform, select_context
from kv_gym.envs import KVEvictEnv
from kv_gym.errors import UserError
from kv_gym.evaluation.decision_value import decision_value
from kv_gym.policies import make_policy
from kv_gym.traces import info, open_traces, record, record_sequence, validate
from kv_gym.traces import recording_cache as caches
from kv_gym.traces.recorder import SAMPLED_ENDS, sampled_positions
from kv_gym.traces.recording_cache import RecordingCache
from kv_gym.training import train
from kv_gym.training.targets import output_change, output_roots

SLOTS = 40
PROMPTS = [some_prompt((5, 18), f"p{i}", seed=i, context=24 if i == 3 else 90) for i in range(6)]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    out = tmp_path_factory.mktemp("traces") / "sampled"
    record(tiny_model(), PROMPTS, out, slots=SLOTS, hidden=True, progress=False, stats=["h2o"], shard_size=4)
    return out


def test_positions_are_random_distinct_and_hold_the_ends():
    tokens = list(range(1000))
    positions = sampled_positions(tokens, 100)
    assert len(set(positions.tolist())) == 100 and (np.diff(positions) > 0).all()
    assert positions[:SAMPLED_ENDS].tolist() == [0, 1, 2, 3] and positions[-SAMPLED_ENDS:].tolist() == [
        *range(996, 1000)
    ]
    assert np.array_equal(positions, sampled_positions(tokens, 100))
    assert not np.array_equal(positions, sampled_positions(tokens, 100, seed=1))
    assert not np.array_equal(positions, sampled_positions(tokens[::-1], 100))
    assert sampled_positions(tokens, 1000) is None and sampled_positions(tokens, None) is None
    counts = np.bincount(np.concatenate([sampled_positions(tokens, 108, seed)[4:-4] for seed in range(400)]))
    assert abs(counts[4:500].sum() / counts.sum() - 0.5) < 0.01 and counts[4:996].min() > 10  # about 40 each
    for settings in ({"slots": 15}, {"slots": 16, "seed": -1}):
        with pytest.raises(UserError, match="expected at least 16 and 0"):
            sampled_positions(tokens, **settings)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("product", [1 << 25, 300])
def test_a_sample_equals_the_whole_recording_at_its_slots(family, product, monkeypatch):
    monkeypatch.setattr(caches, "LARGEST_PRODUCT", product)  # 300: chunks of queries and of keys
    model, prompt = tiny_model(family), some_prompt()
    whole = record_sequence(model, prompt, blocks=2, hidden=True)
    got = record_sequence(model, prompt, blocks=2, hidden=True, slots=SLOTS, stats=["h2o"])
    at = got.positions
    assert got.slots == len(at) == SLOTS and len(got.tokens) == CONTEXT and got.queries.shape[2] == 0
    np.testing.assert_array_equal(got.keys, whole.keys[:, :, at])
    np.testing.assert_array_equal(got.values, whole.values[:, :, at])
    np.testing.assert_array_equal(got.hidden, whole.hidden[:, at])
    np.testing.assert_array_equal(got.stats["h2o"]["mass"], whole.stats["h2o"]["mass"][:, :, at])
    for mine, all_slots in zip(got.continuations, whole.continuations, strict=True):
        assert mine.block == all_slots.block
        np.testing.assert_allclose(mine.future, all_slots.future[:, :, at], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(got.utility(), whole.utility()[:, :, at], atol=1e-6)
    assert record_sequence(model, prompt, slots=SLOTS).stats == {}


def test_the_attention_of_a_long_continuation_is_never_whole(monkeypatch):
    monkeypatch.setattr(caches, "LARGEST_PRODUCT", 1 << 14)
    largest = []
    plain = caches._log_denominator

    def watched(grouped, keys):
        largest.append(grouped[..., 0].numel())
        return plain(grouped, keys)

    monkeypatch.setattr(caches, "_log_denominator", watched)
    record_sequence(tiny_model(num_hidden_layers=1), some_prompt((300,), context=200), slots=SLOTS)
    assert sum(largest) == 4 * 300 and max(largest) * SLOTS <= 1 << 14


@torch.no_grad()
def test_recording_a_sample_does_not_wait_for_the_device():
    from kv_gym.models.attention import attach, detach

    model = tiny_model().to(META)
    positions = torch.zeros(SLOTS, dtype=torch.int64, device=META)
    attach(model)
    try:
        cache = RecordingCache(model, 0, {}, positions=positions)
        with OneDevice():
            model(torch.zeros(1, 150, dtype=torch.int64, device=META), past_key_values=cache)
            with cache.continuation(1, 16):
                model(torch.zeros(1, 30, dtype=torch.int64, device=META), past_key_values=cache)
                futures = cache.futures
        assert [tuple(future.shape) for future in futures] == [(1, 2, SLOTS, 2, 2)] * 3
    finally:
        detach(model)


def test_round_trip(sampled):
    traces = open_traces(sampled)
    assert traces.manifest["version"] == "2.0" and traces.manifest["settings"]["slots"] == SLOTS
    for prompt, read in zip(PROMPTS, traces, strict=True):
        made = record_sequence(tiny_model(), prompt, slots=SLOTS, stats=["h2o"])
        assert same(replace(read, hidden=None), made)
        assert (read.positions is None) == (len(prompt.context_ids) <= SLOTS)
        assert read.hidden_of(1).shape == (read.slots, 32)
        assert np.array_equal(read.slot_positions, made.slot_positions)
    about = info(sampled)
    assert (about["tokens"], about["slots"], about["format"]) == (5 * 90 + 24, 5 * SLOTS + 24, "2.0")
    assert validate(sampled)["sequences"] == 6
    with pytest.raises(UserError, match="was recorded with settings"):
        record(tiny_model(), PROMPTS, sampled, slots=SLOTS + 1, hidden=True, progress=False, stats=["h2o"])


@pytest.mark.parametrize("damage", ["order", "range", "length"])
def test_damaged_positions_are_refused(damage, tmp_path):
    traces = record(tiny_model(), PROMPTS[:1], tmp_path / "set", slots=SLOTS, progress=False)
    with h5py.File(traces.entries[0].path, "r+") as file:
        group = file["sequences/p0"]
        positions = group["context/positions"]
        if damage == "length":
            group.attrs["slots"] = SLOTS - 1
        else:
            positions[5 if damage == "order" else -1] = 90
    with pytest.raises(UserError, match="expected \\[39\\]" if damage == "length" else "does not ascend within"):
        traces[0]


def test_replay_cuts_the_sample_as_if_it_were_a_context(sampled):
    sequence = open_traces(sampled)[0]
    policy = make_policy("oracle")
    views = [sequence.view_for(policy, layer, 1 / 4) for layer in range(3)]
    assert views[0].seen.tolist() == [90] and views[0].budget.unique().tolist() == [SLOTS // 4]
    assert views[0].positions[0, 0].tolist() == sequence.positions.tolist()
    cut = select_context(policy, Uniform(), views, 1 / 4, torch.from_numpy(sequence.utility()), sinks=2, recent=2)
    assert (cut.kept.sum(-1) == SLOTS // 4).all() and cut.kept[..., [0, 1, -2, -1]].all()


def test_the_environment_replays_a_sample(sampled):
    env = KVEvictEnv(sampled, order="sequential")
    traces = open_traces(sampled)
    observation, reset = env.reset(seed=0)
    sequence = traces[reset["sequence"]]
    assert observation["position"].tolist() == sequence.positions.tolist() and observation["mask"].sum() == SLOTS
    _, reward, _, _, about = env.step(sequence.utility()[0, 0])
    assert reward == pytest.approx(1) and about["curve_slots"][0] == SLOTS // 2
    # the same numbers without positions are a whole context: only what is observed of positions differs
    short = replace(sequence, positions=None, tokens=sequence.tokens[sequence.positions])
    scores = np.random.default_rng(0).random(SLOTS, np.float32)
    found = []
    for each in (sequence, short):
        env = KVEvictEnv([each])
        env.reset(options={"head": 1})
        found.append(env.step(scores)[1])
    assert found[0] == found[1]


def test_new_tokens_take_their_share_of_a_sample(sampled):
    sequence = open_traces(sampled)[0]
    continuation = replace(sequence.continuations[1], block=9, future=sequence.continuations[1].future[:, :, :, [0, 0]])
    env = KVEvictEnv([replace(sequence, continuations=(continuation,))], budget=0.5, sinks=0, recent=0)
    env.reset(seed=0, options={"head": 0})
    slots = [env.step(np.zeros(SLOTS))[4]["slots"] for _ in range(2)]
    assert slots == [20, 20 - 9 * SLOTS // 90]


@pytest.mark.parametrize("agent", ["rloo", "joint", "kvzap", "foresight"])
def test_agents_learn_from_samples(agent, sampled, tmp_path):
    policy = train(agent, sampled, tmp_path / "run", steps=2, every=2, hidden=8, contexts=2, progress=False)
    assert policy.lengths == (24, 90) and 0 < policy.training["held_out_reward"] <= 1


def test_who_needs_every_slot_says_so(sampled, tmp_path):
    traces, model = open_traces(sampled), tiny_model()
    with pytest.raises(
        UserError, match=r"policy 'snapkv' reads the attention .* holds 40 of 90: record without --slots"
    ):
        traces[0].view_for(make_policy("snapkv"), 0)
    for settings in ({"agent": "end_to_end"}, {"agent": "joint", "target": "layers"}):
        with pytest.raises(UserError, match="training through the model needs every slot"):
            train(**settings, traces=traces, out=tmp_path / "no", model=model, steps=1, progress=False)
    with pytest.raises(UserError, match=r"training on inputs .* needs every slot"):
        train("joint", traces, tmp_path / "no", inputs=("key", "attention"), steps=1, progress=False)
    with pytest.raises(UserError, match="target 'output' needs every slot"):
        output_change(traces[0], output_roots(model))
    with pytest.raises(UserError, match="decision_value needs every slot"):
        decision_value(["random"], "recency", traces, [0.5], split=None)
