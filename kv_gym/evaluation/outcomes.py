"""Outcomes: what one configuration did in one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Outcome:
    """What one configuration did in one context, or in one part of it.

    A context with several parts gives one outcome for each of them: `questions`, `right`, `nll` and `seconds` are the
    part's own, so that they add up; `cache_bytes` and `slots` describe the whole context and are the same in all its
    parts. :func:`per_context` joins them.

    Attributes:
        context: its id, the same for all configurations: differences are paired by it.
        part: ``""``, or which part of the context, such as ``turn 3`` or ``after 12 evictions``.
        questions: how many answers were judged: questions, spans or tokens, as the task says.
        correct: how many of them matched exactly; or the sum of scores in [0, 1], such as F1.
        nll: sum over the answers of the mean over their tokens of -log p, nats; NaN where it is not measured.
        cache_bytes: all that the cache held of this one context right after its last cut, when it is largest;
            policies' weights and room for tokens to come are left out. The bytes of a batch are divided evenly among
            its contexts.
        slots: `[layers, kv_heads]` float64, full-precision slots held right after the last cut; None where unknown.
        seconds: thread CPU seconds (``time.thread_time``) of the cuts and of all that came after the first one for
            this configuration alone, divided evenly among a batch's contexts and their parts. With one thread that is
            all the work there is.
    """

    context: str
    part: str
    questions: int
    correct: float
    nll: float
    cache_bytes: int
    slots: Tensor | None
    seconds: float


def per_context(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One outcome per context, with the parts joined and ``part`` empty; contexts in the order of first appearance."""
    parts: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        parts.setdefault(outcome.context, []).append(outcome)
    return [
        Outcome(
            context,
            "",
            sum(part.questions for part in same),
            sum(part.correct for part in same),
            sum(part.nll for part in same),
            max(part.cache_bytes for part in same),
            same[-1].slots,
            sum(part.seconds for part in same),
        )
        for context, same in parts.items()
    ]


def mean_slots(outcomes: Sequence[Outcome]) -> Tensor | None:
    """Mean over contexts of the slots held, `[layers, kv_heads]` float64; None where one does not know them."""
    known = [outcome.slots for outcome in per_context(outcomes) if outcome.slots is not None]
    return torch.stack(known).mean(0) if known and len(known) == len(per_context(outcomes)) else None
