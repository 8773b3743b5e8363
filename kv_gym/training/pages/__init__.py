"""Agents for page caches; each file but `agent`, `network`, `recording` and `trainer` holds one."""

from kv_gym.training.pages.trainer import list_page_agents, train_pages

__all__ = ["list_page_agents", "train_pages"]
