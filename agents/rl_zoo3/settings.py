"""The settings of ppo.yml in rl_zoo3's Python form, with what YAML cannot name: a buffer that stores decisions.

    python -m kv_gym.interop.rl_zoo3 train --algo ppo --env KVEvict-v0 --conf-file agents/rl_zoo3/settings.py

A rollout then stores the ids of decisions instead of their keys and values, and PPO clips each draw of a ranking.
"""

from kv_gym.training.sb3_policy import DecisionBuffer

DRAWS = 128  # the most that a ranking of the bundled sample has: half of its longest context, see `stages_of`

hyperparams = {
    "KVEvict-v0": {
        "n_envs": 32,
        "n_timesteps": 40000,
        "policy": "kv_gym.training.sb3_policy.RankingPolicy",
        "policy_kwargs": {"hidden": 64, "prefix": 0.5, "sinks": 1, "recent": 1, "per_stage": True},
        "env_kwargs": {"index": True},
        "callback": "kv_gym.interop.rl_zoo3.DecisionSlots",
        "rollout_buffer_class": DecisionBuffer,
        "rollout_buffer_kwargs": {"stages": DRAWS},
        "n_steps": 8,
        "batch_size": 64,
        "n_epochs": 2,
        "gamma": 0.0,
        "learning_rate": 3.0e-3,
        "clip_range": 0.2,
    }
}
