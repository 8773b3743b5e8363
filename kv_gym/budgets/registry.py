"""Allocations by name, as the command line and `EvictingCache` take them."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from kv_gym.budgets.ada import Ada
from kv_gym.budgets.allocation import Allocation
from kv_gym.budgets.cake import Cake
from kv_gym.budgets.calibrated import Calibrated
from kv_gym.budgets.d2o import D2O
from kv_gym.budgets.epicache import EpiCache
from kv_gym.budgets.global_threshold import GlobalThreshold
from kv_gym.budgets.layer_shares import LayerShares
from kv_gym.budgets.normalisation import NORMALISATIONS
from kv_gym.budgets.pyramid import Pyramid
from kv_gym.budgets.shares import Shares
from kv_gym.budgets.uniform import Uniform
from kv_gym.errors import UserError

_THRESHOLDS: dict[str, type[GlobalThreshold] | type[Ada]] = {"global": GlobalThreshold, "ada": Ada}
_LAYERS: dict[str, type[LayerShares]] = {"pyramid": Pyramid, "cake": Cake, "d2o": D2O}
_FILES: dict[str, Callable[[str, Allocation], Allocation]] = {"shares": Shares.read, "epicache": EpiCache.read}
KINDS: dict[str, type[Allocation]] = {
    "uniform": Uniform, **_THRESHOLDS, **_LAYERS, "shares": Shares, "epicache": EpiCache, "calibrated": Calibrated
}  # fmt: skip
NAMES = tuple(KINDS)
EXPECTED = (
    f"uniform, {', '.join(_THRESHOLDS)} (each also with one of :{', :'.join(NORMALISATIONS)}), "
    f"{', '.join(_LAYERS)}, {', '.join(f'{name}:FILE' for name in (*_FILES, 'calibrated'))}, "
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
    name, _, setting = text.partition(":")
    if text == "uniform":
        return Uniform()
    if name in _THRESHOLDS and setting in ("", *NORMALISATIONS):
        return _THRESHOLDS[name](setting)
    if name == "calibrated" and setting:
        return Calibrated.read(setting)
    across, _, heads = text.rpartition("+")
    if not across or heads.partition(":")[0] != "ada":
        across, heads = text, "uniform"
    name, _, setting = across.partition(":")
    if across in _LAYERS:
        return _LAYERS[across](parse_allocation(heads))
    if name in _FILES and setting:
        return _FILES[name](setting, parse_allocation(heads))
    nearest = difflib.get_close_matches(text, NAMES, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest and nearest[0] != name else f"expected {EXPECTED}"
    raise UserError(f"unknown allocation {allocation!r}; {hint}")
