"""Allocations by name, as the command line and `EvictingCache` take them."""

from __future__ import annotations

import difflib

from kv_gym.budgets.allocation import Allocation
from kv_gym.budgets.comparing import NORMALISATIONS
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.budgets.uniform import Uniform
from kv_gym.errors import UserError

EXPECTED = f"uniform, global, or global:NORMALISATION with one of {', '.join(NORMALISATIONS)}"


def parse_allocation(allocation: str | Allocation) -> Allocation:
    """An allocation by name, such as ``uniform``, ``global`` or ``global:zscore``; an object is returned as it is.

    Raises:
        UserError: unknown name or normalisation.
    """
    if isinstance(allocation, Allocation):
        return allocation
    name, _, setting = str(allocation).partition(":")
    if name == "uniform" and not setting:
        return Uniform()
    if name == "global" and setting in ("", *NORMALISATIONS):
        return GlobalThreshold(setting)
    nearest = difflib.get_close_matches(str(allocation), ("uniform", "global"), n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected {EXPECTED}"
    raise UserError(f"unknown allocation {allocation!r}; {hint}")
