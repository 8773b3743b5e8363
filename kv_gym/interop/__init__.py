"""Policies in other libraries: kvpress, lm-evaluation-harness, tensors for engines. Importing it loads nothing."""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "KVGymLM": "kv_gym.interop.lm_eval",
    "PolicyPress": "kv_gym.interop.kvpress",
    "export_tensors": "kv_gym.interop.tensors",
    "score_numpy": "kv_gym.interop.tensors",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.interop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
