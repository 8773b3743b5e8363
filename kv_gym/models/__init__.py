"""All that touches a transformers model: loading, attention, hidden states, fingerprints, the second reading."""

from __future__ import annotations

from importlib import import_module

# name -> the module it lives in, imported on first use: transformers takes seconds
_HOMES = {"Fingerprint": "fingerprint", "load_model": "loading", "token_rows": "loading"}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.models' has no attribute {name!r}")
    return getattr(import_module(f"kv_gym.models.{_HOMES[name]}"), name)
