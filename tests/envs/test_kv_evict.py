"""The scalar environment: the checkers of Gymnasium and Stable-Baselines3, observations, seeds, and errors."""

import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from env_traces import one_head, random_contexts
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import kv_gym  # noqa: F401
from kv_gym.envs.observations import BOUND
from kv_gym.errors import UserError

SETTINGS = [
    {},
    {"heads": "joint"},
    {"heads": [(1, 0)], "index": True, "features": ("knorm", "recency")},
    {"budget": 4},
    {"budget": 0.5, "heads": "joint", "order": "sequential"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gymnasium_checker_is_silent(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no window can be opened here")  # render_mode="human" without a display
        env = gym.make("KVEvict-v0", traces=random_contexts(), **settings)
        check_env(env.unwrapped)
    assert env.unwrapped.spec.id == "KVEvict-v0"


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_sb3_checker_only_warns_about_unconventional_shapes(settings):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_env_sb3(gym.make("KVEvict-v0", traces=random_contexts(), **settings))
    assert warned and all("unconventional shape" in str(one.message) for one in warned)


def test_observations_show_what_was_recorded():
    traces = random_contexts()
    env = gym.make("KVEvict-v0", traces=traces, features=("knorm",)).unwrapped
    observation, info = env.reset(options={"sequence": 1, "head": 2})
    assert env.heads[2] == (1, 0)
    np.testing.assert_array_equal(observation["key"][:9], traces[1].keys[1, 0])
    np.testing.assert_array_equal(observation["value"][:9], traces[1].values[1, 0])
    assert observation["position"].tolist() == [*range(9), *[-1] * 7]
    assert observation["mask"].tolist() == [1] * 9 + [0] * 7
    assert observation["head"] == 2 and info["sequence"] == 1 and info["head"] == 2
    assert not observation["key"][9:].any()
    norms = -np.linalg.norm(traces[1].keys[1, 0], axis=-1)
    np.testing.assert_allclose(observation["features"][:9, 0], norms, rtol=1e-5)


def test_joint_observations_show_head_after_head():
    (trace,) = random_contexts(lengths=(9,))
    observation, _ = gym.make("KVEvict-v0", traces=[trace], heads="joint").reset()
    np.testing.assert_array_equal(observation["key"], trace.keys.reshape(36, 4))
    assert observation["head"].tolist() == np.repeat(range(4), 9).tolist()
    assert observation["position"].tolist() == [*range(9)] * 4


def test_numbers_out_of_bounds_are_clipped_and_counted():
    trace = one_head([0.4, 0.1, 0.3, 0.2])
    keys = trace.keys.copy()
    keys[0, 0, 1] = 1e6, -1e6
    env = gym.make("KVEvict-v0", traces=[replace(trace, keys=keys)])
    observation, info = env.reset()
    assert observation["key"][1].tolist() == [BOUND, -BOUND] and info["clipped"] == 2
    assert keys[0, 0, 1, 0] == 1e6  # the recording itself is left alone


def test_a_seed_fixes_everything_that_follows():
    env = gym.make("KVEvict-v0", traces=random_contexts())

    def shown(seed):
        first = env.reset(seed=seed)[1]
        return [(info["sequence"], info["head"]) for info in [first] + [env.reset()[1] for _ in range(12)]]

    assert shown(5) == shown(5)
    assert shown(5) != shown(6)


def test_sequential_order_walks_through_all_heads():
    env = gym.make("KVEvict-v0", traces=random_contexts(), order="sequential")
    shown = [env.reset(seed=0)[1]] + [env.reset()[1] for _ in range(12)]
    pairs = [(info["sequence"], info["head"]) for info in shown]
    assert pairs == [(s, h) for s in range(3) for h in range(4)] + [(0, 0)]


def test_returned_arrays_are_copies():
    env = gym.make("KVEvict-v0", traces=random_contexts())
    first, _ = env.reset(options={"sequence": 0, "head": 1})
    kept = first["key"].copy()
    first["key"][:] = 7
    again, _ = env.reset(options={"sequence": 0, "head": 1})
    np.testing.assert_array_equal(again["key"], kept)


@pytest.mark.filterwarnings("ignore:.*render_mode")  # Gymnasium warns before we refuse
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"traces": []}, "holds no context"),
        ({"heads": [(7, 0)]}, r"head \(7, 0\) is not in the traces"),
        ({"heads": "some"}, "expected 'all', 'joint'"),
        ({"max_tokens": 12}, "has 16 tokens and max_tokens is 12"),
        ({"budget": 0}, "not above zero"),
        ({"budget": 1.5}, "a share above 1"),
        ({"budget_weights": "linear"}, "expected 'log'"),
        ({"budget_weights": {0.5: 0.0}}, "not all positive"),
        ({"utility": "magic"}, "expected 'attention'"),
        ({"order": "sorted"}, "expected 'random'"),
        ({"sinks": -1}, "expected numbers from 0"),
        ({"render_mode": "svg"}, "render_mode is 'svg'"),
        ({"features": ("h2o",)}, "record with --stats h2o"),
        ({"features": ("snapkv",)}, "record with --window 32"),
        ({"traces": random_contexts() + random_contexts(heads=1)}, "one model at a time"),
        ({"traces": random_contexts(continuations=0)}, "record them with continuations"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(settings, message):
    with pytest.raises(UserError, match=message) as error:
        gym.make("KVEvict-v0", **({"traces": random_contexts()} | settings))
    assert "\n" not in str(error.value)


def test_reset_options_without_a_matching_episode_are_refused():
    env = gym.make("KVEvict-v0", traces=random_contexts())
    with pytest.raises(UserError, match="no episode has sequence 3"):
        env.reset(options={"sequence": 3})
    with pytest.raises(UserError, match="unknown reset option 'layer'"):
        env.reset(options={"layer": 0})


def test_steps_outside_an_episode_and_actions_of_wrong_shape_are_refused():
    env = gym.make("KVEvict-v0", traces=random_contexts()).unwrapped
    with pytest.raises(UserError, match="call reset first"):
        env.step(env.action_space.sample())
    env.reset()
    with pytest.raises(UserError, match="one score per slot"):
        env.step(np.zeros(5, np.float32))
    env.step(env.action_space.sample())
    with pytest.raises(UserError, match="call reset first"):
        env.step(env.action_space.sample())


class Tokenizer:
    """Names every token by its id."""

    def convert_ids_to_tokens(self, ids):
        return [f"w{token}" for token in ids]


def test_text_shows_which_tokens_stay_at_each_budget():
    env = gym.make(
        "KVEvict-v0",
        traces=[one_head([0.4, 0.1, 0.3, 0.2])],
        sinks=0,
        recent=0,
        render_mode="ansi",
        tokenizer=Tokenizer(),
    )
    env.reset()
    assert "w10 w11 w12 w13" in env.render()
    env.step(np.array([-0.5, -1, 1, 0.5], np.float32))
    lines = env.render().splitlines()
    assert lines[1] == "[1/2 = 2] 2 of 4 slots stay" and lines[2].strip() == "·· w12 w13"
    assert lines[3] == "[1/4 = 1] 1 of 4 slots stay" and lines[4].strip() == "·· w12·"


def test_text_shows_the_cache_in_eviction_mode():
    env = gym.make("KVEvict-v0", traces=random_contexts(), budget=4, sinks=0, recent=0, render_mode="ansi")
    env.reset(options={"sequence": 1})
    env.step(np.linspace(-1, 1, 16, dtype=np.float32))
    assert "4 of 9 slots stay" in env.render()


@pytest.mark.parametrize("heads", ["all", "joint"])
def test_pictures_are_pictures(heads):
    env = gym.make("KVEvict-v0", traces=random_contexts(), heads=heads, render_mode="rgb_array")
    env.reset()
    before = env.render()
    env.step(env.action_space.sample())
    after = env.render()
    assert after.dtype == np.uint8 and after.ndim == 3 and after.shape[2] == 3
    assert before.shape != after.shape or (before != after).any()
