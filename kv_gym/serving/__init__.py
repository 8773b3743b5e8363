"""An OpenAI-compatible server with one evicting cache per conversation. Importing it loads nothing heavy."""

from __future__ import annotations

from importlib import import_module

_HOMES = {"Server": "kv_gym.serving.server", "make_server": "kv_gym.serving.server"}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.serving' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
