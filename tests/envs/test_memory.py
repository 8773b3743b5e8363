"""Environment and training hold as many contexts in memory as a limit allows, and give the same whatever it is."""

import numpy as np
import pytest
import torch
from traced_models import some_prompt, tiny_model

from kv_gym.envs import KVEvictVectorEnv
from kv_gym.envs.context_arrays import ContextArrays
from kv_gym.errors import UserError
from kv_gym.traces import bounded_cache, open_traces, record
from kv_gym.traces.bounded_cache import BoundedCache, memory_limit
from kv_gym.training import train
from kv_gym.training.trainer import Trainer

PROMPTS = [some_prompt((5, 18), f"p{i}", seed=i, context=40 + 3 * i) for i in range(8)]
SMALL = 120_000 / 1e9  # about two contexts


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return record(tiny_model(), PROMPTS, tmp_path_factory.mktemp("traces") / "set", progress=False)


@pytest.fixture
def reads(monkeypatch, traces):
    """Ids of the contexts that are read from the disk."""
    found = []
    plain = type(traces)._read

    def read(self, entry):
        found.append(entry.id)
        return plain(self, entry)

    monkeypatch.setattr(type(traces), "_read", read)
    return found


def test_what_was_not_asked_for_the_longest_goes_first():
    cache, made = BoundedCache(10, int), []

    def get(key, size):
        return cache.get(key, lambda: made.append(key) or size)

    assert [get(*pair) for pair in (("a", 4), ("b", 4), ("a", 4), ("c", 6), ("b", 4))] == [4, 4, 4, 6, 4]
    assert made == ["a", "b", "c", "b"] and cache.bytes == 10 and cache.values() == [6, 4]
    assert get("huge", 99) == 99 and cache.values() == [99]
    with pytest.raises(UserError, match="memory is 0; expected gigabytes above 0"):
        memory_limit(0)
    assert memory_limit(1.5) == 1_500_000_000 and 0 < memory_limit(None) < bounded_cache.UNLIMITED


def test_rows_are_the_same_stacked_and_read_again():
    rng = np.random.default_rng(0)
    contexts = [
        {"a": rng.random((rows, 3, 2), np.float32), "b": rng.random((rows, 1), np.float32)} for rows in (2, 0, 3)
    ]
    shapes = {"a": (3, 2), "b": (1,)}
    wanted = np.array([4, 0, 1, 3, 0])
    stacked, one = (ContextArrays((2, 0, 3), shapes, contexts.__getitem__, limit) for limit in (140, 139))
    for name in shapes:
        expected = np.concatenate([context[name] for context in contexts])[wanted]
        assert np.array_equal(stacked.take(wanted)[name], expected) and np.array_equal(one.take(wanted)[name], expected)


@pytest.mark.parametrize("settings", [{}, {"budget": 0.5}, {"heads": "joint", "features": ("knorm",)}], ids=str)
def test_an_environment_plays_the_same_in_little_memory(settings, traces, reads):
    played = []
    for memory in (1.0, SMALL):
        env = KVEvictVectorEnv(6, traces, memory=memory, **settings)
        reads.clear()
        generator = np.random.default_rng(0)
        steps = [env.reset(seed=3)]
        steps += [env.step(generator.random(env.action_space.shape, np.float32)) for _ in range(4)]
        played.append(([step[0] for step in steps], [step[1] for step in steps[1:]], len(set(reads))))
    (seen, paid, none), (seen_again, paid_again, some) = played
    assert none == 0 and some > 2
    for a, b in zip(seen, seen_again, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert np.array_equal(paid, paid_again)


@pytest.mark.parametrize("agent", ["grpo", "foresight", "end_to_end"])
def test_training_is_the_same_in_little_memory(agent, traces, reads, tmp_path):
    settings = {"steps": 6, "every": 6, "hidden": 8, "contexts": 2, "progress": False}
    settings |= {"model": tiny_model()} if agent == "end_to_end" else {}
    settings |= {"init": train("rloo", traces, tmp_path / "init", **settings)}  # mean and scale are those of the start
    policies, counts = [], []
    for memory in (1.0, SMALL):
        reads.clear()
        policies.append(train(agent, traces, tmp_path / f"{memory}", memory=memory, **settings))
        counts.append(len(reads))
    assert counts[1] > counts[0]
    for a, b in zip(policies[0].network.parameters(), policies[1].network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_holds_no_more_than_its_limit(traces, tmp_path):
    kind = open_traces(traces.entries[0].path.parent)
    from kv_gym.training.registry import agent_settings

    trainer = Trainer("rloo", agent_settings("rloo", steps=4, hidden=8, contexts=2), 0, kind, memory=400_000)
    trainer.setup()
    held = [trainer.learner.contexts._cache.bytes]
    for _ in range(4):
        trainer.train_step()
        held.append(trainer.learner.contexts._cache.bytes)
    assert 0 < max(held) <= 200_000 and len(trainer.learner.contexts) == 7
    assert trainer.validation.cache.limit == 100_000
