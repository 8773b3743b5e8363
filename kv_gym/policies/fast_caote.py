"""FastCAOTE: CAOTE with the mean of the cached values in place of the attention output.

The paper's cheaper variant, which it finds as good.
Differs from the paper in: what CAOTE differs in.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kv_gym.policies.base import Paper
from kv_gym.policies.caote import CAOTE


@dataclass(frozen=True)
class FastCAOTE(CAOTE):
    """Weight over what the others weigh, times the distance to the mean value. Not comparable, as CAOTE."""

    paper = Paper(
        "CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction", "2504.14051", "section 3"
    )

    def centre(self, values: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """The mean of the valid values, `[B, H, 1, d]`."""
        return valid.float()[:, :, None] @ values / valid.sum(-1)[..., None, None].clamp(min=1)
