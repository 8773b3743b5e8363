"""What a cut costs: the loss against the full cache on the same contexts, and how large it may be.

A budget is chosen by the upper end of the loss's 95 % interval (for accuracy that is the lower end of what is left).
Differences are paired, context by context: most of what varies between contexts varies alike with and without a cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kv_gym.evaluation.configurations import Configuration, full_cache
from kv_gym.evaluation.measure import measure
from kv_gym.evaluation.statistics import mean_interval, student_t
from kv_gym.evaluation.tasks import TaskContext, unseen_questions
from kv_gym.progress import ProgressBar

_PSEUDO = 2  # questions that Agresti and Min add, of which one half each is lost, gained, right and wrong


def measure_losses(
    model: Any,
    contexts: Sequence[TaskContext],
    part: str,
    metric: str,
    configurations: Iterable[Configuration],
    progress: bool = True,
    go_on: Callable[[int], bool] = lambda batch: True,
    workers: int | None = None,
    ray: str | None = None,
) -> list[dict[str, Any]]:
    """Measure configurations on a part of the data: a context is read once and cut before its questions are seen.

    Args:
        model: the fitted decoder.
        contexts: of the part.
        part: its name, which rows carry as their task.
        metric: ``accuracy`` or ``nll``, what the loss is of.
        configurations: what is measured, with the full cache.
        progress: show a bar.
        go_on: asked before each batch of contexts, with its size; the rows are of the contexts before the first no.
        workers, ray: as for :func:`kv_gym.evaluation.measure.measure`.

    Returns:
        Rows (:class:`kv_gym.evaluation.rows.Row`), the full cache first, with ``loss`` and ``loss_upper``: its mean
        and the upper end of its 95 % interval; accuracy counts from 0 to 1.
    """
    with ProgressBar(part, len(contexts), shown=progress, transient=True) as bar:
        task = unseen_questions(contexts, part)
        full, *rows = measure(model, [task], [full_cache(), *configurations], bar.advance, go_on, workers, ray)
    for row in rows:
        row["loss"], row["loss_upper"] = paired_loss(full["contexts"], row["contexts"], metric)
    return [full | {"loss": 0.0, "loss_upper": 0.0}, *rows]


def paired_loss(full: Mapping[str, Sequence], cut: Mapping[str, Sequence], metric: str) -> tuple[float, float]:
    """The loss of a cut and the upper end of its 95 % interval.

    Args:
        full, cut: contexts of two rows, ``{id: [correct, questions, nll]}``.
        metric: ``accuracy`` or ``nll``.
    """
    pairs = [(full[name], cut[name]) for name in full]
    if metric == "accuracy":
        lost = [ours[0] - theirs[0] for ours, theirs in pairs]
        return lost_answers(lost, [questions for _, (_, questions, _) in pairs])
    return lost_nats([(theirs[2] - ours[2]) / theirs[1] for ours, theirs in pairs])


def lost_answers(lost: Sequence[float], questions: Sequence[int]) -> tuple[float, float]:
    """Share of the questions that a cut loses, net, and the upper end of its 95 % interval.

    Agresti and Min's interval for matched proportions (Statistics in Medicine 24, 2005), which knows that no loss among
    few questions says little: half a question is added to each of right-right, right-wrong, wrong-right and
    wrong-wrong. Differs from theirs in: residuals are summed by context, because questions of one context share its
    cut, and the quantile is Student's with as many degrees of freedom as there are contexts, less one.

    Args:
        lost: of each context, questions answered with the full cache alone less those answered with the cut alone.
        questions: of each context.
    """
    contexts, total = len(lost), sum(questions) + _PSEUDO
    share = sum(lost) / total
    scatter = sum((gone - share * n) ** 2 for gone, n in zip(lost, questions, strict=True)) * contexts / (contexts - 1)
    half = student_t(contexts - 1) * math.sqrt(scatter + _PSEUDO / 2) / total
    return sum(lost) / sum(questions), share + half


def lost_nats(lost: Sequence[float]) -> tuple[float, float]:
    """Mean of the contexts' losses, and the upper end of its 95 % interval by Student's t."""
    mean, half = mean_interval(lost)
    assert mean is not None and half is not None
    return mean, mean + half


def least_provable(contexts: int, questions: int) -> float:
    """The tolerance that so many questions can confirm when none of them is lost."""
    return student_t(contexts - 1) * math.sqrt(_PSEUDO / 2) / (questions + _PSEUDO)
