"""Eviction policies: objects that score the slots of a cache, higher = keep."""

from kv_gym.policies.base import Paper, Policy, StatefulPolicy, load_settings
from kv_gym.policies.registry import current_name, list_policies, make_policy, policy_class

__all__ = [
    "Paper",
    "Policy",
    "StatefulPolicy",
    "current_name",
    "list_policies",
    "load_settings",
    "make_policy",
    "policy_class",
]
