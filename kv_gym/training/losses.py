"""Losses of scores against the utility of slots, and the soft and hard cuts that gradients pass through.

Scores and utility of `joint`'s losses are `[contexts, heads, n]` over the KV heads of all layers, so that scores of
different heads and layers compete and one threshold may cut them all. Utility is non-negative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kv_gym.devices import to_device

NEWTON_STEPS = 5  # from half a temperature away, each doubles the number of right digits
COMPARED_SLOTS = 128  # that every slot is compared with in a pairwise loss


def softmax_loss(scores: Tensor, utility: Tensor) -> Tensor:
    """Cross-entropy of one softmax per context with each slot's share of the utility, in nats.

    It does not fix the scale: a constant added to all scores of a context changes nothing.
    """
    scores, utility = scores.flatten(1), utility.flatten(1)
    target = utility / utility.sum(1, keepdim=True).clamp(min=1e-12)
    return -(target * scores.log_softmax(1)).sum(1).mean()


def poisson_loss(scores: Tensor, utility: Tensor, mean_utility: float) -> Tensor:
    """Negative log-likelihood per slot of the utility under a Poisson rate ``exp(score)``, without constant terms.

    Minimal where ``exp(score)`` is the expected utility, an absolute scale: one threshold serves every context.

    Args:
        scores: logarithms of the expected utility.
        utility: of the slots.
        mean_utility: of a slot; the loss is divided by it, so that its size does not depend on the utility's unit.
    """
    return (scores.exp() - utility * scores).mean() / mean_utility


def listwise_loss(scores: Tensor, utility: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """One minus the utility that a soft cut keeps, divided by the most that as many whole slots can hold.

    Mean over contexts and totals. A soft cut spreads its total over more slots than it counts, so that even perfect
    scores lose something until they are many temperatures apart.

    Args:
        scores, utility: `[contexts, heads, n]`.
        shares: `[totals]` on the CPU, of all slots, each between 0 and 1; at least one slot stays.
        temperature: distance from the threshold over which a slot's gate opens.
    """
    scores, utility = scores.flatten(1), utility.flatten(1)
    counts = (shares * scores.shape[1]).floor().clamp(min=1)
    gates = soft_top(scores[:, None], counts, temperature)  # [contexts, totals, slots]
    kept = (gates * utility[:, None]).sum(-1)
    best = utility.topk(int(counts.max())).values.cumsum(-1)[:, to_device(counts.long() - 1, utility.device)]
    return 1 - (kept / best.clamp(min=1e-12)).mean()


def pairwise_hinge(scores: Tensor, utility: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """Mean of max(0, margin - (score of the better slot - score of the worse)) over pairs whose utility differs.

    Every slot is compared with at most 128 others, drawn anew at every call and the same in every row.

    Args:
        scores, utility: `[..., n]`.
        margin: by how much the better slot has to lead.
        mask: `[..., n]` bool, slots that count; None means all.
    """
    n = scores.shape[-1]
    compared = torch.randperm(n)[:COMPARED_SLOTS] if n > COMPARED_SLOTS else torch.arange(n)
    compared = to_device(compared, scores.device)
    sign = (utility[..., :, None] - utility[..., None, compared]).sign()
    if mask is not None:
        sign *= mask[..., :, None] & mask[..., None, compared]
    lead = scores[..., :, None] - scores[..., None, compared]
    differs = sign.abs()
    return (margin * differs - sign * lead).relu().sum() / differs.sum().clamp(min=1)


def soft_top(scores: Tensor, count: float | Tensor, temperature: float = 1.0) -> Tensor:
    """Soft gates `[..., n]` in (0, 1) that sum to `count`: sigmoids of the distance to a threshold.

    The threshold follows the scores, also in the gradient: raising all scores changes nothing.

    Args:
        scores: `[..., n]`.
        count: between 0 and n; a tensor is broadcast against the leading axes, and every row has a cut of its own.
        temperature: distance over which a gate opens, in units of the scores.
    """
    total = to_device(torch.as_tensor(count, dtype=scores.dtype), scores.device)[..., None]
    threshold = _threshold(scores.detach(), total, temperature)
    gates = ((scores - threshold) / temperature).sigmoid()
    # a Newton step from the solution changes no value, and its derivative is that of the threshold
    threshold = threshold + _newton_step(gates, gates.detach(), total, temperature)
    return ((scores - threshold) / temperature).sigmoid()


@torch.no_grad()
def _threshold(scores: Tensor, total: Tensor, temperature: float) -> Tensor:
    """Where soft gates of `[..., n]` sum to `total` `[..., 1]`: bisection until it is near, then Newton's method."""
    low = scores.amin(-1, keepdim=True) - 30 * temperature
    high = scores.amax(-1, keepdim=True) + 30 * temperature
    for _ in range(_bisections((high - low) / temperature)):
        middle = (low + high) / 2
        too_many = ((scores - middle) / temperature).sigmoid().sum(-1, keepdim=True) > total
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    threshold = (low + high) / 2
    for _ in range(NEWTON_STEPS):
        gates = ((scores - threshold) / temperature).sigmoid()
        threshold = threshold + _newton_step(gates, gates, total, temperature)
        threshold = torch.minimum(torch.maximum(threshold, low), high)
    return threshold


def _bisections(widths: Tensor) -> int:
    """How often intervals of so many temperatures are halved until they are near half of one."""
    if widths.device.type != "cpu":  # whose numbers are not waited for: enough for a million of temperatures
        return 22
    width = float(widths.max())
    return 2 + int(math.log2(width)) if math.isfinite(width) else 0  # non-finite scores: the loss says so


def _newton_step(gates: Tensor, constant_gates: Tensor, total: Tensor, temperature: float) -> Tensor:
    slope = (constant_gates * (1 - constant_gates)).sum(-1, keepdim=True) / temperature
    return (gates.sum(-1, keepdim=True) - total) / slope.clamp(min=1e-6)


def hard_top(scores: Tensor, count: int, temperature: float = 1.0) -> Tensor:
    """Gates `[n]` that are 1 for the `count` highest scores and 0 for the rest, with the gradient of :func:`soft_top`.

    The straight-through estimator (Bengio et al., arXiv 1308.3432), for scores `[n]` of one row.
    """
    soft = soft_top(scores, count, temperature)
    hard = torch.zeros_like(scores).scatter_(0, scores.detach().topk(count).indices, 1.0)
    return hard + soft - soft.detach()
