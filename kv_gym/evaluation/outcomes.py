"""Outcomes: what one configuration did in one context, and the fields of a row that they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor


@dataclass
class Outcome:
    """What one configuration did in one context, or in one part of it.

    A context with several parts gives one outcome for each of them: `questions`, `correct`, `nll` and `seconds` are
    the part's own, so that they add up; `cache_bytes` and `slots` describe the whole context and are the same in all
    its parts. :func:`per_context` joins them.

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
        answers: of tasks that list them, each answer in the order of the questions: 2 where it is right, 1 where only
            its first token is, else 0; and -log p of the whole answer, nats.
        slots_read: slots of a KV head that the queries of forked questions read at most, mean over questions, layers
            and heads; None where there are no such questions.
        tokens_read: tokens that the model read before the questions for this configuration alone, probes included; None
            where configurations share that reading.
    """

    context: str
    part: str
    questions: int
    correct: float
    nll: float
    cache_bytes: int
    slots: Tensor | None
    seconds: float
    answers: tuple[tuple[int, float], ...] = ()
    slots_read: float | None = None
    tokens_read: int | None = None


@dataclass
class ReplayOutcome:
    """What one cut kept of one recorded context.

    Attributes:
        context: its id.
        kept, total: `[layers, kv_heads]` float64, utility of the slots that stay, and of all slots.
        slots: `[layers, kv_heads]` float64, how many stay.
        kept_share: share of the context's slots that stay.
        seconds: thread CPU seconds of the cut; scores are shared by configurations and left out.
    """

    context: str
    kept: Tensor
    total: Tensor
    slots: Tensor
    kept_share: float
    seconds: float


def to_json(outcome: Outcome | ReplayOutcome) -> dict[str, Any]:
    """An outcome as plain data; JSON has no NaN, so what was not measured is None."""
    plain = {name: each.tolist() if isinstance(each, Tensor) else each for name, each in vars(outcome).items()}
    return plain | {name: None for name, each in plain.items() if isinstance(each, float) and math.isnan(each)}


def from_json(data: Mapping[str, Any]) -> Outcome | ReplayOutcome:
    """The outcome that :func:`to_json` was given."""
    answers = tuple((int(grade), float(nll)) for grade, nll in data.get("answers", ()))
    data = {name: each for name, each in data.items() if name != "answers"}
    grids = {name: torch.tensor(each, dtype=torch.float64) for name, each in data.items() if isinstance(each, list)}
    if "kept" in data:
        return ReplayOutcome(**dict(data) | grids)
    return Outcome(answers=answers, **dict(data) | grids | {"nll": math.nan if data["nll"] is None else data["nll"]})


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
            tuple(answer for part in same for answer in part.answers),
            same[-1].slots_read,
            same[-1].tokens_read,
        )
        for context, same in parts.items()
    ]


def measured_fields(outcomes: Sequence[Outcome] | Sequence[ReplayOutcome]) -> dict[str, Any]:
    """The fields of a row (:class:`kv_gym.evaluation.rows.Row`) that outcomes add up to.

    Args:
        outcomes: of one configuration in all contexts of one task.
    """
    replayed = [outcome for outcome in outcomes if isinstance(outcome, ReplayOutcome)]
    contexts = replayed or per_context([outcome for outcome in outcomes if isinstance(outcome, Outcome)])
    slots = [context.slots for context in contexts if context.slots is not None]
    common = {
        "n": len(contexts),
        "milliseconds": 1000 * fmean(context.seconds for context in contexts),
        "slots": _grid(torch.stack(slots).mean(0)) if len(slots) == len(contexts) else None,
    }
    return common | (_replay_fields(replayed) if replayed else _answer_fields(outcomes))  # type: ignore[arg-type]


def _answer_fields(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    contexts, parts = per_context(outcomes), dict[str, dict[str, float]]()
    for outcome in outcomes:
        if outcome.part:
            part = parts.setdefault(outcome.part, {"questions": 0, "correct": 0})
            part["questions"] += outcome.questions
            part["correct"] += outcome.correct
    questions = sum(context.questions for context in contexts)
    losses = [None if math.isnan(context.nll) else round(context.nll, 6) for context in contexts]
    known = [loss for loss in losses if loss is not None]
    prompts = [context.tokens_read for context in contexts if context.tokens_read is not None]
    read = [context.slots_read for context in contexts if context.slots_read is not None]
    return {
        "questions": questions,
        "accuracy": math.fsum(context.correct for context in contexts) / questions,
        "nll": math.fsum(known) / questions if len(known) == len(losses) else None,
        "parts": parts,
        "contexts": {
            context.context: [_whole(context.correct), context.questions, loss]
            for context, loss in zip(contexts, losses, strict=True)
        },
        "cache_bytes": fmean(context.cache_bytes for context in contexts),
        "slots_read": fmean(read) if read else None,
        "tokens_read": fmean(prompts) if prompts else None,
        "answers": {context.context: [list(answer) for answer in context.answers] for context in contexts}
        if any(context.answers for context in contexts)
        else None,
    }


def _replay_fields(outcomes: Sequence[ReplayOutcome]) -> dict[str, Any]:
    kept, total = (torch.stack(grids) for grids in zip(*((o.kept, o.total) for o in outcomes), strict=True))
    sums = [[float(context.sum()) for context in grids] for grids in (kept, total)]
    return {
        "utility_kept": sum(sums[0]) / max(sum(sums[1]), 1e-12),
        "kept_share": fmean(outcome.kept_share for outcome in outcomes),
        "head_utility": _grid(kept.sum(0) / total.sum(0)),  # NaN, which is None in a row, where nothing is attended to
        "contexts": {outcome.context: [*both, None] for outcome, *both in zip(outcomes, *sums, strict=True)},
    }


def _grid(numbers: Tensor) -> list[list[float]]:
    return [[round(number, 6) for number in layer] for layer in numbers.tolist()]


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
