"""Live decoding: a transformers cache that evicts while the model reads and writes."""

from kv_gym.live.cache import EvictingCache
from kv_gym.live.generate import Generated, generate
from kv_gym.live.guard import Guard
from kv_gym.live.panel import Panel

__all__ = ["EvictingCache", "Generated", "Guard", "Panel", "generate"]
