"""Budgets: an int counts slots per KV head, a float in (0, 1] is a share of the tokens seen."""

from __future__ import annotations

import operator
import re
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kv_gym.errors import UserError

Budget = int | float

_EXPECTED = "expected slots per head (an integer from 1) or a share in (0, 1] such as 0.25, 1/8 or 12%"
_MOST_SLOTS = 2**31 - 1  # a slot's position is the lower half of its priority
_NUMBER = re.compile(r"(?P<number>[+-]?[\d_./]+(?:e[+-]?\d{1,3})?)(?P<percent>%?)", re.ASCII | re.IGNORECASE)
_ROUNDING = 1e-6  # keeps 0.29 * 100 at 29


def parse_budget(budget: str | int | float) -> Budget:
    """Read a budget.

    Args:
        budget: `1` and `64` are slots per head; `0.25`, `"1/8"`, `"12%"` and `"1.0"` are shares. NumPy's numbers are
            taken as well.

    Returns:
        An int, slots per head; or a float, a share.

    Raises:
        UserError: no number, zero, negative, a share above 1, or more slots than a position can count.
    """
    if isinstance(budget, bool | np.bool_):
        raise UserError(f"budget {budget!r} is no number; {_EXPECTED}")
    value: Budget
    try:
        value = _number(budget) if isinstance(budget, str) else operator.index(budget)  # type: ignore[arg-type]
    except TypeError:  # no integer of any library
        value = _as_float(budget)
    if value != value or value <= 0:
        raise UserError(f"budget {budget} is not above zero; {_EXPECTED}")
    if isinstance(value, float) and value > 1:
        raise UserError(f"budget {budget} is a share above 1; {_EXPECTED}")
    if value > _MOST_SLOTS:
        raise UserError(f"budget {_short(budget)} is more than {_MOST_SLOTS:,} slots; {_EXPECTED}")
    return value


def _number(text: str) -> Budget:
    """The number that a text writes: an int where it has digits alone."""
    found = _NUMBER.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        if text.strip().lstrip("+-").isdecimal():
            return int(text)
        return float(Fraction(found["number"]) / (100 if found["percent"] else 1))
    except OverflowError:
        return float("inf")
    except (ValueError, ZeroDivisionError):
        raise UserError(f"budget {_short(text)!r} is no number; {_EXPECTED}") from None


def _as_float(budget: object) -> float:
    try:
        return float(budget)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"budget {_short(repr(budget))} is no number; {_EXPECTED}") from None


def _short(budget: object) -> str:
    text = str(budget)
    return text if len(text) <= 40 else f"{text[:40]}..."


def format_budget(budget: Budget) -> str:
    """A budget as tables show it and :func:`parse_budget` reads it: slots as they are, shares as short fractions."""
    if isinstance(budget, int):
        return str(budget)
    fraction = Fraction(budget).limit_denominator(1024)
    exact = float(fraction) == budget and fraction.numerator == 1
    return f"{budget:.1f}" if budget == 1 else str(fraction) if exact else f"{budget:g}"


def budget_key(budget: Budget) -> tuple[bool, Budget]:
    """A key for dicts and sets: 1 slot and a share of 1.0, which is everything, are equal numbers and two budgets."""
    return isinstance(budget, int), budget


def slots_after(budget: Budget, seen: int) -> int:
    """Slots that each KV head of a row may keep, at least 1; a share is rounded down.

    Args:
        budget: as :func:`parse_budget` returns it.
        seen: real tokens seen when the trigger fires.
    """
    return budget if isinstance(budget, int) else max(1, int(seen * budget + _ROUNDING))


def slots_per_head(budget: Budget, seen: Tensor) -> Tensor:
    """:func:`slots_after` for rows: `seen` and the result are `[batch]` int64, on any device."""
    if isinstance(budget, int):
        return torch.full_like(seen, budget)
    return (seen.double() * budget + _ROUNDING).long().clamp(min=1)


def uniform(budget: Budget, seen: Tensor, kv_heads: int) -> Tensor:
    """Equal slots for every head, `[batch, kv_heads]` int64; `seen` is `[batch]` int64."""
    return slots_per_head(budget, seen)[:, None].expand(-1, kv_heads)
