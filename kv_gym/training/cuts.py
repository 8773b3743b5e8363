"""A hard cut that scores can learn from: the best slots are kept, and gradients see a soft cut in their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEWTON = 5  # steps: from half a temperature away, each doubles the digits that are right


def soft_top(scores: Tensor, count: float | Tensor, temperature: float = 1.0) -> Tensor:
    """Soft gates `[..., n]` in (0, 1) that sum to `count`: sigmoids of the distance to a threshold.

    The threshold follows the scores: raising all of them changes nothing, and the gradient knows it.

    Args:
        scores: `[..., n]`.
        count: between 0 and n; a tensor is broadcast against the leading axes, and every row has a cut of its own.
        temperature: distance over which a gate opens, in units of the scores.
    """
    wanted = torch.as_tensor(count, dtype=scores.dtype, device=scores.device)[..., None]
    threshold = _threshold(scores.detach(), wanted, temperature)
    gates = ((scores - threshold) / temperature).sigmoid()
    # one step of Newton's method from the solution: of no effect on the value, and its derivative is the threshold's
    slope = (gates * (1 - gates)).sum(-1, keepdim=True).detach() / temperature
    threshold = threshold + (gates.sum(-1, keepdim=True) - wanted) / slope.clamp(min=1e-6)
    return ((scores - threshold) / temperature).sigmoid()


@torch.no_grad()
def _threshold(scores: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Where soft gates of `[..., n]` sum to `wanted` `[..., 1]`: halvings until it is near, then Newton's method."""
    low = scores.amin(-1, keepdim=True) - 30 * temperature
    high = scores.amax(-1, keepdim=True) + 30 * temperature
    apart = float((high - low).max()) / temperature
    for _ in range(2 + int(math.log2(apart)) if math.isfinite(apart) else 0):  # else the loss says so
        middle = (low + high) / 2
        too_many = ((scores - middle) / temperature).sigmoid().sum(-1, keepdim=True) > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    threshold = (low + high) / 2
    for _ in range(NEWTON):
        gates = ((scores - threshold) / temperature).sigmoid()
        slope = (gates * (1 - gates)).sum(-1, keepdim=True) / temperature
        threshold = threshold + (gates.sum(-1, keepdim=True) - wanted) / slope.clamp(min=1e-6)
        threshold = torch.minimum(torch.maximum(threshold, low), high)
    return threshold


def hard_top(scores: Tensor, count: int, temperature: float = 1.0) -> Tensor:
    """Gates `[n]` that are 1 for the `count` highest scores and 0 for the rest, with the gradient of :func:`soft_top`.

    Of one row. The straight-through estimator (Bengio et al., arXiv 1308.3432).
    """
    soft = soft_top(scores, count, temperature)
    hard = torch.zeros_like(scores).scatter_(0, scores.detach().topk(count).indices, 1.0)
    return hard + soft - soft.detach()
