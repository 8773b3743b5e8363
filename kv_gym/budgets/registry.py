"""Allocations by name, as the command line and `EvictingCache` take them. A new one is a file and a line here."""

from __future__ import annotations

import difflib

from kv_gym.budgets.ada import Ada
from kv_gym.budgets.allocation import Allocation, Uniform
from kv_gym.budgets.cake import Cake
from kv_gym.budgets.calibrated import Calibrated
from kv_gym.budgets.d2o import D2OShares
from kv_gym.budgets.epicache import EpiCache
from kv_gym.budgets.fixed_threshold import FixedThreshold
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.budgets.layer_shares import LayerShares
from kv_gym.budgets.pyramid import Pyramid
from kv_gym.budgets.shares import Shares
from kv_gym.errors import UserError

ALLOCATIONS: dict[str, type[Allocation]] = {
    "uniform": Uniform,
    "global": GlobalThreshold,
    "ada": Ada,
    "pyramid": Pyramid,
    "cake": Cake,
    "d2o": D2OShares,
    "shares": Shares,
    "epicache": EpiCache,
    "calibrated": Calibrated,
    "threshold": FixedThreshold,
}
EXPECTED = (
    f"{', '.join(name + kind.syntax for name, kind in ALLOCATIONS.items())}, "
    "or a rule for layers and one for the heads of each, such as pyramid+ada"
)


def parse_allocation(allocation: str | Allocation) -> Allocation:
    """An allocation by name, such as ``uniform``, ``global:zscore`` or ``pyramid+ada``.

    Args:
        allocation: a name, or an object, which is returned as it is.

    Raises:
        UserError: unknown name or normalisation, or a file that cannot be used.
    """
    if isinstance(allocation, Allocation):
        return allocation
    text = str(allocation)
    across, _, heads = text.rpartition("+")
    # a file's name may hold a plus sign too
    if heads.partition(":")[0] != "ada" or not issubclass(_kind(across), LayerShares):
        across, heads = text, "uniform"
    kind, setting = _kind(across), across.partition(":")[2]
    # a colon with nothing behind it is no setting
    if kind is not Allocation and not across.endswith(":"):
        within = Uniform() if heads == "uniform" else parse_allocation(heads)
        if parsed := kind.parse(setting, within):
            return parsed
    nearest = difflib.get_close_matches(text, ALLOCATIONS, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest and not text.startswith(nearest[0]) else f"expected {EXPECTED}"
    raise UserError(f"unknown allocation {allocation!r}; {hint}")


def _kind(text: str) -> type[Allocation]:
    return ALLOCATIONS.get(text.partition(":")[0], Allocation)
