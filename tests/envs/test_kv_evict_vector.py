"""The native batch equals the scalar environment, resets within the step, and puts groups into one state."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from env_traces import random_contexts
from gymnasium.vector import AutoresetMode

import kv_gym  # noqa: F401
from kv_gym.envs.kv_evict_vector import KVEvictVectorEnv
from kv_gym.errors import UserError

SETTINGS = [{}, {"heads": "joint", "sinks": 3}, {"budget": 4}, {"budget": 0.5, "heads": "joint"}, {"index": True}]


def uneven_traces():
    """Continuations of one and of three blocks, so that episodes end at different times."""
    return random_contexts() + random_contexts(lengths=(16,), queries=2, seed=9)


def test_make_vec_gives_the_native_batch():
    env = gym.make_vec("KVEvict-v0", num_envs=6, traces=uneven_traces(), group=3)
    assert isinstance(env, KVEvictVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.observation_space["key"].shape == (6, 16, 4) and env.action_space.shape == (6, 16)


def scalar_environment(settings, infos, row):
    env = gym.make("KVEvict-v0", traces=uneven_traces(), **settings).unwrapped
    names = ("sequence", "head", "continuation") if "budget" in settings else ("sequence", "head")
    observation, info = env.reset(options={name: int(infos[name][row]) for name in names})
    return env, observation, info


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_reward_is_that_of_the_scalar_environment(settings):
    batch = gym.make_vec("KVEvict-v0", num_envs=5, traces=uneven_traces(), **settings)
    observations, infos = batch.reset(seed=4)
    scalars = [scalar_environment(settings, infos, row) for row in range(5)]
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(8):
        for row, (_, observation, _) in enumerate(scalars):
            for name, array in observation.items():
                np.testing.assert_array_equal(observations[name][row], array)
        actions = rng.uniform(-1, 1, batch.action_space.shape).round(1).astype(np.float32)
        observations, rewards, terminations, truncations, infos = batch.step(actions)
        assert observations in batch.observation_space and not truncations.any()
        for row, (env, _, _) in enumerate(scalars):
            observation, reward, terminated, _, info = env.step(actions[row])
            assert (rewards[row], bool(terminations[row])) == (reward, terminated)
            final = infos["final_info"] if terminated else infos
            for name, number in info.items():
                assert final[f"_{name}"][row]
                np.testing.assert_array_equal(final[name][row], number)
            scalars[row] = (env, observation, info)
            if terminated:
                ended += 1
                assert infos["_final_obs"][row] and infos["_final_info"][row]
                for name, array in observation.items():
                    np.testing.assert_array_equal(infos["final_obs"][row][name], array)
                scalars[row] = scalar_environment(settings, infos, row)
            else:
                assert "_final_obs" not in infos or not infos["_final_obs"][row]
    assert ended >= 5


@pytest.mark.parametrize("settings", [{}, {"budget": 4}, {"heads": "joint"}])
def test_a_group_starts_in_one_state(settings):
    env = gym.make_vec("KVEvict-v0", num_envs=6, group=3, traces=uneven_traces(), index=True, **settings)
    env.reset(seed=1)
    starts = set()
    for _ in range(12):
        observations, _, ended, _, _ = env.step(env.action_space.sample())
        np.testing.assert_array_equal(ended.reshape(2, 3), ended[::3, None].repeat(3, 1))
        for group in np.flatnonzero(ended[::3]):
            copies = slice(3 * group, 3 * group + 3)
            for array in observations.values():
                assert (array[copies] == array[copies][:1]).all()
            starts.add(int(observations["decision"][3 * group, 0]))
    assert len(starts) > 1


def test_sequential_batches_deal_every_head_once():
    env = gym.make_vec("KVEvict-v0", num_envs=4, traces=uneven_traces(), order="sequential")
    _, infos = env.reset(seed=0)
    shown = []
    for _ in range(4):
        shown += list(zip(infos["sequence"].tolist(), infos["head"].tolist(), strict=True))
        *_, infos = env.step(env.action_space.sample())
    assert shown == [(s, h) for s in range(4) for h in range(4)]


def test_options_for_all_or_for_each_group():
    env = gym.make_vec("KVEvict-v0", num_envs=4, group=2, traces=uneven_traces())
    _, infos = env.reset(options={"sequence": 2})
    assert infos["sequence"].tolist() == [2] * 4
    _, infos = env.reset(options={"sequence": [1, 0], "head": 3})
    assert infos["sequence"].tolist() == [1, 1, 0, 0] and infos["head"].tolist() == [3] * 4
    with pytest.raises(UserError, match="expected 2 numbers"):
        env.reset(options={"sequence": [1, 0, 0]})


@pytest.mark.parametrize("settings", [{}, {"budget": 4}, {"budget": 0.5, "heads": "joint"}])
def test_an_observation_comes_back_from_its_decision(settings):
    env = gym.make_vec("KVEvict-v0", num_envs=4, traces=uneven_traces(), index=True, **settings)
    observations, _ = env.reset(seed=2)
    for _ in range(3):
        again = env.slots(observations["decision"], observations["mask"])
        assert again.keys() == observations.keys()
        for name, array in observations.items():
            np.testing.assert_array_equal(again[name], array)
        observations, *_ = env.step(env.action_space.sample())


def test_a_seed_fixes_the_batch_and_arrays_are_new():
    env = gym.make_vec("KVEvict-v0", num_envs=4, traces=uneven_traces())
    first, _ = env.reset(seed=3)
    actions = np.zeros(env.action_space.shape, np.float32)
    after = env.step(actions)[0]
    assert not any(np.shares_memory(first[name], after[name]) for name in first)
    again, _ = env.reset(seed=3)
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    for name, array in env.step(actions)[0].items():
        np.testing.assert_array_equal(after[name], array)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiple of the group"):
        gym.make_vec("KVEvict-v0", num_envs=4, group=3, traces=uneven_traces())
    with pytest.raises(UserError, match="call reset first"):
        gym.make_vec("KVEvict-v0", num_envs=2, traces=uneven_traces()).step(np.zeros((2, 16), np.float32))


def test_every_environment_is_rendered():
    env = gym.make_vec("KVEvict-v0", num_envs=2, traces=uneven_traces(), render_mode="ansi")
    env.reset(options={"sequence": [0, 1]})
    env.step(env.action_space.sample())
    first, second = env.render()
    assert first.startswith("context 0") and second.startswith("context 1")


def sync(mode=AutoresetMode.NEXT_STEP, **settings):
    return gym.make_vec(
        "KVEvict-v0", num_envs=2, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode},
        traces=random_contexts(), **settings,
    )  # fmt: skip


def test_a_vector_environment_whose_resets_take_steps_is_warned_about():
    with pytest.warns(UserWarning, match="every second transition is an empty reset.*SAME_STEP"):
        sync().reset(seed=0)


@pytest.mark.parametrize("settings", [{"mode": AutoresetMode.SAME_STEP}, {"budget": 4}])
def test_other_vector_environments_are_not(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = sync(**settings)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.reset()
