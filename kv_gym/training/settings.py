"""What an agent is trained with: ``agents/<agent>.yml``, read safely."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kv_gym.errors import UserError
from kv_gym.files import bundled
from kv_gym.policies.scoring.inputs import DEFAULT, check_inputs


@dataclass(frozen=True)
class Settings:
    """Settings that all agents have; an algorithm with more of them has a class of its own.

    Attributes:
        steps: training steps: of the optimiser, or of sampling and the optimiser steps that follow.
        contexts: contexts per step.
        slots: slots drawn from each head of a context per step (all of a shorter context).
        hidden: width of the two hidden layers.
        rate: peak learning rate of AdamW; one warm-up, then a cosine to zero.
        weight_decay: of AdamW.
        protect: first and last tokens that the exported policy wants protected.
        validation: share of the documents held out to choose the best checkpoint.
        every: steps between validations (and checkpoints).
        inputs: what the networks see of a slot: names of :data:`~kv_gym.policies.scoring.inputs.INPUTS`.
    """

    steps: int = 600
    contexts: int = 8
    slots: int = 256
    hidden: int = 64
    rate: float = 1e-2
    weight_decay: float = 0.01
    protect: tuple[int, int] = (1, 1)
    validation: float = 0.1
    every: int = 50
    inputs: tuple[str, ...] = DEFAULT

    @property
    def depth(self) -> int:
        """Hidden layers of the networks."""
        return 2

    @classmethod
    def load(cls, agent: str, **overrides: Any) -> Settings:
        """Settings of a zoo agent with the caller's own on top (None means unset).

        Raises:
            UserError: unknown agent or setting, or a value of another type.
        """
        file = bundled("agents") / f"{agent}.yml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yml")))
            raise UserError(f"unknown agent {agent!r}; known: {known}")
        return cls.from_mapping(_read(file), file).with_overrides(overrides)

    @classmethod
    def from_mapping(cls, data: Any, source: str | Path) -> Settings:
        """Settings from plain data; `source` is named in errors."""
        known = {field.name: field for field in fields(cls)}
        if not isinstance(data, dict) or not set(data) <= set(known):
            strange = sorted(set(data) - set(known)) if isinstance(data, dict) else [type(data).__name__]
            raise UserError(f"{source} has unknown setting {strange[0]!r}; known: {', '.join(known)}")
        return replace(
            cls(), **{name: _typed(name, value, getattr(cls(), name), source) for name, value in data.items()}
        )

    def with_overrides(self, overrides: dict[str, Any]) -> Settings:
        """These settings with those that are not None replaced."""
        return self.from_mapping(asdict(self) | {k: v for k, v in overrides.items() if v is not None}, "the call")


def _read(file: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no valid YAML: {str(error).splitlines()[0]}") from None


def _typed(name: str, value: Any, default: Any, source: str | Path) -> Any:
    if name == "inputs" and isinstance(value, list | tuple):
        return check_inputs(map(str, value), source)
    if value is None and default is None:
        return None
    if isinstance(default, tuple) and isinstance(value, list | tuple) and len(value) == len(default):
        if all(isinstance(v, int) and v >= 0 for v in value):
            return tuple(value)
    elif isinstance(default, float) and isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    elif (isinstance(default, int | None) and isinstance(value, int) and not isinstance(value, bool) and value > 0) or (
        isinstance(default, str) and isinstance(value, str)
    ):
        return value
    kind = {int: "an integer from 1", float: "a number from 0", tuple: "two integers from 0", str: "a word"}
    kind[type(None)] = "an integer from 1, or nothing"
    expected = f"a list such as [{', '.join(DEFAULT)}]" if name == "inputs" else kind[type(default)]
    raise UserError(f"{source}: setting {name} is {value!r}; expected {expected}")
