"""Thresholds fixed ahead on traces: a head keeps every slot that scores at or above the threshold of the budget.

The second form of the global threshold (:mod:`kv_gym.budgets.global_threshold`), for prompts that are too long to hold
whole: every layer is cut as soon as it has been read, and none waits for the others. The total is then not
exact: ``cache.kept()`` and ``cache.nbytes()`` give the actual one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from kv_gym.budgets.allocation import Allocation, ScoredLayer
from kv_gym.budgets.order import LOWEST, sortable
from kv_gym.devices import to_device
from kv_gym.errors import UserError
from kv_gym.files import atomic_write, make_folder, read_json, validated
from kv_gym.models.fingerprint import state_dict_hash
from kv_gym.policies.base import Policy

FORMAT = 1
_EXPECTED = "expected thresholds that `kv-gym calibrate` wrote"


class _ThresholdsFile(BaseModel):
    """The content of a file of thresholds."""

    model_config = ConfigDict(extra="forbid")

    format: int
    policy: dict[str, Any]
    layers: PositiveInt
    kv_heads: PositiveInt
    shares: tuple[float, ...]
    thresholds: tuple[float, ...]
    about: dict[str, Any]


@dataclass(frozen=True)
class Calibrated(Allocation):
    """Keeps the slots at or above a score that belongs to the share of the tokens that the budget allows.

    Between two calibrated shares the threshold is interpolated over the logarithm of the share; below the smallest
    and above the largest one is refused, except budgets for all tokens. Protected slots stay in any case. A share
    counts tokens seen: a budget of slots becomes a smaller share as tokens come.

    Attributes:
        policy: whose scores, the :func:`policy_identity` as JSON.
        layers: evicting layers of the model.
        kv_heads: KV heads of a layer.
        shares: ascending, in (0, 1].
        thresholds: one per share, on the policy's score.
        about: how they were found: lengths, protection, traces, realised shares.
        file: where they were read from, for the name.
    """

    own_totals = True
    syntax = ":FILE"
    policy: str
    layers: int
    kv_heads: int
    shares: tuple[float, ...]
    thresholds: tuple[float, ...]
    about: str = "{}"
    file: str = ""

    def __post_init__(self) -> None:
        ascending = list(self.shares) == sorted(set(self.shares)) and len(self.shares) == len(self.thresholds)
        within = all(0 < share <= 1 for share in self.shares) and all(map(math.isfinite, self.thresholds))
        if not (self.shares and ascending and within):
            raise UserError(
                f"{self.name} has shares {list(self.shares)} and thresholds {list(self.thresholds)}; expected as many "
                "finite thresholds as shares, and these ascending from above 0 to at most 1"
            )

    @classmethod
    def parse(cls, setting: str, within: Allocation) -> Allocation | None:
        return cls.read(setting) if setting else None

    @property
    def name(self) -> str:
        return f"calibrated:{self.file}" if self.file else "calibrated"

    def refuse_unfit(self, policy: Policy) -> None:
        refuse_no_scale(policy)
        made_for, given = json.loads(self.policy), policy_identity(policy)
        if made_for != given:
            same = made_for.get("name") == given["name"]
            what = "other settings or weights" if same else f"policy {given['name']!r}"
            raise UserError(
                f"allocation {self.name!r} holds thresholds for policy {made_for.get('name')!r}, and the policy here "
                f"is {'one with ' if same else ''}{what}: make them anew with `kv-gym calibrate`"
            )

    def slots(self, layers: Sequence[ScoredLayer]) -> list[Tensor]:
        return [self._above(layer) for layer in layers]

    def _above(self, layer: ScoredLayer) -> Tensor:
        heads = layer.priorities.shape[1]
        if (layer.layer_count, heads) != (self.layers, self.kv_heads):
            raise UserError(
                f"allocation {self.name!r} was made for {self.layers} evicting layers of {self.kv_heads} KV heads, and "
                f"this model has {layer.layer_count} of {heads}: make it anew with `kv-gym calibrate`"
            )
        edges = [
            float("-inf") if row.budget >= row.seen else self.threshold(row.budget, row.seen)
            for row in layer.row_counts
        ]  # fmt: skip
        least = to_device(sortable(torch.tensor(edges)) << 31, layer.priorities.device)
        return ((layer.priorities >= least[:, None, None]) & (layer.priorities > LOWEST)).sum(-1)

    def threshold(self, slots: int, seen: int) -> float:
        """The score from which slots are kept.

        Args:
            slots: the budget, slots per head.
            seen: tokens seen.

        Raises:
            UserError: a share of the tokens outside of those that were calibrated.
        """
        share = slots / seen
        # a share is rounded down to whole slots, and is not below the smallest for that
        if (slots + 1) / seen <= self.shares[0] or share > self.shares[-1]:
            raise UserError(
                f"{slots} of {seen} tokens is a share of {share:.4g}, and {self.name} holds thresholds for shares from "
                f"{self.shares[0]:.4g} to {self.shares[-1]:.4g}: choose a budget there, or calibrate for more"
            )
        above = next(i for i, known in enumerate(self.shares) if share <= known)
        if above == 0:
            return self.thresholds[0]
        low, high = self.shares[above - 1 : above + 1]
        part = math.log(share / low) / math.log(high / low)
        return self.thresholds[above - 1] * (1 - part) + self.thresholds[above] * part

    def save(self, file: str | Path) -> Path:
        """Write a JSON file that ``calibrated:<file>`` names."""
        data = {
            "format": FORMAT, "policy": json.loads(self.policy), "layers": self.layers, "kv_heads": self.kv_heads,
            "shares": self.shares, "thresholds": self.thresholds, "about": json.loads(self.about),
        }  # fmt: skip
        make_folder(Path(file).parent)
        with atomic_write(file) as part:
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return Path(file)

    @classmethod
    def read(cls, file: str | Path) -> Calibrated:
        """Thresholds that :meth:`save` wrote.

        Raises:
            UserError: missing, damaged or of a newer format.
        """
        data = read_json(file, _EXPECTED)
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise UserError(f"{file} has format {data['format']}, newer than {FORMAT}: upgrade kv-gym")
        stored = validated(_ThresholdsFile, data, f"thresholds {file}")
        return cls(
            json.dumps(stored.policy), stored.layers, stored.kv_heads, stored.shares, stored.thresholds,
            json.dumps(stored.about), str(file),
        )  # fmt: skip


def refuse_no_scale(policy: Policy) -> None:
    """Raise a UserError for a policy whose scores do not compare across heads."""
    if not policy.comparable:
        raise UserError(
            f"scores of policy {policy.name!r} have no scale that holds for every head and context, so no threshold "
            "can be fixed ahead: use global with a normalisation, such as global:zscore, or uniform"
        )


def policy_identity(policy: Policy) -> dict[str, Any]:
    """Which policy it is: name, settings and the hash of weights, as plain JSON data; not how it was trained."""
    # how it was trained, and on what scale, changes no score
    names = (field.name for field in fields(policy) if field.name not in ("training", "absolute"))
    settings = {name: _plain(getattr(policy, name)) for name in names}
    return {"name": policy.name, "class": type(policy).__name__, "settings": settings}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Policy):
        return policy_identity(value)
    if isinstance(value, nn.Module):
        return state_dict_hash(value.state_dict())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value)
