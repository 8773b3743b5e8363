"""EpiCache's layer rule: many slots where keys change most when distant tokens cannot be seen.

Similarity of a layer's keys under full and under block-wise attention, measured
once per model, min-max normalised; a layer's share is one minus that, to a power, and at least a quarter of the mean.
:func:`kv_gym.evaluation.layer_similarity` measures it.
Differs from the code in: shares are normalised again after the floor, so that the total is exact (the code may exceed
its budget). What else EpiCache does, such as its clusters of episodes, is not part of an allocation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kv_gym.budgets.allocation import Allocation, ScoredLayer
from kv_gym.budgets.layer_shares import LayerShares
from kv_gym.budgets.shares import read_numbers
from kv_gym.errors import UserError
from kv_gym.policies.base import Paper

_EXPECTED = "expected one similarity per evicting layer, from -1 to 1"


@dataclass(frozen=True)
class EpiCache(LayerShares):
    """Slots in proportion to (1 - normalised similarity) ^ `power`.

    Attributes:
        similarity: one number per evicting layer, from -1 to 1.
        power: the larger, the more unequal.
        least: the smallest share, of the mean.
        file: where they were read from, for the name.
    """

    syntax = ":FILE"
    paper = Paper("EpiCache: Episodic KV Cache Management for Long Conversational Question Answering", "2509.17396")
    similarity: tuple[float, ...] = ()
    power: float = 1.1
    least: float = 0.25
    file: str = ""

    def __post_init__(self) -> None:
        numbers = [number for number in self.similarity if isinstance(number, int | float)]
        if not numbers or len(numbers) < len(self.similarity) or not all(abs(n) <= 1 + 1e-6 for n in numbers):
            raise UserError(f"{self.rule} holds {list(self.similarity)}; {_EXPECTED}")
        if not (self.power >= 0 and 0 <= self.least <= 1 and math.isfinite(self.power)):
            raise UserError(f"{self.rule} got power={self.power}, least={self.least}; expected from 0, and 0 to 1")

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return cls.read(setting, within) if setting else None

    @classmethod
    def read(cls, file: str | Path, within: Allocation) -> EpiCache:
        """Similarities from a JSON file: a list of numbers.

        Raises:
            UserError: missing, no JSON, or something else than similarities.
        """
        return cls(within, read_numbers(file, _EXPECTED), file=str(file))  # type: ignore[arg-type]

    @property
    def rule(self) -> str:
        return f"epicache:{self.file}" if self.file else "epicache"

    def weights(self, layers: Sequence[ScoredLayer], free: Sequence[int], capacity: Sequence[int]) -> list[list[float]]:
        count = layers[0].layer_count
        if len(self.similarity) != count:
            raise UserError(
                f"{self.rule} holds {len(self.similarity)} similarities and the model has {count} evicting layers"
            )
        low, high = min(self.similarity), max(self.similarity)
        if low == high:
            return [[1.0] * count] * len(free)
        shares = [((high - number) / (high - low)) ** self.power for number in self.similarity]
        mean = sum(shares) / count
        return [[max(share / mean, self.least) for share in shares]] * len(free)
