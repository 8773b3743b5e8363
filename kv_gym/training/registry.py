"""Agents by name: the module ``kv_gym/training/<name>.py`` holds its learner, ``agents/<name>.yml`` its settings."""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import bundled, only_class, read_yaml, validated
from kv_gym.training.learner import Learner, Settings


def list_agents() -> list[str]:
    """Names of all agents, sorted: every ``agents/*.yml`` is one."""
    return sorted(file.stem for file in bundled("agents").glob("*.yml"))


def learner_class(agent: str) -> type[Learner]:
    """The class that trains an agent; no other agent's module is imported.

    Raises:
        UserError: no such agent, or `less`, which learns no policy.
    """
    if agent == "less":
        raise UserError(
            "less trains no policy from traces but the kernels of a tier, from a text that the model reads: use "
            "`kv-gym train-less --model MODEL --text FILE --out FOLDER`, or kv_gym.training.less.train_less"
        )
    if agent not in list_agents():
        raise UserError(f"unknown agent {agent!r}; known: {', '.join(list_agents())}")
    module = import_module(f"kv_gym.training.{agent}")
    found = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Learner) and kind.__module__ == module.__name__
        if not isabstract(kind)
    ]
    return only_class(found, module.__name__)


def agent_settings(agent: str, **overrides: Any) -> Settings:
    """An agent's settings from ``agents/<agent>.yml``, with `overrides` on top (None means unset).

    Raises:
        UserError: unknown agent or setting, or a value of another type or out of range.
    """
    kind, file = learner_class(agent).settings_class, bundled("agents") / f"{agent}.yml"
    written = validated(kind, read_yaml(file, "expected settings as NAME: VALUE") or {}, str(file))
    given = {name: value for name, value in overrides.items() if value is not None}
    return validated(kind, written.model_dump() | given, f"agent {agent!r}")
