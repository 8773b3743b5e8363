"""rl_zoo3 on KVEvict-v0: its commands, with native batches, and callbacks for its settings files.

    python -m kv_gym.interop.rl_zoo3 train --algo ppo --env KVEvict-v0 --conf-file agents/rl_zoo3/ppo.yml
    python -m kv_gym.interop.rl_zoo3 train --algo ppo --env KVEvict-v0 --conf-file agents/rl_zoo3/ppo.yml --optimize
    python -m kv_gym.interop.rl_zoo3 enjoy --algo ppo --env KVEvict-v0 --folder logs --no-render
    python -m kv_gym.interop.rl_zoo3 push --algo ppo --env KVEvict-v0 --folder logs -orga OWNER

All options are rl_zoo3's (github.com/DLR-RM/rl-baselines3-zoo), such as ``--n-trials`` and ``--env-kwargs``.
Nothing here is needed for its own commands with ``--gym-packages kv_gym``: these run one environment after the other,
of which each reads the traces. :func:`kv_gym.training.sb3_policy.save_policy` exports what was trained for live use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from runpy import run_module
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from kv_gym.envs import KVEvictEnv, KVEvictVecEnv
from kv_gym.errors import UserError
from kv_gym.training.sb3_policy import DecisionBuffer


class DecisionSlots(BaseCallback):
    """Gives a :class:`~kv_gym.training.sb3_policy.DecisionBuffer` the batch that makes its observations again.

    In a settings file: ``callback: kv_gym.interop.rl_zoo3.DecisionSlots``, with ``env_kwargs: {index: true}``.

    Raises:
        UserError: another buffer, or environments that are no native batch.
    """

    def _init_callback(self) -> None:
        buffer = getattr(self.model, "rollout_buffer", None)
        if not isinstance(buffer, DecisionBuffer):
            raise UserError(
                f"DecisionSlots serves a DecisionBuffer and the agent has {type(buffer).__name__}: set "
                "rollout_buffer_class, which needs settings in Python (agents/rl_zoo3/settings.py)"
            )
        if not isinstance(self.training_env.unwrapped, KVEvictVecEnv):
            raise UserError(
                "a DecisionBuffer needs the native batch: run python -m kv_gym.interop.rl_zoo3 instead of rl_zoo3"
            )
        buffer.slots = self.training_env.get_attr("slots")[0]

    def _on_step(self) -> bool:
        return True


def native_batch(env_fns: Sequence[Callable[[], gym.Env]], **settings: Any) -> VecEnv:
    """As many environments as there are functions: one native batch where these make KVEvict-v0 without wrappers.

    Args:
        env_fns: each makes an environment; all alike.
        **settings: of the `DummyVecEnv` for others.
    """
    env = env_fns[0]()
    monitor, inner = env, env
    while isinstance(inner, Monitor | OrderEnforcing | PassiveEnvChecker):
        inner = inner.env
    spec = inner.spec
    if type(inner) is not KVEvictEnv or spec is None:
        env.close()
        return DummyVecEnv(list(env_fns), **settings)
    writer = monitor.results_writer if isinstance(monitor, Monitor) else None
    file = None if writer is None else writer.file_handler.name
    env.close()
    batch = KVEvictVecEnv(len(env_fns), **spec.kwargs)
    return VecMonitor(batch, file)


def sample_ranking_ppo(trial: Any, *_: Any) -> dict[str, Any]:
    """Settings of PPO with a `RankingPolicy` to try in ``train --optimize``; all others stay those of the file.

    rl_zoo3's own ranges are for `MlpPolicy`: they would replace ``policy_kwargs`` by a ``net_arch``, discount episodes
    of one step, and store up to 4,096 observations, of every key and value, per environment.

    Args:
        trial: of Optuna.
    """
    return {
        "n_steps": trial.suggest_categorical("n_steps", [4, 8, 16]),
        "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
        "n_epochs": trial.suggest_categorical("n_epochs", [1, 2, 4]),
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        "clip_range": trial.suggest_categorical("clip_range", [0.1, 0.2, 0.3]),
        "ent_coef": trial.suggest_float("ent_coef", 1e-8, 1e-2, log=True),
    }


def _tune_rankings(manager: Any, samplers: dict[str, Any], converters: dict[str, Any]) -> None:
    """Let trials of a `RankingPolicy` sample settings that it has, and a trial's settings be loaded again."""
    objective, convert = manager.objective, converters["ppo"]

    def ranking_objective(self: Any, trial: Any) -> float:
        if "RankingPolicy" in str(self._hyperparams["policy"]):
            if self.algo != "ppo":
                raise UserError(f"--optimize of a RankingPolicy knows ranges for ppo and not for {self.algo}: use ppo")
            samplers["ppo"] = sample_ranking_ppo
        return objective(self, trial)

    manager.objective = ranking_objective
    converters["ppo"] = lambda sampled: convert(sampled) if "net_arch" in sampled else sampled


def main() -> None:
    """Run a command of rl_zoo3 with native batches; a user's mistake is one sentence and exit code 2."""
    commands = {"train": "rl_zoo3.train", "enjoy": "rl_zoo3.enjoy", "push": "rl_zoo3.push_to_hub"}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if name not in commands:
            raise UserError(f"rl_zoo3 command {name!r} is unknown; expected one of {', '.join(commands)}")
        try:
            from rl_zoo3.exp_manager import ExperimentManager
            from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
        except ImportError:
            raise UserError("rl_zoo3 is not installed here: pip install rl_zoo3, or make clients") from None
        ExperimentManager.default_vec_env_cls = staticmethod(native_batch)
        _tune_rankings(ExperimentManager, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER)
        sys.argv[:2] = [commands[name]]
        run_module(commands[name], run_name="__main__")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
