"""Agents and how they learn."""

from kv_gym.training.export import export
from kv_gym.training.trainer import train

__all__ = ["export", "train"]
