"""What a cut costs: the loss against the full cache on the same contexts, and how large it may be.

A budget is chosen by the upper end of the loss's 95 % interval (for accuracy that is the lower end of what is left).
Differences are paired, context by context: most of what varies between contexts varies alike with and without a cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kv_gym.budgets.budget import Budget
from kv_gym.evaluation.configurations import FULL, Configuration, full_cache
from kv_gym.evaluation.interval import student_t
from kv_gym.evaluation.outcomes import Outcome, per_context
from kv_gym.evaluation.tasks import TaskContext
from kv_gym.evaluation.tasks.asked import unseen_questions

_PSEUDO = 2  # questions that Agresti and Min add, of which one half each is lost, gained, right and wrong


def measured(
    model: Any,
    contexts: Sequence[TaskContext],
    part: str,
    measure: str,
    configurations: Iterable[Configuration],
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Judge configurations live on a part of the data: a context is read once and cut before its questions are seen.

    Args:
        model: the fitted decoder.
        contexts: of the part.
        part: its name, which rows carry as their task.
        measure: ``accuracy`` or ``nll``, what the loss is of.
        configurations: who is judged, beside the full cache.
        progress: show a bar.

    Returns:
        The row of the full cache, then one for each configuration: policy, budget, allocation, task, ``accuracy``,
        ``nll`` (nats per token), ``loss`` and ``most`` (its mean and the upper end of its 95 % interval; accuracy
        counts from 0 to 1), ``cache_bytes``, ``policy_bytes``, ``contexts`` and ``n`` (questions).
    """
    task, everyone = unseen_questions(contexts, part), [full_cache(), *configurations]
    found: list[dict[str, Outcome]] = [{} for _ in everyone]
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        shown = bar.add_task(part, total=len(contexts))
        for batch in task.batches():
            for of_configuration, (_, outcomes) in zip(found, task.measure(model, batch, everyone), strict=True):
                of_configuration.update((outcome.context, outcome) for outcome in per_context(outcomes))
            bar.advance(shown, len(batch))
    full = found[0]
    return [
        _row(configuration, part, measure, [(full[name], of_configuration[name]) for name in full])
        for configuration, of_configuration in zip(everyone, found, strict=True)
    ]


def _row(
    configuration: Configuration, part: str, measure: str, pairs: Sequence[tuple[Outcome, Outcome]]
) -> dict[str, Any]:
    """A configuration's row from its contexts' outcomes, each behind the full cache's of the same context."""
    asked, contexts = [cut.questions for _, cut in pairs], len(pairs)
    if measure == "accuracy":
        loss, most = lost_answers([full.correct - cut.correct for full, cut in pairs], asked)
    else:
        loss, most = lost_nats([(cut.nll - full.nll) / cut.questions for full, cut in pairs])
    if configuration.name == FULL:
        loss = most = 0.0
    return {
        "policy": configuration.name,
        "budget": configuration.budget,
        "allocation": configuration.allocation.name,
        "task": part,
        "accuracy": sum(cut.correct for _, cut in pairs) / sum(asked),
        "nll": sum(cut.nll / cut.questions for _, cut in pairs) / contexts,
        "loss": loss,
        "most": most,
        "cache_bytes": sum(cut.cache_bytes for _, cut in pairs) / contexts,
        "policy_bytes": getattr(configuration.policy, "nbytes", int)(),
        "contexts": contexts,
        "n": sum(asked),
    }


def lost_answers(lost: Sequence[float], asked: Sequence[int]) -> tuple[float, float]:
    """Share of the questions that a cut loses, net, and the upper end of its 95 % interval.

    Agresti and Min's interval for matched proportions (Statistics in Medicine 24, 2005), which knows that no loss among
    few questions says little: half a question is added to each of right-right, right-wrong, wrong-right and
    wrong-wrong. Differs from theirs in: residuals are summed by context, because questions of one context share its
    cut, and the quantile is Student's with as many degrees of freedom as there are contexts, less one.

    Args:
        lost: of each context, questions answered with the full cache alone less those answered with the cut alone.
        asked: questions of each context.
    """
    contexts, questions = len(lost), sum(asked) + _PSEUDO
    share = sum(lost) / questions
    scatter = sum((gone - share * n) ** 2 for gone, n in zip(lost, asked, strict=True)) * contexts / (contexts - 1)
    half = student_t(contexts - 1) * math.sqrt(scatter + _PSEUDO / 2) / questions
    return sum(lost) / sum(asked), share + half


def lost_nats(lost: Sequence[float]) -> tuple[float, float]:
    """Mean of the contexts' losses, and the upper end of its 95 % interval by Student's t."""
    mean = sum(lost) / len(lost)
    variance = sum((one - mean) ** 2 for one in lost) / (len(lost) - 1)
    return mean, mean + student_t(len(lost) - 1) * math.sqrt(variance / len(lost))


def least_provable(contexts: int, questions: int) -> float:
    """The tolerance that so many questions can confirm when none of them is lost."""
    return student_t(contexts - 1) * math.sqrt(_PSEUDO / 2) / (questions + _PSEUDO)


def smallest(rows: Iterable[Mapping[str, Any]], tolerance: float) -> Budget | None:
    """The smallest budget at and above which the loss is surely within the tolerance; None where there is none.

    Budgets are tried from the largest down and the first failure ends it, so that trying many of them does not make a
    lucky one likelier.
    """
    found = None
    for row in sorted(rows, key=lambda row: -row["budget"]):
        if row["most"] > tolerance:
            break
        found = row["budget"]
    return found
