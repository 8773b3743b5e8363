"""Eviction of whole pages: blocks of prompts that requests share, or web objects. The block level of kv_gym.

Beside ``KVEvict-v0``, which decides about single tokens of one head, ``KVPage-v0`` decides which block or object leaves
a cache that all requests share.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "PageCache": "kv_gym.pages.cache",
    "PagePolicy": "kv_gym.pages.policies.base",
    "QueuePolicy": "kv_gym.pages.policies.base",
    "PageRankingPolicy": "kv_gym.pages.policies.base",
    "RequestTrace": "kv_gym.pages.requests",
    "compare_page_policies": "kv_gym.pages.compare",
    "export_page_policy": "kv_gym.pages.policies.exported",
    "list_page_policies": "kv_gym.pages.policies.registry",
    "make_page_policy": "kv_gym.pages.policies.registry",
    "read_requests": "kv_gym.pages.readers",
    "simulate": "kv_gym.pages.simulator",
    "summarise_requests": "kv_gym.pages.compare",
    "train_pages": "kv_gym.training.pages.trainer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    # on first use: readers and simulator take numpy, agents take torch
    if name not in _HOMES:
        raise AttributeError(f"module 'kv_gym.pages' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
