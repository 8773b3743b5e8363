"""Agents by name: the module ``kv_gym/training/<name>.py`` holds its learner, ``agents/<name>.yml`` its settings."""

from __future__ import annotations

from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.training.learner import Learner, Settings


def list_agents() -> list[str]:
    """Names of all agents, sorted: every ``agents/*.yml`` is one."""
    return sorted(file.stem for file in bundled("agents").glob("*.yml"))


def learner_class(agent: str) -> type[Learner]:
    """The class that trains an agent; no other agent's module is imported.

    Raises:
        UserError: no such agent.
    """
    if agent not in list_agents():
        raise UserError(f"unknown agent {agent!r}; known: {', '.join(list_agents())}")
    module = import_module(f"kv_gym.training.{agent}")
    (found,) = [
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Learner) and kind.__module__ == module.__name__
        if not isabstract(kind)
    ]
    return found


def agent_settings(agent: str, **overrides: Any) -> Settings:
    """An agent's settings from ``agents/<agent>.yml``, with `overrides` on top (None means unset).

    Raises:
        UserError: unknown agent or setting, or a value of another type or out of range.
    """
    kind, file = learner_class(agent).settings_class, bundled("agents") / f"{agent}.yml"
    try:
        written = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None
    given = {name: value for name, value in overrides.items() if value is not None}
    return _validated(kind, _validated(kind, written, file).model_dump() | given, f"agent {agent!r}")


def _validated(kind: type[Settings], data: Any, source: str | Path) -> Settings:
    """Settings from plain data; an error is one sentence that begins with `source`."""
    if not isinstance(data, dict):
        raise UserError(f"{source} holds a {type(data).__name__}; expected settings as NAME: VALUE")
    try:
        return kind.model_validate(data)
    except ValidationError as errors:
        error = errors.errors()[0]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not error["loc"] or error["type"] == "value_error":
        raise UserError(f"{source}: {message}")
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        raise UserError(f"{source} has unknown setting {name!r}; known: {', '.join(kind.model_fields)}")
    expected = kind.model_fields[name].description or message
    raise UserError(f"{source}: setting {name} is {data[name]!r}; expected {expected}")
