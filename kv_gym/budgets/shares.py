"""Shares that the caller gives, per layer or per head, such as a profile measured elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kv_gym.budgets.allocation import Allocation, ScoredLayer, Uniform
from kv_gym.budgets.layer_shares import LayerShares
from kv_gym.errors import UserError
from kv_gym.files import read_json

_EXPECTED = "expected a list with one number per evicting layer, or with one list per layer of one number per KV head"


@dataclass(frozen=True)
class Shares(LayerShares):
    """Every layer, or every head, gets slots in proportion to its number; the total is the budget's.

    Attributes:
        shares: one number per evicting layer, or one tuple per layer with one number per KV head; not negative.
        file: where they were read from, for the name.
    """

    syntax = ":FILE"
    shares: tuple[float, ...] | tuple[tuple[float, ...], ...] = ()
    file: str = ""

    def __post_init__(self) -> None:
        if not self.shares:
            raise UserError(f"shares {self.file or self.shares} are empty; {_EXPECTED}")
        flat = self._flat
        if not all(math.isfinite(share) and share >= 0 for share in flat) or not any(flat):
            raise UserError(f"{self.name} holds a negative or infinite number, or only zeros; {_EXPECTED}")
        if self._per_head and not isinstance(self.within, Uniform):
            raise UserError(f"{self.name} gives every head its share, so {self.within.name} has nothing to divide")

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return cls.read(setting, within) if setting else None

    @classmethod
    def read(cls, file: str | Path, within: Allocation) -> Shares:
        """Shares from a JSON file.

        Raises:
            UserError: missing, no JSON, or something else than shares.
        """
        return cls(within, read_numbers(file, _EXPECTED), str(file))

    @property
    def rule(self) -> str:
        return f"shares:{self.file}" if self.file else "shares"

    @property
    def _per_head(self) -> bool:
        return isinstance(self.shares[0], tuple)

    @property
    def _flat(self) -> tuple[float, ...]:
        rows = [share if isinstance(share, tuple) else (share,) for share in self.shares]
        return tuple(share for row in rows for share in row)

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> list[list[float]]:
        return [list(self._flat)] * len(free)

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        count, heads = layers[0].layer_count, layers[0].priorities.shape[1]
        if len(self.shares) != count:
            raise UserError(f"{self.name} holds {len(self.shares)} shares and the model has {count} evicting layers")
        if not self._per_head:
            return super().slots(layers)
        if len(self._flat) != count * heads:
            raise UserError(
                f"{self.name} holds {len(self._flat) // count} shares per layer and the model has {heads} KV heads"
            )
        # every head is a layer of its own
        alone = [_head(layer, head) for layer in layers for head in range(heads)]
        slots = super().slots(alone)
        return [torch.cat(slots[i : i + heads], 1) for i in range(0, len(slots), heads)]


def _head(layer: ScoredLayer, head: int) -> ScoredLayer:
    only, heads = slice(head, head + 1), layer.priorities.shape[1]
    return replace(
        layer, view=layer.view.with_budget(layer.view.budget[:, only]), priorities=layer.priorities[:, only],
        ordinal=layer.ordinal * heads + head, layer_count=layer.layer_count * heads,
    )  # fmt: skip


def read_numbers(file: str | Path, expected: str) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """A list of numbers, or of equally long lists of numbers, from a JSON file.

    Raises:
        UserError: missing, no JSON, or something else; it says what was `expected`.
    """
    data = read_json(file, f"{expected}, as JSON")
    rows = data if isinstance(data, list) and data and isinstance(data[0], list) else [data]
    if not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows) or not all(
        isinstance(number, int | float) and not isinstance(number, bool) for row in rows for number in row
    ):
        raise UserError(f"{file} holds something else; {expected}, as JSON")
    numbers = tuple(tuple(map(float, row)) for row in rows)
    return numbers if rows is data else numbers[0]
