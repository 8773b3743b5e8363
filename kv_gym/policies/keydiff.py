"""KeyDiff: keep the keys that differ most from the mean direction of the cached keys.

The anchor is the mean of the normalised keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kv_gym.cache_view import CacheView
from kv_gym.policies.base import Paper, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine similarity to the anchor of the KV head.

    Not comparable, although a cosine has no unit: where all keys of a head share an offset all its cosines are near
    one, and one threshold over heads would empty that head, however useful its keys are.
    """

    paper = Paper(
        "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference "
        "in Resource-Constrained Environments",
        "2504.15364",
        "section 3",
    )

    def score(self, view: CacheView) -> Tensor:
        keys = view.keys.float()
        # norms divide the products, not the keys: three readings of the keys and no copy of their size
        lengths = torch.linalg.vector_norm(keys, dim=-1).clamp_(min=1e-12)
        anchor = F.normalize((view.valid / lengths)[:, :, None] @ keys, dim=-1)  # [B, H, 1, d]
        return -(anchor @ keys.transpose(-1, -2))[:, :, 0] / lengths
