"""What `joint` may descend: three losses of scores over all slots of a context against their worth.

All take scores and worth `[contexts, heads, n]` over all layers' KV heads; worth is non-negative. Each makes scores of
different heads and layers compete, so that one threshold may cut them all.
"""

from __future__ import annotations

from torch import Tensor

from kv_gym.training.cuts import soft_top


def softmax_loss(scores: Tensor, worth: Tensor) -> Tensor:
    """Cross-entropy of one softmax per context with each slot's share of the worth, in nats.

    Says nothing of a score's absolute size: a constant added to all scores of a context changes nothing.
    """
    flat, worth = scores.flatten(1), worth.flatten(1)
    target = worth / worth.sum(1, keepdim=True).clamp(min=1e-12)
    return -(target * flat.log_softmax(1)).sum(1).mean()


def poisson_loss(scores: Tensor, worth: Tensor, typical: float) -> Tensor:
    """Negative log-likelihood per slot of worth as a Poisson rate ``exp(score)``, less what no score can change.

    Least where ``exp(score)`` is the expected worth, which is an absolute scale: one threshold fixed ahead serves
    every context.

    Args:
        scores: logarithms of the expected worth.
        worth: in the unit that scores are meant to be in.
        typical: mean worth of a slot; the loss is in this unit, so that its size does not hang on that of the worth.
    """
    return (scores.exp() - worth * scores).mean() / typical


def listwise_loss(scores: Tensor, worth: Tensor, shares: Tensor, temperature: float) -> Tensor:
    """One minus the worth that a soft cut keeps over the most that as many whole slots can hold.

    Mean over contexts and totals. A soft cut spreads its total over more slots than it counts, so that even perfect
    scores lose something until they are far apart in units of the temperature.

    Args:
        scores: see above.
        worth: see above.
        shares: `[totals]` of all slots, each between 0 and 1; at least one slot stays.
        temperature: distance from the threshold over which a slot's gate opens.
    """
    flat, worth = scores.flatten(1), worth.flatten(1)
    counts = (shares * flat.shape[1]).floor().clamp(min=1)
    gates = soft_top(flat[:, None], counts, temperature)  # [contexts, totals, slots]
    kept = (gates * worth[:, None]).sum(-1)
    best = worth.topk(int(counts.max())).values.cumsum(-1)[:, counts.long() - 1]
    return 1 - (kept / best.clamp(min=1e-12)).mean()
