"""Metrics of a guard: does its signal tell the answers that eviction spoilt, and which threshold alarms how often?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.errors import UserError
from kv_gym.evaluation.statistics import auc
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.live import EvictingCache
from kv_gym.models.cache_name import with_cache


@dataclass(frozen=True)
class GuardedAnswers:
    """Greedy answers, and what the guard saw while they were made. q questions, in the order of contexts.

    Attributes:
        correct: `[q]` bool, exact match of the whole answer.
        row: `[q]` int64, which context of the batch was asked.
        signal: `[q]` float64, the largest signal of the forwards that predict an answer token.
        layers: `[layers, q]` float64, the same of each evicting layer alone; None for signals of the output.
    """

    correct: Tensor
    row: Tensor
    signal: Tensor
    layers: Tensor | None


@torch.no_grad()
def guarded_answers(model, cache: EvictingCache, batch: Sequence[TaskContext]) -> GuardedAnswers:
    """Ask every question of a batch of contexts, token by token; the cache itself stays as it is.

    Args:
        model: the cache's model.
        cache: of these contexts, already compressed, with a guard (whose threshold may be infinite).
        batch: contexts whose questions are all of one length, and their answers too.

    Raises:
        UserError: a cache without a guard, or questions or answers of several lengths.
    """
    asked = [(row, question) for row, context in enumerate(batch) for question in context.questions]
    if len({(len(question.question_ids), len(question.answer_ids)) for _, question in asked}) > 1:
        raise UserError("questions or answers differ in length, and are asked together here: group them by length")
    if cache.monitor is None:
        raise UserError("the cache has no guard: make it with EvictingCache(..., guard=Guard(...))")
    row = torch.tensor([row for row, _ in asked])
    expected = torch.tensor([question.answer_ids for _, question in asked])
    ids = torch.tensor([question.question_ids for _, question in asked], device=model.device)
    answers, signals, layers = [], [], []
    with cache.fork() as fork:
        fork.batch_select_indices(row)
        for token in ids[:, :-1].split(1, 1):  # one by one, as answers come: a running mean counts forwards
            model(input_ids=token, **with_cache(fork), use_cache=True)
        ids = ids[:, -1:]
        for _ in range(expected.shape[1]):
            ids = model(input_ids=ids, **with_cache(fork), use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            answers.append(ids[:, 0].cpu())
            assert fork.monitor is not None
            signals.append(_measured(fork.monitor.signal).double().cpu())
            values = [signal.double().cpu() for signal in fork.layer_signals()]
            layers += [torch.stack(values)] if values else []
    correct = (torch.stack(answers, 1) == expected).all(1)
    of_layers = torch.stack(layers).amax(0) if layers else None
    return GuardedAnswers(correct, row, torch.stack(signals).amax(0), of_layers)


def _measured(signal: Tensor | None) -> Tensor:
    if signal is None or bool(signal.isnan().any()):
        raise UserError("the guard had nothing to measure: compress the cache before asking, or ask a longer question")
    return signal


def threshold_at(values: Tensor, false_alarms: float = 0.05) -> float:
    """The least threshold above which at most so large a share of `values [n]` lies.

    Args:
        values: signals of answers that were right, on contexts for calibration, never the judged ones.
        false_alarms: share in [0, 1).

    Raises:
        UserError: no values, or a share out of range.
    """
    if not len(values) or not 0 <= false_alarms < 1:
        raise UserError(
            f"a threshold needs signals of right answers and a share of false alarms in [0, 1); got {len(values)} "
            f"signals and {false_alarms}"
        )
    return float(values.sort(descending=True).values[int(false_alarms * len(values) + 1e-9)])


def auroc(values: Tensor, events: Tensor) -> float:
    """The chance that the signal of an event is above that of another answer, ties count half; NaN if one is missing.

    Args:
        values: `[n]`.
        events: `[n]` bool.
    """
    return float(auc(values[None], events[None]))


def recall_at(values: Tensor, events: Tensor, false_alarms: float = 0.05) -> float:
    """Share of events that are alarmed when at most so large a share of the other answers is; NaN without events."""
    if not bool(events.any()) or bool(events.all()):
        return float("nan")
    return float((values[events] > threshold_at(values[~events], false_alarms)).double().mean())
