"""Statistics of results: intervals, paired differences, rank correlation, and the smallest budget that suffices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from kv_gym.budgets import Budget

DRAWS = 2000  # of the bootstrap: its ends then move by about a tenth of the interval's width


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % interval.

    Attributes:
        mean, low, high: the mean and the ends; they are equal where one run of one context says nothing of the spread.
        over: what varied: ``seeds``, ``contexts`` or ``seeds and contexts``.
    """

    mean: float
    low: float
    high: float
    over: str


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t with `degrees` degrees of freedom."""
    return float(stats.t.ppf(0.975, degrees))


def mean_interval(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN is left out, None is what cannot be said."""
    known = [number for number in numbers if not math.isnan(number)]
    if len(known) < 2:
        return (known[0] if known else None), None
    return fmean(known), student_t(len(known) - 1) * stdev(known) / len(known) ** 0.5


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number per training seed, with Student's t interval.

    It holds for other seeds on the same contexts: how much contexts vary, it does not say.
    """
    mean, half = fmean(values), mean_interval(values)[1] or 0.0
    return Estimate(mean, mean - half, mean + half, "seeds")


def over_contexts(parts: Sequence[float], wholes: Sequence[float]) -> Estimate:
    """The ratio of two sums over contexts, with a cluster bootstrap: contexts are drawn whole, with replacement.

    Questions of one context share its cut, so that they are no independent draws; contexts are.

    Args:
        parts: of each context, such as its correct answers.
        wholes: of each context, such as its questions; above zero in some. Contexts of zero say nothing.
    """
    top, bottom = np.asarray(parts, float), np.asarray(wholes, float)
    top, bottom = top[bottom > 0], bottom[bottom > 0]
    draws = _draws(len(top))
    low, high = np.quantile(draws @ top / (draws @ bottom), (0.025, 0.975))
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), "contexts")


@cache
def _draws(contexts: int) -> np.ndarray:
    """How often each context is drawn, `[DRAWS, contexts]`: the same draws for every configuration and in every run.

    `scipy.stats.bootstrap` draws indices and no counts: as slow as it is large, and with other draws for each call.
    """
    return np.random.default_rng(0).multinomial(contexts, [1 / contexts] * contexts, DRAWS)


def paired_difference(ours: Sequence[Mapping], theirs: Sequence[Mapping]) -> Estimate | None:
    """How much more of a task one configuration answers than another, context by context.

    The interval joins how the difference varies over contexts (cluster bootstrap of the seeds' mean) with how it
    varies over training seeds (Student's t), as independent errors: the square root of the sum of squares.

    Args:
        ours: rows of one configuration, one for each seed.
        theirs: rows of the other.

    Returns:
        None where the rows do not hold the same contexts, or nothing was asked in them.
    """
    ids = sorted(ours[0].get("contexts") or ())
    if not ids or any(set(row.get("contexts") or ()) != set(ids) for row in (*ours, *theirs)):
        return None
    questions = [ours[0]["contexts"][name][1] for name in ids]
    if not sum(questions):
        return None
    gain = _mean_correct(ours, ids) - _mean_correct(theirs, ids)
    found = over_contexts(gain.tolist(), questions)
    squared = 0.0
    for rows in (ours, theirs):
        of_seeds = over_seeds([sum(row["contexts"][name][0] for name in ids) / sum(questions) for row in rows])
        squared += (of_seeds.high - of_seeds.mean) ** 2
    low = found.mean - ((found.mean - found.low) ** 2 + squared) ** 0.5
    high = found.mean + ((found.high - found.mean) ** 2 + squared) ** 0.5
    return Estimate(found.mean, low, high, "seeds and contexts" if squared else "contexts")


def _mean_correct(rows: Sequence[Mapping], ids: Sequence[str]) -> np.ndarray:
    return np.mean([[row["contexts"][name][0] for name in ids] for row in rows], 0)


def smallest_sufficient_budget(measured: Iterable[tuple[Budget, bool]]) -> Budget | None:
    """The smallest budget at which a condition holds, as it does at every larger one that was measured.

    Budgets are walked from the largest down and the first failure ends the walk, so that trying many of them does not
    make a lucky one likelier. Shares and slots cannot be ordered without a length, and are walked apart.

    Args:
        measured: budgets, and whether the condition holds there.

    Returns:
        A share where one suffices, else a number of slots, else None.
    """
    measured = list(measured)
    for kind in (float, int):
        found: Budget | None = None
        for budget, holds in sorted((pair for pair in measured if isinstance(pair[0], kind)), reverse=True):
            if not holds:
                break
            found = budget
        if found is not None:
            return found
    return None


def average_ranks(numbers: Tensor) -> Tensor:
    """Ranks from 1 along the last axis, equal numbers sharing the mean of theirs: float64, shaped as `numbers`."""
    return torch.from_numpy(stats.rankdata(numbers.numpy(), axis=-1))


def spearman(scores: Tensor, utility: Tensor) -> Tensor:
    """Rank correlation along the last axis: `[rows]` float64, NaN where either is constant.

    Args:
        scores, utility: `[rows, n]`.
    """
    one, other = (each - each.mean(-1, keepdim=True) for each in (average_ranks(scores), average_ranks(utility)))
    spread = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    return (one * other).sum(-1) / torch.where(spread > 0, spread, torch.nan)


def auc(scores: Tensor, wanted: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that a wanted slot scores above an unwanted one, ties count half.

    Args:
        scores: `[rows, n]`.
        wanted: `[rows, n]` bool.

    Returns:
        `[rows]` float64, NaN where all are wanted, or none.
    """
    positive = wanted.double().sum(-1)
    pairs = positive * (wanted.shape[-1] - positive)
    above = (average_ranks(scores) * wanted).sum(-1) - positive * (positive + 1) / 2
    return above / torch.where(pairs > 0, pairs, torch.nan)
