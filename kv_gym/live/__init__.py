"""Live decoding: a transformers cache that evicts while the model reads and writes."""

from kv_gym.live.cache import EvictingCache

__all__ = ["EvictingCache"]
