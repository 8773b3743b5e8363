"""Live decoding: a transformers cache that evicts while the model reads and writes."""

import warnings

from kv_gym.live.cache import EvictingCache
from kv_gym.live.captured_steps import CapturedSteps
from kv_gym.live.config import CacheConfig, PolicyGroup
from kv_gym.live.conversation import Conversation, chat
from kv_gym.live.generate import Generated, generate
from kv_gym.live.guard import Guard
from kv_gym.live.ragged_attention import ragged_backend

__all__ = [
    "CacheConfig",
    "CapturedSteps",
    "Conversation",
    "EvictingCache",
    "Generated",
    "Guard",
    "PolicyGroup",
    "chat",
    "generate",
    "ragged_backend",
]


def __getattr__(name: str):
    if name != "Panel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "kv_gym.live.Panel is now called PolicyGroup; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=2,
    )
    return PolicyGroup
