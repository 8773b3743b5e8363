"""The Gymnasium environments KVEvict-v0 and KVPage-v0, scalar, as native batches, and for Stable-Baselines3."""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "KVEvictEnv": "kv_gym.envs.kv_evict",
    "KVEvictVecEnv": "kv_gym.envs.sb3",
    "KVEvictVectorEnv": "kv_gym.envs.kv_evict_vector",
    "KVPageEnv": "kv_gym.envs.kv_page",
    "KVPageVecEnv": "kv_gym.envs.sb3",
    "KVPageVectorEnv": "kv_gym.envs.kv_page_vector",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    # on first use: Stable-Baselines3 takes a while to load, and not everybody wants it
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.envs' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
