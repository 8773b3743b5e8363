"""Replay as a task: how much of the recorded future attention a cut would have kept, head by head."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kv_gym.budgets import select_context, uniform
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.outcomes import ReplayOutcome
from kv_gym.evaluation.tasks.base import Task
from kv_gym.traces import TraceSet


class ReplayTask(Task):
    """Recorded contexts, each cut once at its end; no model is needed.

    Args:
        sequences: a trace set or a list of :class:`~kv_gym.traces.Sequence`, each with at least one continuation.
        name: what rows call it.
        rows: contexts of a batch.

    Attributes:
        name, trigger, hash: see :class:`~kv_gym.evaluation.tasks.Task`.
    """

    trigger = "prefill"

    def __init__(self, sequences: TraceSet | Sequence[Any], name: str, rows: int = 1):
        self.sequences, self.name, self._rows = sequences, name, rows

    @property
    def hash(self) -> str:
        """Of the trace set; a list in memory has none."""
        return getattr(self.sequences, "hash", "")

    def batches(self) -> list[Sequence[int]]:
        """Places of contexts."""
        places = range(len(self.sequences))
        return [places[start : start + self._rows] for start in places[:: self._rows]]

    def refuse_unfit(self, configuration: Configuration) -> None:
        """Raise a UserError for a configuration that this recording cannot replay."""
        configuration.allocation.refuse_unfit(configuration.policy)
        fingerprint, accept = (
            getattr(configuration.policy, name, None) for name in ("fingerprint", "accept_fingerprint")
        )
        if fingerprint is not None and isinstance(self.sequences, TraceSet):
            owner, recorded = f"policy {configuration.name!r}", self.sequences.fingerprint
            fingerprint.refuse_other(recorded, owner, "the model of the traces", bool(accept))
        self.sequences[0].refuse_unrecorded(configuration.policy)

    @torch.no_grad()
    def measure(  # type: ignore[override]
        self, model, batch: Sequence[int], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[ReplayOutcome]]]:
        """See :meth:`kv_gym.evaluation.tasks.Task.measure`; one context is in memory at a time.

        Args:
            model: not used.
            batch: one of :meth:`batches`.
            configurations: who is compared; their tiers change nothing, since replay knows only what is kept.

        Raises:
            UserError: a context without continuations, or without the queries or statistics that a policy needs.
        """
        outcomes: list[list[ReplayOutcome]] = [[] for _ in configurations]
        for place in batch:
            sequence = self.sequences[place]
            if not sequence.continuations:
                raise UserError(f"context {sequence.id} has no continuations, so nothing tells what was worth keeping")
            scored = _Scores(sequence)
            for found, configuration in zip(outcomes, configurations, strict=True):
                found.append(_outcome(configuration, sequence, *scored.of(configuration)))
        yield from zip(configurations, outcomes, strict=True)


def replay_tasks(sequences: TraceSet | Sequence[Any]) -> list[ReplayTask]:
    """One task for every name of tasks among recorded contexts."""
    if isinstance(sequences, TraceSet):
        names = dict.fromkeys(entry.task for entry in sequences.entries)
        return [ReplayTask(sequences.select(task=name), name) for name in names]
    names = dict.fromkeys(sequence.task for sequence in sequences)
    return [ReplayTask([each for each in sequences if each.task == name], name) for name in names]


class _Scores:
    """Views of one context and their scores, kept while configurations of the same policy and budget follow."""

    def __init__(self, sequence: Any) -> None:
        self._sequence = sequence
        self._policy: Any = None
        self._key: tuple | None = None
        self._plain: list = []
        self._scored: tuple[list, list[Tensor]] = ([], [])

    def of(self, configuration: Configuration) -> tuple[list, list[Tensor]]:
        """Views within the configuration's budget, one for each layer, and their scores."""
        policy, budget = configuration.policy, configuration.budget
        if self._policy is not policy:
            self._policy, self._key = policy, None
            self._plain = [self._sequence.view_for(policy, i) for i in range(len(self._sequence.layers))]
        key = (isinstance(budget, int), budget)
        if self._key != key:
            self._key = key
            heads, n = self._plain[0].keys.shape[1:3]
            slots = uniform(budget, torch.tensor([n]), heads)  # not of the tokens seen: slots may be sampled
            views = [view.with_budget(slots) for view in self._plain]
            self._scored = views, [policy.score(view) for view in views]
        return self._scored


def _outcome(configuration: Configuration, sequence: Any, views: list, scores: list[Tensor]) -> ReplayOutcome:
    began = time.thread_time()
    selection = select_context(
        configuration.policy, configuration.allocation, views, configuration.budget,
        torch.from_numpy(sequence.utility()), sinks=configuration.sinks, recent=configuration.recent, scores=scores,
    )  # fmt: skip
    kept, seconds = selection.kept.double(), time.thread_time() - began
    return ReplayOutcome(
        sequence.id, selection.kept_utility, selection.total_utility, kept.sum(-1), float(kept.mean()), seconds
    )
