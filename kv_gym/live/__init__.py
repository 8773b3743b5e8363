"""Live decoding: a transformers cache that evicts while the model reads and writes."""

import warnings

from kv_gym.live.cache import EvictingCache
from kv_gym.live.captured_steps import CapturedSteps
from kv_gym.live.config import CacheConfig, PolicyGroup
from kv_gym.live.conversation import Conversation, chat
from kv_gym.live.episodes import Episodes, conversation_windows, model_embedding, sentence_embedding
from kv_gym.live.episodic_cache import EpisodicCache
from kv_gym.live.generate import Generated, generate
from kv_gym.live.guard import Guard
from kv_gym.live.ragged_attention import ragged_backend

__all__ = [
    "CacheConfig",
    "CapturedSteps",
    "Conversation",
    "Episodes",
    "EpisodicCache",
    "EvictingCache",
    "Generated",
    "Guard",
    "PolicyGroup",
    "chat",
    "conversation_windows",
    "generate",
    "model_embedding",
    "ragged_backend",
    "sentence_embedding",
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
