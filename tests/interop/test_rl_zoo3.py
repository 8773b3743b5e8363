"""rl_zoo3: native batches in place of its environments, and settings that its loader and Stable-Baselines3 take."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from kv_gym.envs import KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.files import read_yaml
from kv_gym.interop.rl_zoo3 import DecisionSlots, _tune_rankings, main, native_batch
from kv_gym.training.sb3_policy import RankingPolicy, save_policy, stages_of

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "agents" / "rl_zoo3"


def make(**kwargs):
    return gym.make("KVEvict-v0", **kwargs)


def python_settings():
    spec = importlib.util.spec_from_file_location("zoo_settings", SETTINGS / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hyperparams["KVEvict-v0"]


def test_environments_become_one_native_batch(tmp_path):
    env = make_vec_env(make, 3, monitor_dir=str(tmp_path), env_kwargs={"index": True}, vec_env_cls=native_batch)
    assert isinstance(env, VecMonitor) and isinstance(env.unwrapped, KVEvictVecEnv) and env.num_envs == 3
    assert "decision" in env.reset()
    infos = env.step(env.unwrapped.env.action_space.sample())[3]
    assert all("episode" in info for info in infos)
    env.close()
    lines = (tmp_path / "0.monitor.csv").read_text().splitlines()
    assert len(lines) == 5  # comment, head, three episodes
    flat = make_vec_env(make, 2, wrapper_class=gym.wrappers.FlattenObservation, vec_env_cls=native_batch)
    assert isinstance(flat, DummyVecEnv) and flat.num_envs == 2  # what a wrapper changes, a native batch does not know


def test_settings_train_an_agent_that_can_be_exported(tmp_path):
    written, settings = read_yaml(SETTINGS / "ppo.yml")["KVEvict-v0"], python_settings()
    own = {"env_kwargs", "callback", "rollout_buffer_class", "rollout_buffer_kwargs", "policy_kwargs"}
    assert {name: value for name, value in settings.items() if name not in own} == {
        name: value for name, value in written.items() if name not in own
    }
    assert settings["policy"] == f"{RankingPolicy.__module__}.{RankingPolicy.__qualname__}"
    env = make_vec_env(make, 4, env_kwargs=settings["env_kwargs"], vec_env_cls=native_batch)
    assert settings["rollout_buffer_kwargs"]["stages"] == stages_of(env.observation_space, 0.5)
    options = {name: settings[name] for name in ("policy_kwargs", "rollout_buffer_class", "rollout_buffer_kwargs")}
    agent = PPO(RankingPolicy, env, n_steps=4, batch_size=16, n_epochs=1, gamma=0.0, device="cpu", **options)
    agent.learn(16, callback=DecisionSlots())
    assert (save_policy(agent, tmp_path / "policy") / "policy.json").is_file()
    with pytest.raises(UserError, match=r"serves a DecisionBuffer and the agent has DictRolloutBuffer"):
        PPO(RankingPolicy, env, n_steps=4, device="cpu").learn(1, callback=DecisionSlots())


def test_an_unknown_command_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kv_gym.interop.rl_zoo3", "fly"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "expected one of train, enjoy, push" in capsys.readouterr().err


class Trial:
    """What Optuna gives to a sampler; the first of the choices, the lower end of a range."""

    def suggest_categorical(self, name, choices):
        return choices[0]

    def suggest_float(self, name, low, high, log=False):
        return low


def test_trials_change_settings_that_a_ranking_has():
    manager, samplers = SimpleNamespace(objective=lambda self, trial: samplers["ppo"](trial, 1, 4, {})), {"ppo": None}
    converters = {"ppo": lambda sampled: "rl_zoo3's"}
    _tune_rankings(manager, samplers, converters)
    own = {"policy": "kv_gym.training.sb3_policy.RankingPolicy"}
    sampled = manager.objective(SimpleNamespace(_hyperparams=own, algo="ppo"), Trial())
    agent = PPO(RankingPolicy, KVEvictVecEnv(4), gamma=0.0, device="cpu", **sampled)
    assert agent.n_steps == 4 and converters["ppo"](sampled) == sampled
    assert converters["ppo"]({"net_arch": "tiny"}) == "rl_zoo3's"
    with pytest.raises(UserError, match="for ppo and not for trpo"):
        manager.objective(SimpleNamespace(_hyperparams=own, algo="trpo"), Trial())


@pytest.mark.slow
def test_rl_zoo3_itself_trains(tmp_path):
    pytest.importorskip("rl_zoo3", reason="needs rl_zoo3: make clients")
    command = [sys.executable, "-m", "kv_gym.interop.rl_zoo3", "train", "--algo", "ppo", "--env", "KVEvict-v0"]
    command += ["--conf-file", str(SETTINGS / "ppo.yml"), "--log-folder", str(tmp_path), "-n", "256"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    agent = PPO.load(tmp_path / "ppo" / "KVEvict-v0_1" / "KVEvict-v0.zip", device="cpu")
    assert isinstance(agent.policy, RankingPolicy)
