"""What a budget is: an int counts slots per KV head, a float in (0, 1] is a share of the tokens seen."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from kv_gym.errors import UserError

Budget = int | float


def parse_budget(budget: str | int | float) -> Budget:
    """Read a budget: `1` and `64` are slots per head; `0.25`, `"1/8"`, `"12%"` and `"1.0"` are shares.

    Raises:
        UserError: zero, negative, a share above 1, or no number.
    """
    expected = "expected slots per head (an integer from 1) or a share in (0, 1] such as 0.25, 1/8 or 12%"
    value = budget
    if isinstance(budget, str):
        text = budget.strip()
        try:
            if text.lstrip("+-").isdigit():
                value = int(text)
            elif text.endswith("%"):
                value = float(Fraction(text[:-1]) / 100)
            else:
                value = float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            raise UserError(f"budget {budget!r} is no number; {expected}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"budget {budget!r} is no number; {expected}")
    if value != value or value <= 0:
        raise UserError(f"budget {budget} is not above zero; {expected}")
    if isinstance(value, float) and value > 1:
        raise UserError(f"budget {budget} is a share above 1; {expected}")
    return value


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
    """Slots each KV head of a row may keep, at least 1; a share is rounded down.

    Args:
        budget: as :func:`parse_budget` returns it.
        seen: real tokens seen when the trigger fires.
    """
    # the tiny term keeps 0.29 * 100 at 29
    return budget if isinstance(budget, int) else max(1, int(seen * budget + 1e-6))


def slots_per_head(budget: Budget, seen: Tensor) -> Tensor:
    """:func:`slots_after` for rows: `seen` and the result are `[batch]` int64, on any device."""
    if isinstance(budget, int):
        return torch.full_like(seen, budget)
    return (seen.double() * budget + 1e-6).long().clamp(min=1)
