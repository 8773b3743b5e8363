"""Agents and how they learn."""

from kv_gym.training.fit import train

__all__ = ["train"]
