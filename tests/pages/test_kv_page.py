"""KVPage-v0: both checkers, golden returns, true next states, and the batch beside the scalar environment."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

from kv_gym.envs import KVPageVecEnv
from kv_gym.errors import UserError
from kv_gym.pages import RequestTrace, simulate

INDEX = {"action": "index", "semantics": "objects", "reward": "belady", "horizon": 60}


def run(env, choose, start):
    observation, info = env.reset(options={"start": start})
    total, done = 0.0, False
    while not done:
        observation, reward, _, done, info = env.step(choose(observation))
        total += reward
    return total, info


def by_lru(observation):
    return -observation["age"]


def by_index(place):
    return lambda observation: min(place, int(observation["mask"].sum()) - 1)


@pytest.mark.parametrize("settings", [{"capacity": 200}, INDEX | {"capacity": 200, "drawn": 8}])
@pytest.mark.filterwarnings("error")
def test_both_checkers_are_silent(settings):
    for check in (check_env, check_env_of_sb3):
        env = gym.make("KVPage-v0", **settings).unwrapped
        env.action_space.seed(0)  # the checkers draw numbers of candidates that there may not be
        check(env)


@pytest.mark.parametrize(
    ("settings", "choose", "expected"),
    [
        ({"horizon": 60}, by_lru, (99.0, 99, 1363, 1264)),
        ({"horizon": 60}, lambda observation: -observation["depth"], (99.0, 99, 1363, 1264)),
        (INDEX, by_index(0), (-33.596487, 99, 1363, 1264)),
        (INDEX, by_index(7), (-50.240921, 106, 1363, 1257)),
    ],
)
def test_returns_are_frozen(settings, choose, expected):
    total, info = run(gym.make("KVPage-v0", **settings), choose, 500)
    assert (round(total, 6), info["total_hits"], info["accesses"], info["evictions"]) == expected


@pytest.mark.parametrize("semantics", ["prefix", "objects"])
def test_lru_in_the_environment_is_lru_in_the_simulator(semantics):
    """From the first request on the cache is empty, so that both see the same."""
    random = np.random.default_rng(0)
    chains = [random.integers(0, 30, 4).tolist() for _ in range(200)]
    trace = RequestTrace.from_keys(np.ravel(chains).tolist(), "drawn", starts=range(0, 800, 4))
    env = gym.make("KVPage-v0", requests=trace, capacity=12, semantics=semantics, horizon=200)
    policy = "vllm_prefix_lru" if semantics == "prefix" else "lru"
    _, info = run(env, lambda observation: np.arange(16), 0)
    assert info["total_hits"] == simulate(trace, policy, 12, semantics).hits


def test_the_next_state_is_the_caches():
    """What was evicted is gone, and what was kept is found, by hand."""
    trace = RequestTrace.from_keys(list("abcab"), "abcab")
    env = gym.make(
        "KVPage-v0", requests=trace, capacity=2, candidates=2, semantics="objects", action="index", horizon=5
    )
    observation, _ = env.reset(options={"start": 0})  # c comes in; a and b are there
    assert observation["age"] == pytest.approx(np.log1p([2, 1]) / 10) and observation["mask"].tolist() == [1, 1]
    observation, reward, _, done, info = env.step(1)  # b leaves: a hits, then b needs room
    assert (reward, done, info["total_hits"]) == (1.0, False, 1)
    _, reward, _, done, info = env.step(0)
    assert (reward, done, info["total_hits"], info["accesses"]) == (0.0, True, 1, 5)


def test_belady_rewards_by_hand():
    trace = RequestTrace.from_keys(list("abcab"), "abcab")
    for place, expected in ((1, 0.0), (0, np.log1p(1) / np.log1p(2) - 1)):
        env = gym.make(
            "KVPage-v0", requests=trace, capacity=2, candidates=2, semantics="objects", action="index",
            reward="belady", horizon=5,
        )  # fmt: skip
        env.reset(options={"start": 0})
        assert env.step(place)[1] == pytest.approx(expected)


def test_drawn_candidates_are_those_of_the_seed():
    """The least recently used pages come first, then others, which another seed draws otherwise."""
    keys = [key for i in range(300) for key in (i, i % 7)]
    trace = RequestTrace.from_keys(keys, "some come back")
    plain = {"requests": trace, "capacity": 100, "semantics": "objects", "candidates": 8}
    tail, drawn = gym.make("KVPage-v0", **plain), gym.make("KVPage-v0", **plain, drawn=5)
    old, _ = tail.reset(seed=0, options={"start": 300})
    shown = [drawn.reset(seed=seed, options={"start": 300})[0] for seed in (0, 0, 1)]
    assert all((one["age"][:3] == old["age"][:3]).all() and (one["age"][3:] >= 0).all() for one in shown)
    assert (shown[0]["age"] == shown[1]["age"]).all() and (shown[0]["age"] != shown[2]["age"]).any()


def test_the_batch_is_many_scalar_ones():
    batch = gym.make_vec("KVPage-v0", num_envs=2, horizon=20)
    observations, _ = batch.reset(options={"start": [300, 700]})
    singles = [gym.make("KVPage-v0", horizon=20) for _ in range(2)]
    ours = [env.reset(options={"start": start})[0] for env, start in zip(singles, (300, 700), strict=True)]
    live = [True, True]
    for _ in range(30):
        for i in range(2):
            if live[i]:
                assert all((observations[key][i] == ours[i][key]).all() for key in ours[i])
        actions = np.random.default_rng(1).random((2, 16)).astype(np.float32)
        observations, rewards, _, over, infos = batch.step(actions)
        for i in range(2):
            if live[i]:
                ours[i], reward, _, done, info = singles[i].step(actions[i])
                assert (reward, done) == (rewards[i], over[i])
                held = infos["final_info"] if done else infos
                assert held["total_hits"][i] == info["total_hits"]
                live[i] = not done
    assert batch.action_masks().shape == (2, 16)


def test_steps_of_the_sb3_batch_are_those_of_the_scalar_environment():
    batch, single = KVPageVecEnv(2, horizon=20), gym.make("KVPage-v0", horizon=20)
    batch.set_options([{"start": 300}, {"start": 700}])
    observations = batch.reset()
    assert [info["start"] for info in batch.reset_infos] == [300, 700]
    observation, _ = single.reset(options={"start": 300})
    over, actions = False, np.arange(16, dtype=np.float32)
    while not over:
        assert all((observations[key][0] == observation[key]).all() for key in observation)
        observations, rewards, dones, infos = batch.step(np.stack((actions, actions)))
        observation, reward, _, over, info = single.step(actions)
        assert (rewards[0], dones[0], infos[0]["total_hits"]) == (reward, over, info["total_hits"])
        assert ("terminal_observation" in infos[0]) == over
    assert all((infos[0]["terminal_observation"][key] == observation[key]).all() for key in observation)
    assert infos[0]["TimeLimit.truncated"] is True and infos[0]["terminal_observation"]["mask"].any()
    assert observations["mask"][0].any()  # begun again
    assert batch.get_images() == [None, None]
    masks = batch.env_method("action_masks")  # as MaskablePPO asks for them
    np.testing.assert_array_equal(np.stack(masks), observations["mask"].astype(bool))


def test_lru_stands_in_for_late_decisions():
    """Every second decision takes a second too much, by a clock that only the test moves."""
    keys = np.random.default_rng(0).integers(0, 40, 300).tolist()
    rules = {"requests": RequestTrace.from_keys(keys, "drawn"), "capacity": 12, "semantics": "objects", "horizon": 200}
    env, free = (gym.make("KVPage-v0", **rules, limit=limit, action="index").unwrapped for limit in (0.5, 0.0))
    batch = gym.make_vec("KVPage-v0", num_envs=2, **rules, limit=0.5, action="index").unwrapped
    now = [0.0]
    env.timer.clock = batch.timer.clock = free.timer.clock = lambda: now[0]
    for each, start in ((env, 50), (free, 50), (batch, [50, 80])):
        _, info = each.reset(options={"start": start})
    assert info["late_share"].tolist() == [0.0, 0.0]
    for number in range(20):
        now[0] += 1.0 if number % 2 else 0.25
        observation, reward, *_, info = env.step(7)
        _, expected, *_, alone = free.step(0 if number % 2 else 7)
        observations, rewards, *_, infos = batch.step(np.array([7, 7]))
        assert reward == expected == rewards[0] and (observations["age"][0] == observation["age"]).all()
    assert info["late_share"] == 0.5 == infos["late_share"][1] and alone["late_share"] == 0.0


def test_ppo_trains_on_index_actions():
    env = KVPageVecEnv(4, **INDEX)
    agent = PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = [weight.clone() for weight in agent.policy.parameters()]
    agent.learn(64)
    assert agent.num_timesteps == 64
    assert any((old != new).any() for old, new in zip(before, agent.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"semantics": "blocks"}, "semantics 'blocks' is not known"),
        ({"action": "name"}, "action 'name' is not known"),
        ({"reward": "cost"}, "reward 'cost' is not known"),
        ({"candidates": 1}, "nothing to decide"),
        ({"drawn": 16}, "16 of 16 candidates cannot be drawn"),
        ({"horizon": 0}, "serves no request"),
        ({"limit": -1.0}, "a limit of -1.0 seconds"),
        ({"capacity": 0}, "holds nothing"),
        ({"capacity": 10**9}, "nothing ever leaves"),
        ({"features": ["age", "colour"]}, "expected some of age"),
        ({"part": (0.5, 0.2)}, "no stretch of the trace"),
        ({"requests": "no/such/file"}, "there is no file"),
        ({"render_mode": "human"}, "render_mode 'human' is not known"),
    ],
)
def test_mistakes_are_one_sentence(settings, complaint):
    from kv_gym.envs.kv_page import KVPageEnv

    with pytest.raises(UserError, match=complaint):
        KVPageEnv(**settings)


def test_a_number_without_a_candidate_evicts_the_least_recently_used():
    ends = []
    for number in (0, 15):
        env = gym.make("KVPage-v0", **INDEX | {"capacity": 200, "drawn": 8}).unwrapped
        env.reset(seed=0)
        while int(env.action_masks().sum()) == 16:
            env.step(0)
        ends.append(env.step(number)[1:])
    assert ends[0] == ends[1]


def test_actions_that_name_nobody_are_refused():
    env = gym.make("KVPage-v0", **INDEX, disable_env_checker=True).unwrapped
    with pytest.raises(UserError, match="before reset"):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(UserError, match="names candidate 16; expected a number below 16"):
        env.step(16)
    with pytest.raises(UserError, match="unknown reset option head"):
        env.reset(options={"head": 1})
    with pytest.raises(UserError, match="start 99999 is outside"):
        env.reset(options={"start": 99999})
