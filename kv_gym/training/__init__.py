"""Agents and their training."""

from kv_gym.training.registry import list_agents
from kv_gym.training.trainer import export, train

__all__ = ["export", "list_agents", "train"]
