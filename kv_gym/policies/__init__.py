"""Eviction policies: objects that score the slots of a cache, higher = keep."""

from kv_gym.policies.base import Policy, StatefulPolicy, load_settings
from kv_gym.policies.registry import list_policies, make_policy

__all__ = ["Policy", "StatefulPolicy", "list_policies", "load_settings", "make_policy"]
