"""Replay as a task: how much of the recorded future attention the cuts would have kept, head by head."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kv_gym.budgets import judged, protection_for, uniform
from kv_gym.errors import UserError
from kv_gym.evaluation.configurations import Configuration
from kv_gym.evaluation.outcomes import Outcome
from kv_gym.traces import TraceSet, open_traces

AT_ONCE = 8  # contexts of a batch


@dataclass
class Kept(Outcome):
    """What one configuration's cut kept of one recorded context.

    Attributes:
        kept, total: `[layers, kv_heads]` float64, expected utility of the slots that stay, and of all.
    """

    kept: Tensor
    total: Tensor


class Replayed:
    """A trace set to cut once at the end of each context; no model is needed.

    Args:
        traces: folder of the trace set.
        split: of the traces; ``all`` takes every context.
        contexts: how many, the first ones; None takes all.

    Attributes:
        name, trigger, hash: as those of a :class:`~kv_gym.evaluation.tasks.Task`.

    Raises:
        UserError: no trace set there, or no context in this split.
    """

    trigger = "prefill"

    def __init__(self, traces: str, split: str = "test", contexts: int | None = None):
        opened = open_traces(traces)
        chosen = opened if split == "all" else opened.select(split=split)
        self.traces = TraceSet(chosen.entries[:contexts], opened.manifest)
        if not len(self.traces):
            raise UserError(f"traces {traces} hold no context in split {split!r}; choose another split, or `all`")
        tasks = sorted({entry.task for entry in self.traces.entries if entry.task})
        self.name = f"replay {', '.join(tasks)}".strip()
        self.hash = self.traces.hash

    def batches(self) -> list[Sequence[str]]:
        """Ids of contexts."""
        ids = self.traces.ids
        return [ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE)]

    def refuse_unfit(self, configuration: Configuration) -> None:
        """Raise a UserError for a configuration that this recording cannot replay."""
        configuration.allocation.refuse_unfit(configuration.policy)
        fingerprint = getattr(configuration.policy, "fingerprint", None)
        if fingerprint is not None:
            fingerprint.refuse_other(
                self.traces.fingerprint, f"policy {configuration.name!r}", "the model of the traces"
            )
        self.traces[0].refuse_unrecorded(configuration.policy)

    @torch.no_grad()
    def measure(
        self, model, batch: Sequence[str], configurations: Sequence[Configuration]
    ) -> Iterator[tuple[Configuration, list[Outcome]]]:
        """Cut every context of a batch by every configuration; those of one policy and budget share scores.

        Args:
            model: not used.
            batch: one of :meth:`batches`.
            configurations: who is compared; their tiers change nothing, since replay knows only what is kept.
        """
        sequences = [self.traces[name] for name in batch]
        known: tuple | None = None
        judgeable: list = []
        for configuration in configurations:
            if known != (id(configuration.policy), configuration.budget):
                known, judgeable = (
                    (id(configuration.policy), configuration.budget),
                    [_scored(configuration, sequence) for sequence in sequences],
                )
            pairs = zip(sequences, judgeable, strict=True)
            yield configuration, [_kept(configuration, sequence, views, scores) for sequence, (views, scores) in pairs]


def _scored(configuration: Configuration, sequence) -> tuple[list, list[Tensor]]:
    policy, views = configuration.policy, []
    for layer in range(len(sequence.layers)):
        view = sequence.view_for(policy, layer)
        views.append(view.with_budget(uniform(configuration.budget, view.seen, view.keys.shape[1])))
    return views, [policy.score(view) for view in views]


def _kept(configuration: Configuration, sequence, views: Sequence, scores: Sequence[Tensor]) -> Kept:
    began = time.thread_time()
    guarded = protection_for(configuration.policy, configuration.sinks, configuration.recent)
    layers = [
        judged(score, configuration.allocation, view, *guarded, place, len(views))
        for place, (score, view) in enumerate(zip(scores, views, strict=True))
    ]
    masks = torch.stack([mask[0] for mask in configuration.allocation.kept(layers)]).double()
    seconds = time.thread_time() - began
    utility = torch.from_numpy(sequence.utility()).double()
    kept, total = (utility * masks).sum(-1), utility.sum(-1)
    share = float(kept.sum() / total.sum().clamp(min=1e-12))
    return Kept(sequence.id, "", 1, share, math.nan, 0, masks.sum(-1), seconds, kept, total)
