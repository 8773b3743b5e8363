"""kv_gym: a gym for KV-cache eviction. Record, replay, train, compare, export, decode.

Importing it registers the environments and loads nothing heavy; every name below is fetched on first use.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "CacheView": "kv_gym.cache_view",
    "EpisodicCache": "kv_gym.live",
    "EvictingCache": "kv_gym.live",
    "Policy": "kv_gym.policies",
    "list_policies": "kv_gym.policies",
    "make_policy": "kv_gym.policies",
    "open_traces": "kv_gym.traces",
    "record": "kv_gym.traces",
    "train": "kv_gym.training",
    "evaluate": "kv_gym.evaluation",
    "export": "kv_gym.training",
    "generate": "kv_gym.live",
    "push_to_hub": "kv_gym.publishing",
    "report": "kv_gym.evaluation",
    "leaderboard": "kv_gym.evaluation.leaderboard",
    "calibrate": "kv_gym.evaluation",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    from gymnasium.envs.registration import register

    register(
        "KVEvict-v0",
        entry_point="kv_gym.envs.kv_evict:KVEvictEnv",
        vector_entry_point="kv_gym.envs.kv_evict_vector:KVEvictVectorEnv",
    )
    register(
        "KVPage-v0",
        entry_point="kv_gym.envs.kv_page:KVPageEnv",
        vector_entry_point="kv_gym.envs.kv_page_vector:KVPageVectorEnv",
    )


_register()
